"""accelerate training loops: a drop-in for find_executable_batch_size, and find_batch_size for an Accelerator. Front
door: accelerator.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..._utils.lazy_names import lazy_names

if TYPE_CHECKING:
    from .accelerator import find_batch_size, find_executable_batch_size

__all__ = [
    "find_batch_size",
    "find_executable_batch_size",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "find_batch_size": "accelerator",
        "find_executable_batch_size": "accelerator",
    },
)
