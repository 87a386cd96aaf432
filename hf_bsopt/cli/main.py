"""The command line: arguments in, report out. Exit codes: 0 found, 1 nothing fits, 2 the arguments can't be.

find-optimal-batch-size --model dmis-lab/biobert-v1.1 --max_length 512 --gpu T4
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging
import os
import platform
import sys
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from .._utils import progress
from .._utils.files import write_atomically
from ..errors import BatchSizeError, NothingFitsError, SearchInterrupted
from ..parallel.launch import Launch
from .arguments import Arguments, parse

if TYPE_CHECKING:
    from ..datasets.length_report import LengthsReport
    from ..report.report import Report

FOUND, NOTHING_FITS, USAGE = 0, 1, 2
INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    launch = Launch.here()
    with launch.output_on_rank_zero_only():
        return _main(argv, launch)


def _main(argv: Sequence[str] | None, launch: Launch) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal without ✅ still gets the number
    try:
        if argv[:1] == ["env"]:
            print(environment())
            return FOUND
        arguments = parse(argv)
        _quiet(arguments.verbose)
        is_silent = arguments.quiet or not launch.is_main_process
        with launch.process_group(), progress.silent(is_silent), _logged(arguments.verbose):
            return _run(arguments, launch)
    except NothingFitsError as error:
        _tell_that_nothing_fits(error, arguments)
        return NOTHING_FITS
    except BatchSizeError as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FOUND
    except SearchInterrupted as error:
        print(_interrupted(error), file=sys.stderr)
        return INTERRUPTED
    except KeyboardInterrupt:
        print("interrupted: nothing was found yet", file=sys.stderr)
        return INTERRUPTED


def _run(arguments: Arguments, launch: Launch) -> int:
    if arguments.is_table:
        from .table import print_table

        return FOUND if print_table(arguments) else NOTHING_FITS
    from ..parallel.ranks import agreed
    from .find import found

    measured = None
    if arguments.dataset:
        from .lengths import lengths_of

        measured = lengths_of(arguments)
        if not arguments.quiet:
            print(measured, "\n" + "─" * 78 + "\n", sep="\n", flush=True)
    processes = launch.processes(arguments.num_processes)
    reports: list[Report] = []
    misfits: list[str] = []
    lengths: list[int | None] = [*arguments.max_length] or [None]
    for length in lengths:
        search = functools.partial(found, arguments, length, processes)
        try:
            report = agreed(search, arguments.batch_size, arguments.probe_timeout)
        except NothingFitsError as error:
            misfits.append(str(error))
            _tell_that_nothing_fits(error, arguments)
            continue
        if arguments.packing:
            report = dataclasses.replace(report, notes=(*report.notes, PACKING))
        if arguments.advise:
            from ..advice.evaluate import advised

            report = advised(report)
        reports.append(report)
        _tell(report, is_quiet=arguments.quiet, is_first=len(reports) == 1, is_one_of_many=len(lengths) > 1)
    if launch.is_main_process and reports:
        _write(reports, misfits, measured, arguments)
    asked = [report.checked for report in reports]
    asked += [report.evaluation.checked for report in reports if report.evaluation is not None]
    refused = [trial for trial in asked if trial is not None and not trial.fits]
    if arguments.quiet:
        for trial in refused:
            print(f"❌ Batch size {trial.batch_size} does not fit.", file=sys.stderr)
    return NOTHING_FITS if refused or misfits else FOUND


def _write(reports: list[Report], misfits: list[str], measured: LengthsReport | None, arguments: Arguments) -> None:
    """What goes into files."""
    if arguments.json is not None:
        values = reports[0].to_dict()
        if len(arguments.max_length) > 1:
            values = {"reports": [report.to_dict() for report in reports], "nothing_fits": misfits}
        if measured is not None:
            values["lengths"] = measured.to_dict()
        write_atomically(Path(arguments.json), json.dumps(values, indent=2, ensure_ascii=False) + "\n")
    if arguments.plot is not None:
        from ..report import plots

        plots.save([report.drawing for report in reports], Path(arguments.plot))
    if arguments.html is not None:
        from ..report import html

        html.save(reports, Path(arguments.html))
    if arguments.patch is not None:
        from ..patching import parse_keys, patch

        keys = parse_keys(arguments.key)
        patched = patch(arguments.patch, reports[0].config, keys=keys, dry_run=arguments.dry_run)
        if not arguments.quiet:
            print(f"\n{patched}")


PACKING = "packing fills every sequence up to max_length, which is the worst case that is predicted anyway"


def _tell(report: Report, *, is_quiet: bool, is_first: bool, is_one_of_many: bool) -> None:
    """The whole report, or what can be pasted into a notebook."""
    if not is_quiet:
        print("" if is_first else "\n" + "─" * 78 + "\n\n", report, sep="", flush=True)
        return
    if is_one_of_many:
        print(f"# max_length {report.workload.length}")
    print("\n".join(f'CONFIG["{name}"] = {value}' for name, value in report.config.items()), flush=True)
    for sentence in report.plan.advice:
        print(sentence, file=sys.stderr)


def _tell_that_nothing_fits(error: NothingFitsError, arguments: Arguments) -> None:
    """And what would make room; whoever interrupts that has been answered already."""
    from ..advice.evaluate import find_ways_out

    print(f"❌ {error}.", file=sys.stderr, flush=True)
    is_wanted = not arguments.quiet if arguments.advise is None else arguments.advise
    if is_wanted and error.asked is not None:
        with contextlib.suppress(KeyboardInterrupt):
            print(f"\n{find_ways_out(error)}", file=sys.stderr if arguments.quiet else sys.stdout, flush=True)


def _interrupted(error: SearchInterrupted) -> str:
    """What is known so far."""
    from ..search.trial_log import told_trial

    lines = ["interrupted. What was run:", *(f"  {told_trial(trial)}" for trial in error.trials)]
    if not error.trials:
        lines = ["interrupted before anything was run."]
    return "\n".join([*lines, f"Predicted, and not proved: {error.predicted}"])


def _quiet(verbose: bool) -> None:
    """What transformers warns about while a model is built says nothing about its batch size."""
    import transformers

    if verbose:
        logging.basicConfig(level=logging.INFO, format="%(message)s")
        return
    transformers.utils.logging.set_verbosity_error()
    warnings.filterwarnings("ignore")


def _logged(verbose: bool) -> AbstractContextManager[None]:
    """Lines of the log go above the line that tells what is going on, and not into it."""
    if not verbose:
        return contextlib.nullcontext()
    from tqdm.contrib.logging import logging_redirect_tqdm

    redirected: AbstractContextManager[None] = logging_redirect_tqdm()
    return redirected


def environment() -> str:
    """What a bug report needs, one line each."""
    lines = [f"python {platform.python_version()} on {platform.system()} {platform.machine()}"]
    from .. import virtual_gpu

    reason = virtual_gpu.why_not()
    for package in ("hf-bsopt", "torch", "transformers", "accelerate", "peft", "bitsandbytes", "datasets", "pandas"):
        try:
            lines.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            lines.append(f"{package} not installed")
    import torch

    lines.append(f"CUDA of torch: {torch.version.cuda or 'none (CPU build)'}")
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        lines.append(
            f"GPU: {torch.cuda.device_count()} × {properties.name}, {properties.total_memory} bytes, compute "
            f"{properties.major}.{properties.minor}, {properties.multi_processor_count} multiprocessors"
        )
    else:
        lines.append("GPU: none")
    lines.append("rehearsal: " + ("possible" if reason is None else f"not possible, {reason}"))
    return "\n".join(lines)
