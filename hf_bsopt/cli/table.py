"""The command's table: several models or GPUs, one table of batch sizes."""

from __future__ import annotations

import json
from dataclasses import MISSING, fields
from pathlib import Path

from .._utils.files import write_atomically
from ..errors import UsageError
from ..tables.table import Training, batch_size_table
from ..tables.text import FORMATS
from .arguments import Arguments

ASKED = ("model", "models", "gpu", "gpus", "max_length", "format", "json", "verbose", "quiet", "device", "cache")
TRAINING = (*(field.name for field in fields(Training)), "fp16", "bf16")
CHOICE = ("target", "multiple_of", "expandable_segments", "evaluation", "packing")


def print_table(arguments: Arguments) -> bool:
    """Prints the table; whether there is a size in it. Raises UsageError for a flag that answers for one model only."""
    _check(arguments)
    frame = batch_size_table(
        arguments.models or [arguments.model or ""],
        arguments.gpus or ([arguments.gpu] if arguments.gpu else []),
        arguments.max_length,
        training=training_of(arguments),
        target=(arguments.target[0], arguments.target[1]),
        multiple_of=arguments.multiple_of,
        expandable_segments=arguments.expandable_segments,
    )
    print(FORMATS[arguments.format](frame))
    if arguments.json is not None:
        rows = frame.astype(object).where(frame.notna(), None).to_dict("records")
        text = json.dumps({"version": 1, **frame.attrs, "table": rows}, indent=2, ensure_ascii=False)
        write_atomically(Path(arguments.json), text + "\n")
    return bool(frame["optimal"].notna().any())


def training_of(arguments: Arguments) -> Training:
    """How it is trained, as far as the flags say."""
    return Training(
        task=arguments.task,
        precision=arguments.precision,
        weights_dtype=arguments.weights_dtype,
        optimizer=arguments.optimizer,
        attention=arguments.attention,
        activation_checkpointing=arguments.activation_checkpointing,
        lora_r=arguments.lora_r,
        lora_targets=tuple(arguments.lora_targets) or None,
        load_in_4bit=arguments.load_in_4bit,
        num_labels=arguments.num_labels,
        trust_remote_code=arguments.trust_remote_code,
    )


def _check(arguments: Arguments) -> None:
    if arguments.format not in FORMATS:
        raise UsageError(f"--format {arguments.format} is not one of {', '.join(FORMATS)}")
    if arguments.models and arguments.model:
        raise UsageError("--model and --models are one and several; give one of them")
    if arguments.gpus and arguments.gpu:
        raise UsageError("--gpu and --gpus are one and several; give one of them")
    if arguments.device not in ("auto", "predict"):
        raise UsageError(f"a table is predicted: --device {arguments.device} goes with one --model and one GPU")
    if arguments.training_args is not None:
        raise UsageError("--training_args tells of one training: in a table, name precision, optimizer and the like")
    for field in fields(Arguments):
        default = field.default_factory() if field.default_factory is not MISSING else field.default
        if field.name not in (*ASKED, *TRAINING, *CHOICE) and getattr(arguments, field.name) != default:
            raise UsageError(f"--{field.name} answers for one model on one GPU, and not in a table")
