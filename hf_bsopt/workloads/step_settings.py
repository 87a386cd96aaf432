"""How a step is trained: precision, optimizer, clipping."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch
    from torch import nn

Precision = Literal["fp16", "bf16", "fp32", "fp16-weights", "bf16-weights"]
PRECISIONS: dict[str, str] = {
    "fp16": "mixed precision, fp16 over the weights",
    "bf16": "mixed precision, bf16 over the weights",
    "fp32": "single precision",
    "fp16-weights": "weights, gradients and optimizer in fp16",
    "bf16-weights": "weights, gradients and optimizer in bf16",
}


@dataclass(frozen=True)
class StepSettings:
    """precision: Trainer's fp16 and bf16 are autocast over the weights; the others compute in the weights' dtype.
    optimizer: a name of ``TrainingArguments.optim``. max_grad_norm: 0 turns clipping off, as in Trainer.
    is_replicated: by DistributedDataParallel, whose buckets hold the gradients once more.
    """

    precision: Precision = "fp16"
    optimizer: str = "adamw_torch_fused"
    max_grad_norm: float = 1.0
    is_replicated: bool = False


@dataclass(frozen=True)
class OwnParts:
    """What of a training step is the user's own, and not Trainer's; None where it is Trainer's.

    compute_loss(forward, batch, items): the loss of a micro-batch, a single number that keeps its graph; ``items`` is
    the number of labels in the optimizer step. make_optimizer(model): for all that is trained.
    """

    compute_loss: Callable[[Callable[..., Any], dict[str, Any], Any], torch.Tensor] | None = None
    make_optimizer: Callable[[nn.Module], torch.optim.Optimizer] | None = None


TRAINERS = OwnParts()
"""Nothing of the step is the user's own."""
