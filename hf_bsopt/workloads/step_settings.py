"""Settings of a training step: precision, optimizer, gradient clipping, and the parts that the user overrides."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast

from .checks import check_choice

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
OF_DTYPE = {"float16": "fp16", "half": "fp16", "bfloat16": "bf16", "float32": "fp32", "float": "fp32", "no": "fp32"}
"""Mixed precision by the name of its dtype, for those who pass ``torch.float16``; accelerate's ``no`` is fp32."""


def precision_name(requested: str) -> Precision:
    """Return the precision that is meant. Raises UsageError with the nearest."""
    name = OF_DTYPE.get(requested, requested)
    check_choice("precision", name, tuple(PRECISIONS))
    return cast("Precision", name)


@dataclass(frozen=True)
class StepSettings:
    """Precision, optimizer and clipping of a training step, and whether the model is replicated.

    precision: Trainer's fp16 and bf16 are autocast over the weights; the others compute in the weights' dtype.
    optimizer: a name of ``TrainingArguments.optim``. max_grad_norm: 0 turns clipping off, as in Trainer.
    is_replicated: True under DistributedDataParallel, whose buckets hold a second copy of the gradients.
    """

    precision: Precision = "fp16"
    optimizer: str = "adamw_torch_fused"
    max_grad_norm: float = 1.0
    is_replicated: bool = False


class OwnStep(Protocol):
    """A forward and backward pass of the user's. modules: those on the device besides the model."""

    @property
    def modules(self) -> Sequence[nn.Module]: ...
    def count_items(self, batches: Sequence[Mapping[str, Any]]) -> Any:
        """Return the number of labels in an optimizer step, or None."""
        ...

    def forward_backward(self, batch: Mapping[str, Any], items: Any, accumulation: int) -> torch.Tensor:
        """Run forward and backward pass of a micro-batch. Return the loss without its graph."""
        ...

    def evaluate(self, batch: Mapping[str, Any]) -> Any:
        """Run an evaluation step. Return what is kept for the metrics."""
        ...


@dataclass(frozen=True)
class StepOverrides:
    """Parts of the training step that replace Trainer's; None keeps Trainer's.

    compute_loss(forward, batch, items): returns the loss of a micro-batch, a scalar that keeps its graph; ``items`` is
    the number of labels in the optimizer step. make_optimizer(model): returns the optimizer of all trained parameters.
    begin_own_step(model, optimizer, scaler, device_type): prepares a step that replaces forward and backward pass.
    """

    compute_loss: Callable[[Callable[..., Any], dict[str, Any], Any], torch.Tensor] | None = None
    make_optimizer: Callable[[nn.Module], torch.optim.Optimizer] | None = None
    begin_own_step: Callable[[nn.Module, torch.optim.Optimizer, torch.amp.GradScaler, str], OwnStep] | None = None


NO_OVERRIDES = StepOverrides()
