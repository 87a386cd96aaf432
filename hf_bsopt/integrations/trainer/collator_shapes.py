"""What a collator makes of a batch of any size: shapes that follow from two of its batches."""

from __future__ import annotations

import copy
import inspect
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...errors import TraceError, UsageError

if TYPE_CHECKING:
    import torch

SIZES = (2, 3)
"""From batches of these the shapes of all others follow."""
VERIFIED_SIZE = 5
WITHIN = ("data_collator", "collate_fn", "collator")
"""Where a collator keeps another one; Trainer's own, which removes columns, calls it by the first."""


@dataclass(frozen=True)
class Shape:
    """Of a tensor in a batch of n: ``fixed + each · n`` in every dimension."""

    fixed: tuple[int, ...]
    each: tuple[int, ...]
    dtype: torch.dtype

    def at(self, size: int, device: str) -> torch.Tensor:
        import torch

        sizes = tuple(fixed + each * size for fixed, each in zip(self.fixed, self.each, strict=True))
        return torch.zeros(sizes, dtype=self.dtype, device=device)


def shapes_of(batch_of: Callable[[int], Any]) -> Mapping[str, Any]:
    """What the tensors of a batch of any size look like. Raises TraceError where their sizes are no line in it."""
    smaller, larger = (batch_of(size) for size in SIZES)
    if not isinstance(smaller, Mapping):
        raise UsageError(
            f"the data collator makes a {type(smaller).__name__}: Trainer takes a dict of forward's arguments"
        )
    shapes: Mapping[str, Any] = _line(smaller, larger)
    if _sizes(made(shapes, VERIFIED_SIZE, "meta")) != _sizes(batch_of(VERIFIED_SIZE)):
        raise TraceError(
            f"what the data collator makes of {VERIFIED_SIZE} examples does not follow from what it makes of "
            f"{SIZES[0]} and {SIZES[1]}: its batches don't grow evenly with the batch size"
        )
    return shapes


def _line(smaller: Any, larger: Any) -> Any:
    if isinstance(smaller, Mapping):
        return {name: _line(smaller[name], larger[name]) for name in smaller}
    if not is_tensor(smaller):
        return smaller
    each = tuple((b - a) // (SIZES[1] - SIZES[0]) for a, b in zip(smaller.shape, larger.shape, strict=True))
    fixed = tuple(a - e * SIZES[0] for a, e in zip(smaller.shape, each, strict=True))
    return Shape(fixed, each, smaller.dtype)


def made(shapes: Any, size: int, device: str) -> Any:
    if isinstance(shapes, Mapping):
        return {name: made(part, size, device) for name, part in shapes.items()}
    return shapes.at(size, device) if isinstance(shapes, Shape) else shapes


def is_in_one_row(shapes: Any) -> bool:
    """Whether another dimension than the first grows with the batch."""
    if isinstance(shapes, Mapping):
        return any(is_in_one_row(part) for part in shapes.values())
    return isinstance(shapes, Shape) and any(shapes.each[1:])


def _sizes(batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return {name: _sizes(part) for name, part in batch.items()}
    return tuple(batch.shape) if is_tensor(batch) else None


def moved(batch: Any, device: str) -> Any:
    if isinstance(batch, Mapping):
        return {name: moved(part, device) for name, part in batch.items()}
    return batch.to(device) if is_tensor(batch) else batch


def with_own_generators(collate: Callable[..., Any]) -> Callable[..., Any]:
    """A copy of a collator, and of the one within it, that draws from generators of its own: those that it holds go on
    as if it had not been called. What is no object with attributes is taken as it is.
    """
    import numpy
    import torch

    if not hasattr(collate, "__dict__") or inspect.isroutine(collate) or isinstance(collate, torch.nn.Module):
        return collate
    try:
        copied = copy.copy(collate)
    except Exception:  # it has its reasons
        return collate
    for name, value in vars(collate).items():
        if isinstance(value, torch.Generator):
            vars(copied)[name] = value.clone_state()
        elif isinstance(value, (random.Random, numpy.random.Generator, numpy.random.RandomState)):
            vars(copied)[name] = copy.deepcopy(value)
        elif name in WITHIN and callable(value):
            vars(copied)[name] = with_own_generators(value)
    return copied


def is_tensor(value: object) -> bool:
    import torch

    return isinstance(value, torch.Tensor)
