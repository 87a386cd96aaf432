"""The report of a search, as text, HTML, DataFrame, JSON and plots. Start with report.py."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._utils.lazy_names import lazy_names

if TYPE_CHECKING:
    from .report import PhaseAnswer, Report

__all__ = [
    "PhaseAnswer",
    "Report",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "PhaseAnswer": "report",
        "Report": "report",
    },
)
