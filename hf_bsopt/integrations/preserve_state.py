"""What a search must not change in the process of a training: its random numbers, and the card that it will need."""

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
class RandomNumbers:
    """The state of every generator that a training draws from: Python's, NumPy's, PyTorch's on each device in use."""

    python: Any
    arrays: Any
    host: torch.Tensor
    cards: list[torch.Tensor] | None
    metal: torch.Tensor | None

    @classmethod
    def now(cls) -> RandomNumbers:
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
        numpy.random.set_state(self.arrays)
        torch.set_rng_state(self.host)
        if self.cards is not None:
            torch.cuda.set_rng_state_all(self.cards)
        if self.metal is not None:
            torch.mps.set_rng_state(self.metal)


@contextlib.contextmanager
def same_random_numbers() -> Iterator[None]:
    """Afterwards all generators go on as if nobody had asked for anything between."""
    before = RandomNumbers.now()
    try:
        yield
    finally:
        before.restore()


@contextlib.contextmanager
def off_the_card(model: nn.Module, device: torch.device) -> Iterator[None]:
    """While it lasts, the weights of ``model`` are on the host, where they are whole on one CUDA card: the probes need
    the room. They come back as the same parameters with the same values. Quantized weights stay where they are.
    """
    import torch

    tensors = [*model.parameters(), *model.buffers()]
    is_whole = all(tensor.device == device for tensor in tensors)
    is_placed = any(hasattr(module, "_hf_hook") for module in model.modules())  # by accelerate, which moves it itself
    is_movable = is_whole and not is_placed and not _is_quantized(model)
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
