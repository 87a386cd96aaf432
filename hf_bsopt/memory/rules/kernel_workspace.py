"""Shared by the kernel rules: how they hold memory, and the arithmetic of their host code."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import Tensor

from ..replay.recording import Formula


class Workspace(Protocol):
    """``with workspace(*sizes)``: bytes held by a kernel inside the context, freed in reverse order like C++ locals."""

    def __call__(self, *sizes: int | Formula, freed_in_order: bool = False) -> AbstractContextManager[None]: ...


Run = Callable[[], Any]
KernelRule = Callable[..., Any]


def nbytes(tensor: Tensor) -> int:
    """Return the bytes of the tensor's elements."""
    return tensor.numel() * tensor.element_size()


def div_up(a: int, b: int) -> int:
    """Return a / b, rounded up."""
    return -(-a // b)


def round_up(a: int, b: int) -> int:
    """Return the smallest multiple of b that is at least a."""
    return div_up(a, b) * b
