"""``hf-bsopt table``: several models, lengths or GPUs, one table of batch sizes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from .._utils import progress
from .._utils.files import write_atomically
from .._utils.terminal import show
from ..errors import UsageError
from ..parallel.launch import Launch
from ..tables.table import batch_size_table
from ..tables.text import FORMATS
from .arguments import Arguments, parse, refuse
from .exit_codes import FOUND, NOTHING_FITS
from .quiet import silence_libraries

DESCRIPTION = "Predicts the batch sizes of several models, lengths and GPUs, in one table."
FOR_ONE_ANSWER = frozenset(
    [
        "advise",
        "base_batch_size",
        "batch_size",
        "check",
        "check_evaluation",
        "dataset",
        "dataset_size",
        "dry_run",
        "effective_batch_size",
        "generate",
        "gradient_accumulation_steps",
        "html",
        "key",
        "learning_rate",
        "lr_scaling",
        "max_attempts",
        "num_processes",
        "patch",
        "plot",
        "pretrained",
        "probe_timeout",
        "sample",
        "split",
        "text_column",
        "throughput",
        "tokenizer",
        "torch_compile",
        "total_tokens",
        "training_args",
        "trust_cache",
        "use_liger_kernel",
        "verify_evaluation",
    ]
)
"""Options and flags about one model on one GPU, or about real steps."""


def run(argv: Sequence[str], launch: Launch) -> int:
    """Run the subcommand and return its exit code."""
    arguments = parse(argv, "hf-bsopt table", DESCRIPTION)
    silence_libraries(arguments.output.verbose)
    with progress.silent(arguments.output.quiet or not launch.is_main_process):
        return FOUND if print_table(arguments) else NOTHING_FITS


def print_table(arguments: Arguments) -> bool:
    """Print the table; return whether there is a size in it. Raises UsageError for flags that a table does not take."""
    _check(arguments)
    gpu = arguments.options.device.gpu
    frame = batch_size_table(
        arguments.table.models or [arguments.model.model or ""],
        arguments.table.gpus or ([gpu] if gpu else []),
        arguments.max_lengths,
        options=arguments.options,
    )
    show(FORMATS[arguments.table.format](frame))
    if arguments.output.json is not None:
        rows = frame.astype(object).where(frame.notna(), None).to_dict("records")
        text = json.dumps({"version": 1, **frame.attrs, "table": rows}, indent=2, ensure_ascii=False)
        write_atomically(Path(arguments.output.json), text + "\n")
    return bool(frame["optimal"].notna().any())


def _check(arguments: Arguments) -> None:
    table, device = arguments.table, arguments.options.device
    if table.format not in FORMATS:
        raise UsageError(f"--format {table.format} is not one of {', '.join(FORMATS)}")
    if table.models and arguments.model.model:
        raise UsageError("--model and --models are one and several; give one of them")
    if table.gpus and device.gpu:
        raise UsageError("--gpu and --gpus are one and several; give one of them")
    if device.device not in ("auto", "predict"):
        raise UsageError(f"a table is predicted: --device {device.device} goes with one --model and one GPU")
    if arguments.model.training_args is not None:
        raise UsageError("--training_args is about one training: in a table, name precision, optimizer and the like")
    refuse(arguments, FOR_ONE_ANSWER, "is about one model on one GPU, and does not apply to a table")
