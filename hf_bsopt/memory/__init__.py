"""Predict the memory of a training step without a GPU. Start with ``trace`` or ``Predictor``.

trace(build, step).peak(batch_size, device)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._utils.lazy_names import lazy_names

if TYPE_CHECKING:
    from .predictor import Predictor
    from .replay.timeline import Timeline
    from .tracing.tracer import trace

__all__ = [
    "Predictor",
    "Timeline",
    "trace",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "Predictor": "predictor",
        "Timeline": "replay.timeline",
        "trace": "tracing.tracer",
    },
)
