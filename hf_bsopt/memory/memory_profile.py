"""Live memory over a training step, after each allocation and free, broken down by what it holds.

memory_profile(timeline, 48)  # MemoryProfile: bytes of weights, optimizer, gradients, activations, temporary
"""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt

from ..records import GpuSpec, MemoryProfile
from .replay.caching_allocator import BLOCK_BYTES
from .replay.timeline import Timeline

PARTS = ("weights", "optimizer", "gradients", "activations", "temporary")
PART_OF = {"weights": 0, "optimizer": 1, "gradients": 2, "activations": 3, "workspace": 4}
TEMPORARY = PARTS.index("temporary")
POINTS = 300


def memory_profile(
    timeline: Timeline, batch_size: int, device: GpuSpec | None = None, *, points: int = POINTS
) -> MemoryProfile:
    """Return the profile of the step with the highest peak, downsampled to at most ``points`` events; the peak is kept.

    At each event the parts add up to the bytes in live blocks, each rounded up to 512 as in Timeline.live_bytes.
    """
    timeline = timeline.at(batch_size, device or timeline.device)
    events = timeline.events
    if not len(events):
        return MemoryProfile(0, (), dict.fromkeys(PARTS, ()), 0, ())
    sizes = -(-timeline.sizes(batch_size, device) // BLOCK_BYTES) * BLOCK_BYTES
    blocks = np.abs(events) - 1
    change = np.sign(events) * sizes[blocks]
    total = np.cumsum(change)
    begin, end = _step_bounds(int(np.argmax(total)), timeline.steps, len(events))
    moments = begin + _downsample(total[begin:end], points)
    part = _parts(timeline, blocks)[blocks]
    parts = {
        name: tuple(np.cumsum(np.where(part == index, change, 0))[moments].tolist()) for index, name in enumerate(PARTS)
    }
    return MemoryProfile(
        length=end - begin,
        moments=tuple((moments - begin).tolist()),
        parts=parts,
        peak_at=int(np.argmax(total[moments])),
        phases=tuple((at - begin, name) for at, name in timeline.phases if begin <= at < end),
    )


def _step_bounds(event: int, steps: tuple[int, ...], length: int) -> tuple[int, int]:
    """Return (first event, last event + 1) of the step that contains ``event``; of the whole run without steps."""
    bounds = [*steps, length] if steps else [0, length]
    after = next((index for index, bound in enumerate(bounds) if bound > event), len(bounds) - 1)
    return (bounds[after - 1] if after else 0), bounds[after]


def _downsample(total: npt.NDArray[np.int64], points: int) -> npt.NDArray[np.int64]:
    """Return all indices, or the index of the maximum in each of ``points`` intervals."""
    if len(total) <= points:
        return np.arange(len(total))
    bounds = np.linspace(0, len(total), points + 1).astype(int).tolist()
    intervals = itertools.pairwise(bounds)
    return np.array([start + int(np.argmax(total[start:stop])) for start, stop in intervals])


def _parts(timeline: Timeline, blocks: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return each block's index in :data:`PARTS`. An activation freed in the pass that allocated it is temporary."""
    part = np.array([PART_OF[category] for category in timeline.categories])
    if not timeline.phases:
        return part
    is_allocation = timeline.events > 0
    allocated_in, freed_in = np.zeros(len(part), dtype=np.int64), np.full(len(part), -1)
    phases = np.searchsorted([at for at, _ in timeline.phases], np.arange(len(blocks)), side="right")
    allocated_in[blocks[is_allocation]] = phases[is_allocation]
    freed_in[blocks[~is_allocation]] = phases[~is_allocation]
    part[(part == PART_OF["activations"]) & (allocated_in == freed_in)] = TEMPORARY
    return part
