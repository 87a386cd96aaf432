"""Record what a trace asks about its device: the trace is valid on any device with the same answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ...records import GpuSpec

DeviceQuery = Callable[..., Any]


class DeviceQueries:
    """Queries about a device, with the answers."""

    def __init__(self, device: GpuSpec) -> None:
        self.device = device
        self._answers: dict[tuple[DeviceQuery, tuple[Any, ...]], Any] = {}

    def __call__(self, query: DeviceQuery, *arguments: Any) -> Any:
        """Return ``query(device, *arguments)`` and record it. ``query`` must be pure and the arguments hashable."""
        key = query, arguments
        if key not in self._answers:
            self._answers[key] = query(self.device, *arguments)
        return self._answers[key]

    def has_same_answers(self, device: GpuSpec) -> bool:
        """Return whether ``device`` is of the same kind and gives the same answer to every recorded query."""
        return device.kind == self.device.kind and all(
            query(device, *arguments) == answer for (query, arguments), answer in self._answers.items()
        )
