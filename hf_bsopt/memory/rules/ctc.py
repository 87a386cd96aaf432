"""CTC's loss, for which PyTorch has no shape functions, and the selection of the labels that are not padding.

aten/src/ATen/native/cuda/LossCTC.cu (pytorch 2.11): the forward pass keeps log alpha, [batch, time, 2 · labels + 1];
the backward pass has log beta of the same size and, for a large batch, the sums over blanks besides. How many labels a
sequence has is a value of the data: the worst case is that none of them is padding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...records import GpuSpec
from ..replay.recording import Formula
from .kernel_workspace import Run, Workspace


def select_all(tensor: Tensor, mask: Tensor) -> Tensor:
    """Return the shape of ``masked_select`` with a mask that is true everywhere."""
    shape = torch.broadcast_shapes(tensor.shape, mask.shape)
    return tensor.new_empty((shape.numel(),))


def forward(
    log_probs: Tensor, targets: Tensor, input_lengths: Any, target_lengths: Any, blank: int = 0, zero: bool = False
) -> tuple[Tensor, Tensor]:
    """Return (losses [batch], log alpha) for log probabilities of shape [time, batch, classes]."""
    return log_probs.new_empty((log_probs.size(1),)), log_probs.new_empty(_alpha_shape(log_probs, targets))


def backward(grad: Tensor, log_probs: Tensor, *_: Any) -> Tensor:
    """Return the shape of the gradient of the log probabilities."""
    return torch.empty_like(log_probs, memory_format=torch.legacy_contiguous_format)


def backward_workspace(
    workspace: Workspace, run: Run, grad: Tensor, log_probs: Tensor, targets: Tensor, *_: Any, **__: Any
) -> Any:
    """Hold log beta, which is allocated before the gradient, and what a large batch needs after it."""
    shape = _alpha_shape(log_probs, targets)
    blanks = Formula(blank_sum_bytes, (*shape, log_probs.size(2), log_probs.element_size()))
    with workspace(torch.Size(shape).numel() * log_probs.element_size()):
        output = run()
        with workspace(blanks):
            return output


def blank_sum_bytes(device: GpuSpec, batch: int, time: int, columns: int, classes: int, element: int) -> int:
    """Return the bytes of alpha + beta at the blanks and of its logsumexp, which only a large batch computes apart."""
    is_large = 2 * time + 24 * batch // 10 + 2 * classes // 10 > 450
    return element * batch * time * (columns + 3) if is_large else 0


def _alpha_shape(log_probs: Tensor, targets: Tensor) -> tuple[int, int, int]:
    time, batch = log_probs.size(0), log_probs.size(1)
    labels = targets.size(1) if targets.dim() == 2 else targets.numel() // max(batch, 1)
    return batch, time, 2 * labels + 1


META_KERNELS: dict[str, Any] = {
    "masked_select": select_all,
    "_ctc_loss.Tensor": forward,
    "_ctc_loss_backward.Tensor": backward,
}
