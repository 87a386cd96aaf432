"""The result of one trace at one batch size: which blocks are allocated and freed, and in which order.

When a kernel's size is not affine in the batch size (a reduction's staging buffer depends on the number of
multiprocessors), the block keeps the kernel's formula and its arguments, which are affine.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import dataclass, field

CATEGORIES = ("weights", "gradients", "optimizer", "activations", "workspace")


@dataclass(frozen=True)
class Formula:
    """A size computed by a kernel's own rule: ``rule(device, *arguments)`` bytes."""

    rule: Callable[..., int]
    arguments: tuple[int, ...]


@dataclass
class Recording:
    """The events of one trace: ``+n`` allocates block n, ``-n`` frees it; blocks are numbered from 1.

    steps: the number of events before each step. phases: the number of events before each phase, and its name:
    "forward", "backward" or "optimizer_step".
    """

    events: array[int] = field(default_factory=lambda: array("q"))
    sizes: list[int | Formula] = field(default_factory=list)
    origins: list[str] = field(default_factory=list)
    categories: list[str] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    phases: list[tuple[int, str]] = field(default_factory=list)

    def allocate(self, size: int | Formula, origin: str, category: str = "activations") -> int:
        """Append an allocation and return the block's number."""
        self.sizes.append(size)
        self.origins.append(origin)
        self.categories.append(category)
        block = len(self.sizes)
        self.events.append(block)
        return block

    def free(self, block: int) -> None:
        """Append the free of ``block``."""
        self.events.append(-block)
