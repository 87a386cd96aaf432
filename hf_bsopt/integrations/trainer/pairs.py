"""Losses over the pairs in a batch: with accumulation, each example meets fewer others.

sentence-transformers' MultipleNegativesRankingLoss and CLIP take the other examples of the micro-batch as negatives.
Gradient accumulation then is another training, whatever its effective batch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from ...memory.replay.timeline import A100_LIKE
from ...memory.rules.cuda_dispatch import as_device
from ...memory.tracing.recorder import Recorder
from ...workloads.meta_device import META
from ...workloads.trainable import Trainable
from ...workloads.training_step import TrainingStep
from .collator_shapes import is_in_one_row

BATCH_SIZES = (5, 7)


def is_over_pairs(workload: Trainable) -> bool:
    """Return whether the step computes something for each pair of examples: a tensor two of whose dimensions grow with
    the batch. False if the step cannot be followed, or its sequences are in one row.
    """
    if is_in_one_row(getattr(workload, "shapes", {})):
        return False
    try:
        smaller, larger = (_shapes(workload, size) for size in BATCH_SIZES)
    except Exception:  # the user's code may raise anything; the search itself reports it
        return False
    pairs = zip(smaller, larger, strict=False)
    return len(smaller) == len(larger) and any(
        len(a) == len(b) and sum(x != y for x, y in zip(a, b, strict=True)) > 1 for a, b in pairs
    )


def advice(micro_batch: int, before: int) -> str:
    """Return the sentence for a report whose micro-batch is smaller than the one that was asked for."""
    return (
        f"The loss is over the pairs in a micro-batch: accumulation does not give it back what {before} sequences at "
        f"once have ({micro_batch - 1} others for each instead of {before - 1}). A loss that caches embeddings "
        f"(CachedMultipleNegativesRankingLoss), activation checkpointing or a larger GPU keeps the batch whole."
    )


def _shapes(workload: Trainable, batch_size: int) -> list[torch.Size]:
    model = workload.build()
    shapes = _Shapes()
    with as_device(A100_LIKE), META, shapes:
        TrainingStep(model, workload.settings, overrides=workload.overrides)([workload.batch(batch_size, "meta")])
    return shapes.seen


class _Shapes(Recorder):
    """Follows a step like a prediction and keeps the shapes of what its forward pass computes."""

    def __init__(self) -> None:
        super().__init__(A100_LIKE)
        self.seen: list[torch.Size] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = super().__torch_dispatch__(func, types, args, kwargs)
        if torch._C._current_autograd_node() is None:
            self.seen += [
                part.shape
                for part in tree_leaves(output)
                if isinstance(part, torch.Tensor) and part.is_floating_point() and part.dim() > 1
            ]
        return output
