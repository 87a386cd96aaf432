"""The command line: arguments in, report out. Exit codes: 0 found, 1 nothing fits, 2 the arguments can't be.

find-optimal-batch-size --model dmis-lab/biobert-v1.1 --max_length 512 --gpu T4
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
import platform
import sys
import warnings
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from .cli_arguments import Arguments, parse
from .errors import BatchSizeError, NothingFitsError, SearchInterrupted
from .launched import Launch

if TYPE_CHECKING:
    from .report import Report

FOUND, NOTHING_FITS, USAGE = 0, 1, 2
INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    launch = Launch.here()
    with launch.voice():
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
        with launch.together():
            return _run(arguments, launch)
    except NothingFitsError as error:
        print(f"❌ {error}.", file=sys.stderr)
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
    from .integrations.ranks import agreed

    processes = launch.processes(arguments.num_processes)
    reports: list[Report] = []
    lengths: list[int | None] = [*arguments.max_length] or [None]
    for length in lengths:
        search = functools.partial(_found, arguments, length, processes)
        report = agreed(search, arguments.batch_size, arguments.probe_timeout)
        if arguments.packing:
            report = dataclasses.replace(report, notes=(*report.notes, PACKING))
        if reports:
            print("\n" + "─" * 78 + "\n")
        print(report, flush=True)
        reports.append(report)
    if launch.tells:
        _write(reports, arguments)
    asked = [report.checked for report in reports]
    asked += [report.evaluation.checked for report in reports if report.evaluation is not None]
    refused = any(trial is not None and not trial.fits for trial in asked)
    return NOTHING_FITS if refused else FOUND


def _write(reports: list[Report], arguments: Arguments) -> None:
    """What goes into files."""
    if arguments.json is not None:
        _save(reports, Path(arguments.json))
    if arguments.plot is not None:
        from . import plots

        plots.save([report.drawing for report in reports], Path(arguments.plot))
    if arguments.html is not None:
        from . import report_html

        report_html.save(reports, Path(arguments.html))
    if arguments.patch is not None:
        from .patching import parse_keys, patch

        keys = parse_keys(arguments.key)
        print(f"\n{patch(arguments.patch, reports[0].config, keys=keys, dry_run=arguments.dry_run)}")


def _found(arguments: Arguments, length: int | None, processes: int, limit: int | None) -> Report:
    from .api import find_batch_size

    return find_batch_size(
        arguments.model or "",
        gpu=arguments.gpu,
        device=arguments.device,
        memory=arguments.memory,
        task=arguments.task,
        max_length=length,
        precision=arguments.precision,
        weights_dtype=arguments.weights_dtype,
        optimizer=arguments.optimizer,
        attention=arguments.attention,
        activation_checkpointing=arguments.activation_checkpointing,
        lora_r=arguments.lora_r,
        lora_targets=tuple(arguments.lora_targets) or None,
        load_in_4bit=arguments.load_in_4bit,
        num_labels=arguments.num_labels,
        pretrained=arguments.pretrained,
        trust_remote_code=arguments.trust_remote_code,
        target=(arguments.target[0], arguments.target[1]),
        multiple_of=arguments.multiple_of,
        batch_size=limit,
        dataset_size=arguments.dataset_size,
        check=arguments.check,
        effective_batch_size=arguments.effective_batch_size,
        total_tokens=arguments.total_tokens,
        gradient_accumulation_steps=arguments.gradient_accumulation_steps,
        num_processes=processes,
        learning_rate=arguments.learning_rate,
        base_batch_size=arguments.base_batch_size,
        lr_scaling=arguments.lr_scaling,  # type: ignore[arg-type]
        evaluation=arguments.evaluation,
        prove_evaluation=arguments.eval,
        check_evaluation=arguments.per_device_eval_batch_size,
        generate=arguments.generate,
        throughput=arguments.throughput,
        expandable_segments=arguments.expandable_segments,
        max_attempts=arguments.max_attempts,
        probe_timeout=arguments.probe_timeout,
        cache=arguments.cache,
        trust_cache=arguments.trust_cache,
    )


PACKING = "packing fills every sequence up to max_length, which is the worst case that is predicted anyway"


def _interrupted(error: SearchInterrupted) -> str:
    """What is known so far."""
    from .trial_log import told_trial

    lines = ["interrupted. What was run:", *(f"  {told_trial(trial)}" for trial in error.trials)]
    if not error.trials:
        lines = ["interrupted before anything was run."]
    return "\n".join([*lines, f"Predicted, and not proved: {error.predicted}"])


def _save(reports: list[Report], path: Path) -> None:
    import json

    from .files import write_atomically

    values = reports[0].to_dict() if len(reports) == 1 else {"reports": [report.to_dict() for report in reports]}
    write_atomically(path, json.dumps(values, indent=2, ensure_ascii=False) + "\n")


def _quiet(verbose: bool) -> None:
    """What transformers warns about while a model is built says nothing about its batch size."""
    import transformers

    if verbose:
        logging.basicConfig(level=logging.INFO, format="%(message)s")
        return
    transformers.utils.logging.set_verbosity_error()
    warnings.filterwarnings("ignore")


def environment() -> str:
    """What a bug report needs, one line each."""
    lines = [f"python {platform.python_version()} on {platform.system()} {platform.machine()}"]
    from . import rehearsal

    reason = rehearsal.why_not()
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
