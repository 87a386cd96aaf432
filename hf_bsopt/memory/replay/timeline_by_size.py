"""A step that is not the same operations at every batch size, or whose memory does not grow linearly: traced at each
size that is asked for.

Losses in chunks, sequences packed into one row and experts are such steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

from ...records import GpuSpec, Peak
from .recording import Recording
from .timeline import ReplayResult, Timeline


class TimelineBySize(Timeline):
    """As a :class:`Timeline`, with a recording of its own for each batch size."""

    def __init__(self, record: Callable[[int, GpuSpec], Recording], device: GpuSpec) -> None:
        """Trace nothing yet. ``record(batch_size, device)`` traces the step."""
        self.device = device
        self._record = record
        self._recorded: dict[tuple[int, str, int], Timeline] = {}

    def at(self, batch_size: int, device: GpuSpec | None = None) -> Timeline:
        """Return the timeline of this batch size."""
        device = device or self.device
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {batch_size}")
        key = batch_size, device.kind, device.compute_capability
        if key not in self._recorded:
            recording = self._record(batch_size, device)
            self._recorded[key] = Timeline(recording, recording, (batch_size, batch_size + 1), device=device)
        return self._recorded[key]

    def __len__(self) -> int:
        return len(self.at(1))

    @property
    def events(self) -> npt.NDArray[np.int64]:
        """Events at batch size 1."""
        return self.at(1).events

    def on(self, device: GpuSpec) -> Timeline:
        """Return the same timeline: each size is traced for the device that is asked for."""
        return self

    def sizes(self, batch_size: int, device: GpuSpec | None = None) -> npt.NDArray[np.int64]:
        return self.at(batch_size, device).sizes(batch_size, device)

    def live_bytes(self, batch_size: int, device: GpuSpec | None = None) -> int:
        return self.at(batch_size, device).live_bytes(batch_size, device)

    def model_bytes(self, device: GpuSpec | None = None) -> int:
        return self.at(1, device).model_bytes(device)

    def composition(self, batch_size: int, device: GpuSpec | None = None) -> dict[str, int]:
        return self.at(batch_size, device).composition(batch_size, device)

    def peak_origin(self, batch_size: int, device: GpuSpec | None = None) -> str:
        return self.at(batch_size, device).peak_origin(batch_size, device)

    def requests(self, batch_size: int, device: GpuSpec | None = None) -> Iterator[tuple[int, int]]:
        return self.at(batch_size, device).requests(batch_size, device)

    def replay(
        self, batch_size: int, device: GpuSpec | None = None, *, expandable_segments: bool = False
    ) -> ReplayResult:
        timeline = self.at(batch_size, device)
        return timeline.replay(batch_size, device, expandable_segments=expandable_segments)

    def peak(self, batch_size: int, device: GpuSpec | None = None) -> Peak:
        return self.replay(batch_size, device).peak
