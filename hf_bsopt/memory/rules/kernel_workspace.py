"""What the rules of kernels share: how they take memory, and the arithmetic of their host code."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import Tensor

from ..replay.timeline import Formula


class Scratch(Protocol):
    """``with scratch(*sizes)``: bytes that a kernel holds meanwhile; freed last first, as C++ frees its locals."""

    def __call__(self, *sizes: int | Formula, freed_in_order: bool = False) -> AbstractContextManager[None]: ...


Run = Callable[[], Any]
KernelRule = Callable[..., Any]


def nbytes(tensor: Tensor) -> int:
    """Bytes of the tensor's elements."""
    return tensor.numel() * tensor.element_size()


def div_up(a: int, b: int) -> int:
    """A / b, rounded up."""
    return -(-a // b)


def round_up(a: int, b: int) -> int:
    """The least multiple of b that is not under a."""
    return div_up(a, b) * b
