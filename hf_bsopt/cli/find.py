"""``hf-bsopt find``: the batch size for a model on a GPU, or for each of several lengths."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

from .._utils import progress
from .._utils.files import write_atomically
from .._utils.terminal import show
from ..errors import NothingFitsError, UsageError
from ..parallel.launch import Launch
from .arguments import Arguments, parse
from .exit_codes import FOUND, NOTHING_FITS
from .flags import OutputFlags
from .quiet import silence_libraries

if TYPE_CHECKING:
    from ..datasets.length_report import LengthsReport
    from ..report.report import Report

DESCRIPTION = (
    "Finds the largest batch size with which a model trains on a GPU. Exit codes: 0 found, 1 nothing fits, 2 invalid "
    "arguments or a device that cannot be used, 130 interrupted."
)
PACKING = "packing fills every sequence up to max_length, which is the worst case that is predicted anyway"
SEPARATOR = "─" * 78


def run(argv: Sequence[str], launch: Launch) -> int:
    """Run the subcommand and return its exit code."""
    arguments = parse(argv, "hf-bsopt find", DESCRIPTION)
    silence_libraries(arguments.output.verbose)
    is_silent = arguments.output.quiet or not launch.is_main_process
    with launch.process_group(), progress.silent(is_silent), _log_above_progress(arguments.output.verbose):
        if arguments.is_table:
            from .table import print_table

            return FOUND if print_table(arguments) else NOTHING_FITS
        return _find(arguments, launch)


def _find(arguments: Arguments, launch: Launch) -> int:
    lengths = None
    if arguments.dataset.dataset:
        from .lengths import measure_lengths

        lengths = measure_lengths(arguments)
        if not arguments.output.quiet:
            show(f"{lengths}\n\n{SEPARATOR}\n")
    reports: list[Report] = []
    misfits: list[str] = []
    for length in arguments.max_lengths or (None,):
        try:
            report = _report(arguments, length, launch)
        except NothingFitsError as error:
            misfits.append(str(error))
            _print_that_nothing_fits(error, arguments)
            continue
        reports.append(report)
        _print(report, arguments, is_first=len(reports) == 1)
    if launch.is_main_process and reports:
        _write_files(reports, misfits, lengths, arguments)
    return _exit_code(reports, misfits, is_quiet=arguments.output.quiet)


def _report(arguments: Arguments, length: int | None, launch: Launch) -> Report:
    from ..advice.evaluate import advise
    from ..api import by_name
    from ..report.report import Report
    from ..search.pipeline import run_on_every_rank

    options = arguments.options_at(length)
    processes = launch.processes(options.search.num_processes)
    search = dataclasses.replace(options.search, num_processes=processes)
    report = Report.of(run_on_every_rank(by_name(arguments.model.model or "", options), options.device, search))
    if arguments.dataset.packing:
        report = dataclasses.replace(report, notes=(*report.notes, PACKING))
    if arguments.output.advise:
        report = dataclasses.replace(report, suggestions=advise(report))
    return report


def _exit_code(reports: list[Report], misfits: list[str], *, is_quiet: bool) -> int:
    asked = [report.checked for report in reports]
    asked += [report.evaluation.checked for report in reports if report.evaluation is not None]
    refused = [trial for trial in asked if trial is not None and not trial.fits]
    if is_quiet:
        for trial in refused:
            show(f"❌ Batch size {trial.batch_size} does not fit.", file=sys.stderr)
    return NOTHING_FITS if refused or misfits else FOUND


def _write_files(
    reports: list[Report], misfits: list[str], lengths: LengthsReport | None, arguments: Arguments
) -> None:
    """Write the files that were asked for. One that cannot be written does not stop the others.

    Raises UsageError with all problems, after the answer has been printed.
    """
    output = arguments.output
    problems: list[str] = []

    def attempt(write: Callable[[], None]) -> None:
        try:
            write()
        except UsageError as error:
            problems.append(str(error))

    if output.json is not None:
        attempt(lambda: _write_json(reports, misfits, lengths, arguments))
    if output.plot is not None:
        from ..report import plots

        plot_file = Path(output.plot)
        attempt(lambda: plots.save([report.plot_data for report in reports], plot_file))
    if output.html is not None:
        from ..report import html

        page = Path(output.html)
        attempt(lambda: html.save([(report, report.suggestions) for report in reports], page))
    if output.patch is not None:
        attempt(lambda: _patch(reports[0], output))
    if problems:
        raise UsageError("; ".join(problems))


def _write_json(reports: list[Report], misfits: list[str], lengths: LengthsReport | None, arguments: Arguments) -> None:
    values = reports[0].to_dict()
    if len(arguments.max_lengths) > 1:
        values = {"reports": [report.to_dict() for report in reports], "nothing_fits": misfits}
    if lengths is not None:
        values["lengths"] = lengths.to_dict()
    write_atomically(Path(arguments.output.json or ""), json.dumps(values, indent=2, ensure_ascii=False) + "\n")


def _patch(report: Report, output: OutputFlags) -> None:
    from ..patching import parse_keys, patch

    keys = parse_keys(output.key)
    patched = patch(output.patch or "", report.config, keys=keys, dry_run=output.dry_run)
    if not output.quiet:
        show(f"\n{patched}")


def _print(report: Report, arguments: Arguments, *, is_first: bool) -> None:
    """Print the report, or with --quiet what can be pasted into a notebook."""
    if not arguments.output.quiet:
        text = report.format(verbose=arguments.output.verbose)
        show(text if is_first else f"\n{SEPARATOR}\n\n{text}")
        return
    if len(arguments.max_lengths) > 1:
        show(f"# max_length {report.workload.length}")
    show("\n".join(f'CONFIG["{name}"] = {value}' for name, value in report.config.items()))
    for sentence in report.plan.advice:
        show(sentence, file=sys.stderr)


def _print_that_nothing_fits(error: NothingFitsError, arguments: Arguments) -> None:
    """Print why, and what would make room; Ctrl-C during the latter ends it."""
    from ..advice.evaluate import advise

    output = arguments.output
    show(f"❌ {error}.", file=sys.stderr)
    is_wanted = not output.quiet if output.advise is None else output.advise
    if is_wanted and error.question is not None:
        with contextlib.suppress(KeyboardInterrupt):
            show(f"\n{advise(error)}", file=sys.stderr if output.quiet else sys.stdout)


def _log_above_progress(verbose: bool) -> AbstractContextManager[None]:
    """Print log lines above the progress line, not into it."""
    if not verbose:
        return contextlib.nullcontext()
    from tqdm.contrib.logging import logging_redirect_tqdm

    redirected: AbstractContextManager[None] = logging_redirect_tqdm()
    return redirected
