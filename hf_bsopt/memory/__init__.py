"""Predicts the memory of a training step, without a device: ``trace(build, step).peak(batch_size, device)``."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .predictor import Predictor
    from .timeline import Timeline
    from .tracing import trace

__all__ = ["Predictor", "Timeline", "trace"]

_ROOMS = {"Predictor": "predictor", "Timeline": "timeline", "trace": "tracing"}


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return getattr(importlib.import_module(f".{_ROOMS[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
