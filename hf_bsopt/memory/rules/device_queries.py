"""What a trace asks of its device. On another device that answers alike, the same trace holds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ...records import GpuSpec

Question = Callable[..., Any]


class Asked:
    """Questions about a device, and its answers."""

    def __init__(self, device: GpuSpec) -> None:
        self.device = device
        self._answers: dict[tuple[Question, tuple[Any, ...]], Any] = {}

    def __call__(self, question: Question, *arguments: Any) -> Any:
        """``question(device, *arguments)``, noted. The question is pure, and the arguments can be hashed."""
        key = question, arguments
        if key not in self._answers:
            self._answers[key] = question(self.device, *arguments)
        return self._answers[key]

    def answers_alike(self, device: GpuSpec) -> bool:
        """Whether that device is of the same kind and would have answered every question the same."""
        return device.kind == self.device.kind and all(
            question(device, *arguments) == answer for (question, arguments), answer in self._answers.items()
        )
