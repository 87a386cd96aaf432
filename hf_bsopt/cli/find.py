"""``hf-bsopt find``: the batch size for a model on a GPU, or for each of several lengths."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

from .._utils import progress
from .._utils.files import write_atomically
from ..errors import NothingFitsError
from ..parallel.launch import Launch
from .arguments import Arguments, parse
from .exit_codes import FOUND, NOTHING_FITS
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
            print(lengths, f"\n{SEPARATOR}\n", sep="\n", flush=True)
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
            print(f"❌ Batch size {trial.batch_size} does not fit.", file=sys.stderr)
    return NOTHING_FITS if refused or misfits else FOUND


def _write_files(
    reports: list[Report], misfits: list[str], lengths: LengthsReport | None, arguments: Arguments
) -> None:
    output = arguments.output
    if output.json is not None:
        values = reports[0].to_dict()
        if len(arguments.max_lengths) > 1:
            values = {"reports": [report.to_dict() for report in reports], "nothing_fits": misfits}
        if lengths is not None:
            values["lengths"] = lengths.to_dict()
        write_atomically(Path(output.json), json.dumps(values, indent=2, ensure_ascii=False) + "\n")
    if output.plot is not None:
        from ..report import plots

        plots.save([report.plot_data for report in reports], Path(output.plot))
    if output.html is not None:
        from ..report import html

        html.save([(report, report.suggestions) for report in reports], Path(output.html))
    if output.patch is not None:
        from ..patching import parse_keys, patch

        keys = parse_keys(output.key)
        patched = patch(output.patch, reports[0].config, keys=keys, dry_run=output.dry_run)
        if not output.quiet:
            print(f"\n{patched}")


def _print(report: Report, arguments: Arguments, *, is_first: bool) -> None:
    """Print the report, or with --quiet what can be pasted into a notebook."""
    if not arguments.output.quiet:
        text = report.format(verbose=arguments.output.verbose)
        print("" if is_first else f"\n{SEPARATOR}\n\n", text, sep="", flush=True)
        return
    if len(arguments.max_lengths) > 1:
        print(f"# max_length {report.workload.length}")
    print("\n".join(f'CONFIG["{name}"] = {value}' for name, value in report.config.items()), flush=True)
    for sentence in report.plan.advice:
        print(sentence, file=sys.stderr)


def _print_that_nothing_fits(error: NothingFitsError, arguments: Arguments) -> None:
    """Print why, and what would make room; Ctrl-C during the latter ends it."""
    from ..advice.evaluate import advise

    output = arguments.output
    print(f"❌ {error}.", file=sys.stderr, flush=True)
    is_wanted = not output.quiet if output.advise is None else output.advise
    if is_wanted and error.question is not None:
        with contextlib.suppress(KeyboardInterrupt):
            print(f"\n{advise(error)}", file=sys.stderr if output.quiet else sys.stdout, flush=True)


def _log_above_progress(verbose: bool) -> AbstractContextManager[None]:
    """Print log lines above the progress line, not into it."""
    if not verbose:
        return contextlib.nullcontext()
    from tqdm.contrib.logging import logging_redirect_tqdm

    redirected: AbstractContextManager[None] = logging_redirect_tqdm()
    return redirected
