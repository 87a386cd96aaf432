"""What a training step allocates and frees, in order, at any batch size.

A :class:`Recording` is what one trace at one batch size saw. Two of them, at neighbouring batch sizes, make a
:class:`Timeline`: the same blocks in the same order, each with a size that is affine in the batch. Where a kernel takes
memory by a rule that is not affine (a reduction's staging buffer depends on the number of multiprocessors), the block
holds the rule and its arguments, which are affine.
"""

from __future__ import annotations

import functools
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from ...errors import TraceError
from ...records import GpuSpec, Peak
from .caching_allocator import BLOCK_BYTES, CachingAllocator, DeviceFull
from .glibc_malloc import HeapAllocator

CATEGORIES = ("weights", "gradients", "optimizer", "activations", "workspace")
MODEL_CATEGORIES = CATEGORIES[:3]

A100_LIKE = GpuSpec(
    name="sm80 without a limit",
    total_bytes=None,
    compute_capability=80,
    multiprocessors=108,
    context_bytes=0,
    assumed="no device was named: compute capability 8.0 and no limit of memory",
)


@dataclass(frozen=True)
class Formula:
    """A size that a kernel computes: ``rule(device, *arguments)`` in bytes."""

    rule: Callable[..., int]
    arguments: tuple[int, ...]


@dataclass
class Recording:
    """The events of one trace: ``+n`` is the birth of block n, ``-n`` its death, counted from 1.

    steps: events before each step. phases: the same for "forward", "backward" and "update", each time one begins.
    """

    events: array[int] = field(default_factory=lambda: array("q"))
    sizes: list[int | Formula] = field(default_factory=list)
    origins: list[str] = field(default_factory=list)
    categories: list[str] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    phases: list[tuple[int, str]] = field(default_factory=list)

    def birth(self, size: int | Formula, origin: str, category: str = "activations") -> int:
        self.sizes.append(size)
        self.origins.append(origin)
        self.categories.append(category)
        block = len(self.sizes)
        self.events.append(block)
        return block

    def death(self, block: int) -> None:
        self.events.append(-block)


@dataclass(frozen=True)
class Fit:
    """What the replay found: the peak so far, and whether it came to its end within the device's memory."""

    fits: bool
    peak: Peak
    retries: int


