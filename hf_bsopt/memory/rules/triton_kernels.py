"""Triton kernels of libraries that a traced step calls: as on the GPU, and not launched.

A library that has a kernel asks whether the device is a GPU, and computes with operations of PyTorch otherwise, which
need more memory. Triton need not be installed where the step is traced. What a kernel writes into is allocated by its
caller.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch

from ..._utils.known_values import make_unknown
from .kernel_workspace import div_up

KERNELS = {"trl.kernels.chunked_logprob": ("_forward_kernel", "_backward_kernel")}
"""trl's fused head (1.16)."""
QUESTIONS = {
    "_use_triton": ("trl.kernels.chunked_logprob", "trl.trainer.utils", "trl.trainer.distillation_trainer"),
}
"""Functions that answer whether a kernel runs on a device, and the modules that have their names."""


def replacements() -> Iterator[tuple[Any, str, Any]]:
    """Yield (module, name, replacement) of what the imported libraries have."""
    for place, names in KERNELS.items():
        module = sys.modules.get(place)
        if module is None:
            continue
        for name in names:
            if hasattr(module, name):
                yield module, name, _NotLaunched()
        if not hasattr(module, "triton"):
            yield module, "triton", SimpleNamespace(cdiv=div_up)
        if hasattr(module, "_addmm_fp32"):
            yield module, "_addmm_fp32", _add_product
    for name, places in QUESTIONS.items():
        for place in places:
            module = sys.modules.get(place)
            if module is not None and hasattr(module, name):
                yield module, name, lambda device: True


class _NotLaunched:
    """A kernel: ``kernel[grid](...)`` does nothing, and what it may have written is unknown."""

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *args, **kwargs: make_unknown((*args, *kwargs.values()))


def _add_product(total: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> None:
    """Add a product to fp32 sums as cuBLAS does, which takes fp16 and bf16 without a copy (chunked_logprob.py,
    _addmm_fp32).
    """
    if first.dtype in (torch.float16, torch.bfloat16):
        total.add_(0)
    else:
        total.addmm_(first, second)
