"""Other ways to free memory, each with a predicted batch size. Start with evaluate.py."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._utils.lazy_names import lazy_names

if TYPE_CHECKING:
    from .evaluate import advise

__all__ = [
    "advise",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "advise": "evaluate",
    },
)
