"""``hf-bsopt lengths``: how long the sequences of a dataset are, and what each max_length costs."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from .._utils import progress
from .._utils.files import write_atomically
from .._utils.terminal import show
from ..datasets.length_report import LengthsReport, dataset_lengths
from ..errors import UsageError
from ..parallel.launch import Launch
from ..search.device_choice import choose_device
from .arguments import Arguments, parse, refuse
from .exit_codes import FOUND
from .quiet import silence_libraries

NOT_FOR_LENGTHS = frozenset(
    [
        "advise",
        "check",
        "check_evaluation",
        "dry_run",
        "format",
        "generate",
        "gpus",
        "html",
        "key",
        "max_attempts",
        "models",
        "patch",
        "plot",
        "pretrained",
        "probe_timeout",
        "throughput",
        "trust_cache",
        "verify_evaluation",
    ]
)
"""Options and flags about one batch size, and about files that are not written here."""
DESCRIPTION = "Measures how long the sequences of a dataset are, and predicts what each max_length costs."


def run(argv: Sequence[str], launch: Launch) -> int:
    """Run the subcommand and return its exit code."""
    arguments = parse(argv, "hf-bsopt lengths", DESCRIPTION)
    if not arguments.dataset.dataset:
        raise UsageError("no dataset was given: name one, for example --dataset train.jsonl")
    refuse(arguments, NOT_FOR_LENGTHS, "does not apply to lengths: hf-bsopt find --dataset takes it")
    silence_libraries(arguments.output.verbose)
    with progress.silent(arguments.output.quiet or not launch.is_main_process):
        lengths = measure_lengths(arguments)
    if not arguments.output.quiet:
        show(lengths)
    if arguments.output.json is not None and launch.is_main_process:
        text = json.dumps(lengths.to_dict(), indent=2, ensure_ascii=False)
        try:
            write_atomically(Path(arguments.output.json), text + "\n")
        except UsageError:
            if arguments.output.quiet:
                show(lengths)  # the file was to be the only output
            raise
    return FOUND


def measure_lengths(arguments: Arguments) -> LengthsReport:
    """Measure the lengths, and predict the batch sizes for a GPU.

    Raises UsageError for a CPU or a Mac, for which no batch sizes are predicted, and whatever :func:`dataset_lengths`
    raises.
    """
    device = arguments.options.device
    if device.device in ("cpu", "mps"):
        raise UsageError(f"--dataset compares batch sizes predicted for a GPU: leave out --device {device.device}")
    spec = choose_device(dataclasses.replace(device, device="predict")).spec
    options = arguments.options_at(arguments.max_lengths[0] if arguments.max_lengths else None)
    dataset = arguments.dataset
    return dataset_lengths(
        arguments.model.model or "",
        dataset.dataset,
        text_columns=dataset.text_column,
        tokenizer=dataset.tokenizer,
        split=dataset.split,
        max_rows=dataset.sample,
        options=dataclasses.replace(options, device=dataclasses.replace(device, gpu=spec)),
    )
