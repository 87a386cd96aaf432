"""Batch sizes by model, length and GPU. Front door: table.py."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._utils.lazy_names import lazy_names

if TYPE_CHECKING:
    from .table import AS_USUAL, Training, batch_size_table
    from .text import FORMATS, table_text

__all__ = [
    "AS_USUAL",
    "FORMATS",
    "Training",
    "batch_size_table",
    "table_text",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "AS_USUAL": "table",
        "FORMATS": "text",
        "Training": "table",
        "batch_size_table": "table",
        "table_text": "text",
    },
)
