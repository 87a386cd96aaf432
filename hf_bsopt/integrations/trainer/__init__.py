"""Hugging Face's Trainer: find_batch_size(trainer) and callbacks=[BatchSizeCallback()]. Front door: sizing.py."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..._utils.lazy_names import lazy_names

if TYPE_CHECKING:
    from .callback import BatchSizeCallback
    from .sizing import find_batch_size

__all__ = [
    "BatchSizeCallback",
    "find_batch_size",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "BatchSizeCallback": "callback",
        "find_batch_size": "sizing",
    },
)
