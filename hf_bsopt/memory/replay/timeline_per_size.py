"""A timeline for steps that run other operations at other batch sizes: each size in question is traced.

Models that loop over the images of a batch do this. Everything else is traced twice (timeline.py).
"""

from __future__ import annotations

from collections.abc import Callable

from ...records import GpuSpec
from .recording import Recording
from .timeline import Timeline


class TimelinePerSize(Timeline):
    """A timeline whose events depend on the batch size. Its own events are those of the smallest size."""

    def __init__(
        self,
        record: Callable[[int], Recording],
        smallest: int,
        *,
        device: GpuSpec,
        trace_on: Callable[[GpuSpec], Timeline],
        is_valid_on: Callable[[GpuSpec], bool],
    ) -> None:
        """Trace ``smallest`` sequences. ``record`` traces a batch size; the others are as of :class:`Timeline`."""
        self._record = record
        first = record(smallest)
        super().__init__(
            first, first, (smallest, smallest + 1), device=device, trace_on=trace_on, is_valid_on=is_valid_on
        )
        self._traced: dict[int, Timeline] = {smallest: self._of(first, smallest)}

    def _of(self, recording: Recording, batch_size: int) -> Timeline:
        return Timeline(recording, recording, (batch_size, batch_size + 1), device=self.device)

    def at(self, batch_size: int) -> Timeline:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {batch_size}")
        if batch_size not in self._traced:
            self._traced[batch_size] = self._of(self._record(batch_size), batch_size)
        return self._traced[batch_size]

    def verify(self, recording: Recording, batch_size: int) -> None:
        """Do nothing: no size is inferred from others."""
