"""The allocations and frees of a training step, in order, at any batch size.

Two recordings at neighbouring batch sizes make a :class:`Timeline`: the same blocks in the same order, each with a size
that is affine in the batch size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ...errors import NotLinearError
from ...records import GpuSpec, Peak
from .caching_allocator import BLOCK_BYTES, CachingAllocator, DeviceFull
from .glibc_malloc import HeapAllocator
from .recording import CATEGORIES, Formula, Recording

MODEL_CATEGORIES = CATEGORIES[:3]

A100_LIKE = GpuSpec(
    name="sm80 without a limit",
    total_bytes=None,
    compute_capability=80,
    multiprocessors=108,
    context_bytes=0,
    assumed="no device was given: compute capability 8.0 and unlimited memory",
)


@dataclass(frozen=True)
class ReplayResult:
    """Outcome of a replay: whether it fits, its peak (up to the failure if not) and the number of cache releases."""

    fits: bool
    peak: Peak
    retries: int


class Timeline:
    """Allocations and frees of several training steps; sizes are ``fixed + slope · batch_size`` bytes."""

    def __init__(
        self,
        smaller: Recording,
        larger: Recording,
        batch_sizes: tuple[int, int],
        *,
        device: GpuSpec = A100_LIKE,
        trace_on: Callable[[GpuSpec], Timeline] | None = None,
        is_valid_on: Callable[[GpuSpec], bool] | None = None,
    ) -> None:
        """Fit each block's size to two recordings made at ``batch_sizes``.

        ``device`` is the one that was traced for. ``trace_on`` traces the same step for another device, unless
        ``is_valid_on`` says that the same kernels run there. Raises NotLinearError if the recordings do not have the
        same blocks in the same order, or if a size is not affine.
        """
        self.device = device
        self._trace_on = trace_on
        self._is_valid_on = is_valid_on
        self._on_others: dict[tuple[str, int], Timeline] = {}
        if smaller.events != larger.events or smaller.origins != larger.origins:
            raise NotLinearError(_first_difference(smaller, larger, batch_sizes))
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
                line = tuple(_fit_line(a, b, low, high, smaller.origins[index]) for a, b in pairs)
                self._formulas.append((index, small.rule, line))
            elif isinstance(small, int) and isinstance(large, int):
                known = lines.get((small, large))
                if known is None:
                    known = lines[small, large] = _fit_line(small, large, low, high, smaller.origins[index])
                self._fixed[index], self._slope[index] = known
            else:
                raise NotLinearError(
                    f"{smaller.origins[index]} computes its memory by different rules at the two batch sizes"
                )

    def __len__(self) -> int:
        return len(self._events)

    @property
    def events(self) -> npt.NDArray[np.int64]:
        """Events in order: ``+n`` allocates block n, ``-n`` frees it; blocks are numbered from 1."""
        return self._events

    @functools.cached_property
    def _event_list(self) -> list[int]:
        return self._events.tolist()

    def on(self, device: GpuSpec) -> Timeline:
        """Return this timeline, or one traced for ``device`` if other kernels run there."""
        key = device.kind, device.compute_capability
        if key == (self.device.kind, self.device.compute_capability) or self._trace_on is None:
            return self
        if key not in self._on_others:
            for traced in (self, *self._on_others.values()):
                if traced._is_valid_on is not None and traced._is_valid_on(device):
                    self._on_others[key] = traced
                    break
            else:
                self._on_others[key] = self._trace_on(device)
        return self._on_others[key]

    def at(self, batch_size: int, device: GpuSpec | None = None) -> Timeline:
        """Return the timeline whose events are those of this batch size: itself."""
        return self if device is None else self.on(device)

    def verify(self, recording: Recording, batch_size: int) -> None:
        """Check the prediction against a recording at a third batch size. Raises NotLinearError if they differ."""
        if np.array(recording.events, dtype=np.int64).tolist() != self._events.tolist():
            raise NotLinearError(f"the step runs different operations at batch size {batch_size} than at smaller ones")
        predicted = self.sizes(batch_size, self.device).tolist()
        for block, size in enumerate(recording.sizes):
            recorded = size.rule(self.device, *size.arguments) if isinstance(size, Formula) else size
            if recorded != predicted[block]:
                raise NotLinearError(
                    f"the memory of {self.origins[block]} does not grow linearly with the batch size: {recorded} bytes "
                    f"at {batch_size}, but two smaller sizes predict {predicted[block]}"
                )

    def is_same_at(self, batch_size: int, other: Timeline) -> bool:
        """Return whether both have the same events, with the same sizes, at this batch size."""
        if not np.array_equal(self._events, other.events):
            return False
        return np.array_equal(self.sizes(batch_size, self.device), other.sizes(batch_size, self.device))

    def sizes(self, batch_size: int, device: GpuSpec | None = None) -> npt.NDArray[np.int64]:
        """Return the requested bytes of each block, in order of allocation."""
        device = device or self.device
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {batch_size}")
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
        """Return the peak bytes in live blocks, each rounded up to 512. The allocator's own count is higher: it
        includes the unused ends of blocks that it does not split.
        """
        device = device or self.device
        timeline = self.on(device)
        return int(timeline._running_total(timeline.sizes(batch_size, device)).max(initial=0))

    def model_bytes(self, device: GpuSpec | None = None) -> int:
        """Return the peak bytes of weights, gradients and optimizer state alone: no batch size, sequence length or
        attention implementation makes it less.
        """
        device = device or self.device
        timeline = self.on(device)
        counts = np.isin(timeline.categories, MODEL_CATEGORIES)
        return int(timeline._running_total(timeline.sizes(1, device) * counts).max(initial=0))

    def _running_total(self, sizes: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        rounded = -(-sizes // BLOCK_BYTES) * BLOCK_BYTES
        return np.cumsum(np.sign(self._events) * rounded[np.abs(self._events) - 1])

    def composition(self, batch_size: int, device: GpuSpec | None = None) -> dict[str, int]:
        """Return bytes by category at the peak of live bytes; they add up to :meth:`live_bytes`."""
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
        """Return the operation whose allocation reaches the peak of live bytes; empty if nothing was allocated."""
        device = device or self.device
        if self.on(device) is not self:
            return self.on(device).peak_origin(batch_size, device)
        if not len(self):
            return ""
        sizes = self.sizes(batch_size, device)
        event = int(self._events[int(np.argmax(self._running_total(sizes)))])
        return self.origins[abs(event) - 1]

    def requests(self, batch_size: int, device: GpuSpec | None = None) -> Iterator[tuple[int, int]]:
        """Yield (block, bytes) in order; 0 bytes is a free. Empty blocks are left out."""
        device = device or self.device
        timeline = self.on(device)
        sizes = timeline.sizes(batch_size, device).tolist()
        for event in timeline._events.tolist():
            size = sizes[abs(event) - 1]
            if size:
                yield (event, size) if event > 0 else (-event, 0)

    def replay(
        self, batch_size: int, device: GpuSpec | None = None, *, expandable_segments: bool = False
    ) -> ReplayResult:
        """Replay all steps through the allocator of ``device``: the caching allocator on a CUDA GPU, malloc on a CPU.

        The limit is the device's memory less its context. The allocator of Apple GPUs (MPS) is not modelled: there the
        peak is that of live bytes.
        """
        device = device or self.device
        limit = None if device.total_bytes is None else device.total_bytes - device.context_bytes
        if device.kind == "mps":
            live = self.live_bytes(batch_size, device)
            return ReplayResult(limit is None or live <= limit, Peak(live, live), 0)
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
            for event in timeline._event_list:  # as in requests(), without the cost of a generator
                if event > 0:
                    if sizes[event]:
                        allocate(event, sizes[event])
                elif sizes[-event]:
                    free(-event)
        except DeviceFull:
            return ReplayResult(False, Peak(allocator.peak_allocated, allocator.peak_reserved), allocator.retries)
        return ReplayResult(True, Peak(allocator.peak_allocated, allocator.peak_reserved), allocator.retries)

    def peak(self, batch_size: int, device: GpuSpec | None = None) -> Peak:
        """Return the peak bytes allocated and reserved, as ``torch.cuda.max_memory_allocated`` and
        ``max_memory_reserved`` would report them; on a CPU, reserved is resident memory.

        ``device`` gives the capacity, the compute capability and the workspaces. The default is the device of the
        trace: compute capability 8.0 and unlimited memory unless it was given another. If the steps do not fit, return
        the peak up to the allocation that failed.
        """
        return self.replay(batch_size, device).peak


def _fit_line(small: int, large: int, low: int, high: int, origin: str) -> tuple[int, int]:
    slope, rest = divmod(large - small, high - low)
    if rest:
        raise NotLinearError(f"the memory of {origin} does not grow linearly with the batch size")
    return small - slope * low, slope


def _first_difference(smaller: Recording, larger: Recording, batch_sizes: tuple[int, int]) -> str:
    low, high = batch_sizes
    for ours, theirs in zip(smaller.events, larger.events, strict=False):
        if ours != theirs or smaller.origins[abs(ours) - 1] != larger.origins[abs(theirs) - 1]:
            return (
                f"the step runs different operations at batch size {low} ({smaller.origins[abs(ours) - 1]}) and at "
                f"{high} ({larger.origins[abs(theirs) - 1]}); a prediction needs the same operations at every size"
            )
    return f"the step has {len(smaller.events)} events at batch size {low} and {len(larger.events)} at {high}"
