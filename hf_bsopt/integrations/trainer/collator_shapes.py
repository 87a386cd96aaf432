"""Shapes of a collator's batches of any size, inferred from two of its batches."""

from __future__ import annotations

import copy
import inspect
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...errors import REHEARSE, TraceError, UsageError

if TYPE_CHECKING:
    import torch

SIZES = (2, 3)
"""Batch sizes from which the shapes of all others are inferred."""
VERIFIED_SIZE = 5
INNER_COLLATORS = ("data_collator", "collate_fn", "collator")
"""Attributes that hold another collator; Trainer's own, which removes columns, uses the first."""


@dataclass(frozen=True)
class TensorShape:
    """TensorShape of a tensor in a batch of n examples: ``fixed + per_example · n`` in every dimension."""

    fixed: tuple[int, ...]
    per_example: tuple[int, ...]
    dtype: torch.dtype

    def at(self, size: int, device: str) -> torch.Tensor:
        import torch

        sizes = tuple(
            fixed + per_example * size for fixed, per_example in zip(self.fixed, self.per_example, strict=True)
        )
        return torch.zeros(sizes, dtype=self.dtype, device=device)


def infer_shapes(batch_of: Callable[[int], Any], trainer: str = "Trainer") -> Mapping[str, Any]:
    """Return the shapes of the tensors in a batch of any size. Raise TraceError if they are not linear in the size.

    ``trainer``: its name, for the message.
    """
    smaller, larger = (batch_of(size) for size in SIZES)
    if not isinstance(smaller, Mapping):
        raise UsageError(
            f"the data collator of this {trainer} returns a {type(smaller).__name__}, not a dict of tensors, so that "
            f"the shapes of the inputs of the model are not known before it trains. {REHEARSE}"
        )
    shapes: Mapping[str, Any] = _linear(smaller, larger)
    if _sizes(build_batch(shapes, VERIFIED_SIZE, "meta")) != _sizes(batch_of(VERIFIED_SIZE)):
        raise TraceError(
            f"the shapes that the data collator returns for {VERIFIED_SIZE} examples do not follow from those for "
            f"{SIZES[0]} and {SIZES[1]}: its batches do not grow linearly with the batch size"
        )
    return shapes


def _linear(smaller: Any, larger: Any) -> Any:
    if isinstance(smaller, Mapping):
        return {name: _linear(smaller[name], larger[name]) for name in smaller}
    if not is_tensor(smaller):
        return smaller
    per_example = tuple((b - a) // (SIZES[1] - SIZES[0]) for a, b in zip(smaller.shape, larger.shape, strict=True))
    fixed = tuple(a - e * SIZES[0] for a, e in zip(smaller.shape, per_example, strict=True))
    return TensorShape(fixed, per_example, smaller.dtype)


def build_batch(shapes: Any, size: int, device: str) -> Any:
    if isinstance(shapes, Mapping):
        return {name: build_batch(part, size, device) for name, part in shapes.items()}
    return shapes.at(size, device) if isinstance(shapes, TensorShape) else shapes


def is_in_one_row(shapes: Any) -> bool:
    """Return whether a dimension other than the first grows with the batch size."""
    if isinstance(shapes, Mapping):
        return any(is_in_one_row(part) for part in shapes.values())
    return isinstance(shapes, TensorShape) and any(shapes.per_example[1:])


def _sizes(batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return {name: _sizes(part) for name, part in batch.items()}
    return tuple(batch.shape) if is_tensor(batch) else None


def move_batch(batch: Any, device: str) -> Any:
    if isinstance(batch, Mapping):
        return {name: move_batch(part, device) for name, part in batch.items()}
    return batch.to(device) if is_tensor(batch) else batch


def with_own_generators(collate: Callable[..., Any]) -> Callable[..., Any]:
    """Copy a collator, and the one inside it, with generators of its own, so that those it holds continue as if it had
    not been called. An object without attributes is returned as it is.
    """
    import numpy
    import torch

    if not hasattr(collate, "__dict__") or inspect.isroutine(collate) or isinstance(collate, torch.nn.Module):
        return collate
    try:
        copied = copy.copy(collate)
    except Exception:  # its own __copy__ may raise anything
        return collate
    for name, value in vars(collate).items():
        if isinstance(value, torch.Generator):
            vars(copied)[name] = value.clone_state()
        elif isinstance(value, (random.Random, numpy.random.Generator, numpy.random.RandomState)):
            vars(copied)[name] = copy.deepcopy(value)
        elif name in INNER_COLLATORS and callable(value):
            vars(copied)[name] = with_own_generators(value)
    return copied


def is_tensor(value: object) -> bool:
    import torch

    return isinstance(value, torch.Tensor)
