"""The command's look at a dataset: how long its sequences are, before the batch size for one length is found."""

from __future__ import annotations

from ..datasets.length_report import LengthsReport, dataset_lengths
from ..errors import UsageError
from ..search.device_choice import memory_bytes, named_gpu
from .arguments import Arguments
from .table import training_of


def lengths_of(arguments: Arguments) -> LengthsReport:
    """Raises UsageError for a device for which no table is predicted, and what :func:`dataset_lengths` raises."""
    if arguments.device in ("cpu", "mps"):
        raise UsageError(f"--dataset compares batch sizes predicted for a GPU: leave out --device {arguments.device}")
    limit = None if arguments.memory is None else memory_bytes(arguments.memory)
    spec, _ = named_gpu(arguments.gpu, limit)
    return dataset_lengths(
        arguments.model or "",
        arguments.dataset,
        text_columns=arguments.text_column,
        tokenizer=arguments.tokenizer,
        split=arguments.split,
        most=arguments.sample,
        gpu=spec,
        max_length=arguments.max_length[0] if arguments.max_length else None,
        training=training_of(arguments),
        target=(arguments.target[0], arguments.target[1]),
        multiple_of=arguments.multiple_of,
        expandable_segments=arguments.expandable_segments,
    )