class Timeline:
    """Allocations and frees of a run of training steps; sizes are ``fixed + slope · batch`` bytes."""

    def __init__(
        self,
        smaller: Recording,
        larger: Recording,
        batch_sizes: tuple[int, int],
        *,
        device: GpuSpec = A100_LIKE,
        trace_on: Callable[[GpuSpec], Timeline] | None = None,
        holds_on: Callable[[GpuSpec], bool] | None = None,
    ) -> None:
        """``device`` is the one that was traced for; ``trace_on`` traces the same step for another, unless ``holds_on``
        says that the same kernels run there.

        Raises TraceError if the two recordings do not hold the same blocks in the same order.
        """
        self.device = device
        self._trace_on = trace_on
        self._holds_on = holds_on
        self._on_others: dict[tuple[str, int], Timeline] = {}
        if smaller.events != larger.events or smaller.origins != larger.origins:
            raise TraceError(_first_difference(smaller, larger, batch_sizes))
        low, high = batch_sizes
        self._events = np.array(smaller.events, dtype=np.int64)
        self.steps = tuple(smaller.steps)
        self.phases = tuple(smaller.phases)
        self.origins = smaller.origins
        self.categories = smaller.categories
        count = len(smaller.sizes)
        self._fixed = np.zeros(count, dtype=np.int64)
        self._slope = np.zeros(count, dtype=np.int64)
        self._formulas: list[tuple[int, Callable[..., int], tuple[tuple[int, int], ...]]] = []
        lines: dict[tuple[int, int], tuple[int, int]] = {}
        for index, (small, large) in enumerate(zip(smaller.sizes, larger.sizes, strict=True)):
            if isinstance(small, Formula) and isinstance(large, Formula):
                pairs = zip(small.arguments, large.arguments, strict=True)
                line = tuple(_line(a, b, low, high, smaller.origins[index]) for a, b in pairs)
                self._formulas.append((index, small.rule, line))
            elif isinstance(small, int) and isinstance(large, int):
                known = lines.get((small, large))
                if known is None:
                    known = lines[small, large] = _line(small, large, low, high, smaller.origins[index])
                self._fixed[index], self._slope[index] = known
            else:
                raise TraceError(f"{smaller.origins[index]} takes memory by different rules at the two batch sizes")

    def __len__(self) -> int:
        return len(self._events)

    @property
    def events(self) -> npt.NDArray[np.int64]:
        """In order: ``+n`` is the birth of block n, ``-n`` its death, counted from 1."""
        return self._events

    @functools.cached_property
    def _event_list(self) -> list[int]:
        return self._events.tolist()

    def on(self, device: GpuSpec) -> Timeline:
        """This step on that device: itself, or, where other kernels run there, a trace for it."""
        key = device.kind, device.compute_capability
        if key == (self.device.kind, self.device.compute_capability) or self._trace_on is None:
            return self
        if key not in self._on_others:
            for traced in (self, *self._on_others.values()):
                if traced._holds_on is not None and traced._holds_on(device):
                    self._on_others[key] = traced
                    break
            else:
                self._on_others[key] = self._trace_on(device)
        return self._on_others[key]

    def verify(self, recording: Recording, batch_size: int) -> None:
        """Raises TraceError unless this recording, at a third batch size, is what the line through two foretells."""
        if np.array(recording.events, dtype=np.int64).tolist() != self._events.tolist():
            raise TraceError(f"the step does other things at batch size {batch_size} than at smaller ones")
        foretold = self.sizes(batch_size, self.device).tolist()
        for block, size in enumerate(recording.sizes):
            seen = size.rule(self.device, *size.arguments) if isinstance(size, Formula) else size
            if seen != foretold[block]:
                raise TraceError(
                    f"the memory of {self.origins[block]} does not grow linearly with the batch size: {seen} bytes at "
                    f"{batch_size}, where two smaller sizes foretold {foretold[block]}"
                )

    def sizes(self, batch_size: int, device: GpuSpec | None = None) -> npt.NDArray[np.int64]:
        """Bytes asked for by each block, in order of birth."""
        device = device or self.device
        if batch_size < 1:
            raise ValueError(f"a batch size is at least 1, not {batch_size}")
        if self.on(device) is not self:
            return self.on(device).sizes(batch_size, device)
        sizes = self._fixed + self._slope * batch_size
        answers: dict[Any, int] = {}
        for index, rule, arguments in self._formulas:
            key = rule, arguments
            size = answers.get(key)
            if size is None:
                size = answers[key] = rule(device, *[fixed + slope * batch_size for fixed, slope in arguments])
            sizes[index] = size
        return sizes

    def live_bytes(self, batch_size: int, device: GpuSpec | None = None) -> int:
        """The peak of bytes in live blocks, each rounded up to 512: less than the allocator's own count, which adds
        the tails of blocks that it does not split.
        """
        device = device or self.device
        timeline = self.on(device)
        return int(timeline._running_total(timeline.sizes(batch_size, device)).max(initial=0))

    def model_bytes(self, device: GpuSpec | None = None) -> int:
        """The peak of bytes in weights, gradients and optimizer's state alone: no batch, length or kind of attention
        makes it less.
        """
        device = device or self.device
        timeline = self.on(device)
        counts = np.isin(timeline.categories, MODEL_CATEGORIES)
        return int(timeline._running_total(timeline.sizes(1, device) * counts).max(initial=0))

    def _running_total(self, sizes: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        rounded = -(-sizes // BLOCK_BYTES) * BLOCK_BYTES
        return np.cumsum(np.sign(self._events) * rounded[np.abs(self._events) - 1])

    def composition(self, batch_size: int, device: GpuSpec | None = None) -> dict[str, int]:
        """Bytes by category at the moment when most is live; their sum is :meth:`live_bytes`."""
        device = device or self.device
        if self.on(device) is not self:
            return self.on(device).composition(batch_size, device)
        parts = dict.fromkeys(CATEGORIES, 0)
        if not len(self):
            return parts
        sizes = -(-self.sizes(batch_size, device) // BLOCK_BYTES) * BLOCK_BYTES
        peak = int(np.argmax(self._running_total(sizes)))
        alive = np.zeros(len(sizes), dtype=bool)
        for event in self._events[: peak + 1].tolist():
            alive[abs(event) - 1] = event > 0
        for index in np.flatnonzero(alive).tolist():
            parts[self.categories[index]] += int(sizes[index])
        return parts

    def peak_origin(self, batch_size: int, device: GpuSpec | None = None) -> str:
        """The operation whose output made the peak of live bytes; empty where nothing was allocated."""
        device = device or self.device
        if self.on(device) is not self:
            return self.on(device).peak_origin(batch_size, device)
        if not len(self):
            return ""
        sizes = self.sizes(batch_size, device)
        event = int(self._events[int(np.argmax(self._running_total(sizes)))])
        return self.origins[abs(event) - 1]

    def requests(self, batch_size: int, device: GpuSpec | None = None) -> Iterator[tuple[int, int]]:
        """(block, bytes) in order: bytes above 0 is an allocation, 0 a free. Blocks of no bytes are left out."""
        device = device or self.device
        timeline = self.on(device)
        sizes = timeline.sizes(batch_size, device).tolist()
        for event in timeline._events.tolist():
            size = sizes[abs(event) - 1]
            if size:
                yield (event, size) if event > 0 else (-event, 0)

    def replay(self, batch_size: int, device: GpuSpec | None = None, *, expandable_segments: bool = False) -> Fit:
        """The whole run through the allocator of ``device``, whose memory less its context is the limit: the caching
        allocator of a card, malloc of a CPU. On a Mac's GPU, whose allocator is not replayed, what is live is what is
        taken.
        """
        device = device or self.device
        limit = None if device.total_bytes is None else device.total_bytes - device.context_bytes
        if device.kind == "mps":
            live = self.live_bytes(batch_size, device)
            return Fit(limit is None or live <= limit, Peak(live, live), 0)
        allocator: CachingAllocator | HeapAllocator
        if device.kind == "cpu":
            allocator = HeapAllocator(limit)
        else:
            allocator = CachingAllocator(
                limit, device_bytes=device.total_bytes, expandable_segments=expandable_segments
            )
        timeline = self.on(device)
        sizes = [0, *timeline.sizes(batch_size, device).tolist()]
        allocate, free = allocator.allocate, allocator.free
        try:
            for event in timeline._event_list:  # what requests() yields, with no generator between
                if event > 0:
                    if sizes[event]:
                        allocate(event, sizes[event])
                elif sizes[-event]:
                    free(-event)
        except DeviceFull:
            return Fit(False, Peak(allocator.peak_allocated, allocator.peak_reserved), allocator.retries)
        return Fit(True, Peak(allocator.peak_allocated, allocator.peak_reserved), allocator.retries)

    def peak(self, batch_size: int, device: GpuSpec | None = None) -> Peak:
        """Peak bytes allocated and reserved over the run, as ``torch.cuda.max_memory_allocated`` and
        ``max_memory_reserved`` would report them; on a CPU reserved is what is resident.

        ``device`` gives the capacity, the compute capability and the workspaces; without one, those of the trace:
        compute capability 8.0 and no limit unless it named another. Where the run does not fit, the peak up to the
        allocation that failed.
        """
        return self.replay(batch_size, device).peak


def _line(small: int, large: int, low: int, high: int, origin: str) -> tuple[int, int]:
    slope, rest = divmod(large - small, high - low)
    if rest:
        raise TraceError(f"the memory of {origin} does not grow linearly with the batch size")
    return small - slope * low, slope


def _first_difference(smaller: Recording, larger: Recording, batch_sizes: tuple[int, int]) -> str:
    low, high = batch_sizes
    for ours, theirs in zip(smaller.events, larger.events, strict=False):
        if ours != theirs or smaller.origins[abs(ours) - 1] != larger.origins[abs(theirs) - 1]:
            return (
                f"the step does other things at batch size {low} ({smaller.origins[abs(ours) - 1]}) than at {high} "
                f"({larger.origins[abs(theirs) - 1]}); a prediction needs the same operations at every size"
            )
    return f"the step has {len(smaller.events)} events at batch size {low} and {len(larger.events)} at {high}"
