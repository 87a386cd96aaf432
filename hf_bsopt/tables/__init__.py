"""Batch sizes by model, length and GPU. Start with table.py."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._utils.lazy_names import lazy_names

if TYPE_CHECKING:
    from .text import FORMATS, table_text

__all__ = [
    "FORMATS",
    "batch_size_table",
    "table_text",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "FORMATS": "text",
        "batch_size_table": "table",
        "table_text": "text",
    },
)
