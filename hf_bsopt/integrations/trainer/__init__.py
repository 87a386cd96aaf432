"""Hugging Face's Trainer: find_batch_size(trainer) and callbacks=[BatchSizeCallback()]. Front door: sizing.py."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..._utils.lazy_names import lazy_names

if TYPE_CHECKING:
    from .callback import BatchSizeCallback
    from .sizing import Sizing, find_batch_size, find_with

__all__ = [
    "BatchSizeCallback",
    "Sizing",
    "find_batch_size",
    "find_with",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "BatchSizeCallback": "callback",
        "Sizing": "sizing",
        "find_batch_size": "sizing",
        "find_with": "sizing",
    },
)
