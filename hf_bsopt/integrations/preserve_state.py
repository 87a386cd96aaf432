"""Keeps the random state of a training process unchanged during a search, and frees the GPU that the search needs."""

from __future__ import annotations

import contextlib
import gc
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True)
class RandomState:
    """State of every generator that a training draws from: Python's, NumPy's, and PyTorch's on each device in use."""

    python: Any
    numpy: Any
    cpu: torch.Tensor
    cuda: list[torch.Tensor] | None
    mps: torch.Tensor | None

    @classmethod
    def capture(cls) -> RandomState:
        import numpy
        import torch

        return cls(
            random.getstate(),
            numpy.random.get_state(),
            torch.get_rng_state(),
            torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None,
            torch.mps.get_rng_state() if torch.backends.mps.is_available() else None,
        )

    def restore(self) -> None:
        import numpy
        import torch

        random.setstate(self.python)
        numpy.random.set_state(self.numpy)
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state_all(self.cuda)
        if self.mps is not None:
            torch.mps.set_rng_state(self.mps)


@contextlib.contextmanager
def preserve_random_state() -> Iterator[None]:
    """Restore all random generators on exit, as if nothing had been drawn in between."""
    before = RandomState.capture()
    try:
        yield
    finally:
        before.restore()


@contextlib.contextmanager
def model_on_host(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Keep the weights of ``model`` on the host inside the context if all of them are on one CUDA device, because the
    probes need the memory. The same parameters return with the same values. Quantized weights stay where they are.
    """
    import torch

    tensors = [*model.parameters(), *model.buffers()]
    is_on_device = all(tensor.device == device for tensor in tensors)
    is_dispatched = any(hasattr(module, "_hf_hook") for module in model.modules())  # accelerate moves it itself
    is_movable = is_on_device and not is_dispatched and not _is_quantized(model)
    if device.type != "cuda" or not is_movable:
        yield
        return
    model.to("cpu")
    gc.collect()
    torch.cuda.empty_cache()
    try:
        yield
    finally:
        model.to(device)


def _is_quantized(model: nn.Module) -> bool:
    return any(hasattr(parameter, "quant_state") for parameter in model.parameters()) or bool(
        getattr(model, "is_quantized", False)
    )
