"""The suggestions with their predictions, and their formatting as text."""

from __future__ import annotations

import html
import textwrap
from dataclasses import asdict, dataclass
from typing import Any

GIB = 2**30
WIDTH = 78
NAME_WIDTH = 31
HEADING = "What would make room, each predicted at up to {limit:.0f} % of the memory, best first:"
COMPUTE = (
    "compute: the operations of matrix products and attention, forward and backward, for one sequence, counted on the "
    "traced step; now = 1. Operations that only move memory take time too and are not counted."
)


@dataclass(frozen=True)
class Suggestion:
    """One alternative and its predicted effect.

    name: shown to the user. flags: for the command line. batch_size: the micro-batch that would be chosen; 0 if not
    even one sequence fits, None if nothing could be predicted (obstacle is the reason). accumulation: micro-batches in
    an optimizer step. used_bytes: predicted at that size; if nothing fits, what one sequence needs or, with
    is_lower_bound, what weights, gradients and optimizer state alone need. total_bytes: memory of the device. compute:
    floating-point operations per sequence, relative to the current workload; None if they could not be counted. cost:
    its other costs, with the source.
    """

    name: str
    flags: str
    batch_size: int | None
    accumulation: int
    used_bytes: int | None
    total_bytes: int
    compute: float | None
    cost: str
    is_lower_bound: bool = False
    obstacle: str = ""

    @property
    def fits(self) -> bool:
        return bool(self.batch_size)

    @property
    def utilization(self) -> float | None:
        """Used ÷ total memory of the device, at the size that would be chosen."""
        return (self.used_bytes or 0) / self.total_bytes if self.fits else None


@dataclass(frozen=True)
class Advice:
    """Suggestions for freeing memory, with their predictions. Printing it shows a table.

    now: the current workload, predicted like the others. suggestions: best first. limit: the fraction of the memory
    that no suggestion exceeds.
    """

    now: Suggestion
    suggestions: tuple[Suggestion, ...]
    limit: float

    def __str__(self) -> str:
        return format_advice(self)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return f"<pre style='line-height:1.35'>{html.escape(str(self))}</pre>"

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return asdict(self)


def format_advice(advice: Advice) -> str:
    """Format the table, at most 78 columns wide."""
    if not advice.suggestions:
        return "Nothing else is known that would make room."
    now, suggestions = advice.now, advice.suggestions
    lines = [
        HEADING.format(limit=advice.limit * 100),
        f"{'':{NAME_WIDTH}} {'batch size':>11} {'of memory':>9} {'compute':>8}",
    ]
    lines += [_row(suggestion, now) for suggestion in (now, *suggestions)]
    lines += ["", _wrapped(COMPUTE, "")]
    lines += [
        _wrapped(f"{suggestion.name} ({suggestion.flags}): {suggestion.cost}", "  ") for suggestion in suggestions
    ]
    return "\n".join(lines)


def _row(suggestion: Suggestion, now: Suggestion) -> str:
    if suggestion.batch_size is None:
        return _wrapped(f"{suggestion.name:{NAME_WIDTH}}  {suggestion.obstacle}", " " * (NAME_WIDTH + 2))
    if not suggestion.fits:
        needed, total = (suggestion.used_bytes or 0) / GIB, suggestion.total_bytes / GIB
        over = "over " if suggestion.is_lower_bound else ""
        return f"{suggestion.name:{NAME_WIDTH}}  does not fit: needs {over}{needed:.2f} of {total:.2f} GiB"
    compute = "–" if suggestion.compute is None else f"× {suggestion.compute:.2f}"
    size = (
        f"{suggestion.batch_size}"
        if suggestion.accumulation == 1
        else f"{suggestion.batch_size} × {suggestion.accumulation}"
    )
    fraction = f"{(suggestion.utilization or 0) * 100:.0f} %"
    return f"{suggestion.name:{NAME_WIDTH}} {size:>11} {fraction:>9} {compute:>8}{_verdict(suggestion, now)}"


def _verdict(suggestion: Suggestion, now: Suggestion) -> str:
    if suggestion is now:
        return ""
    if not now.fits:
        return "  fits"
    if suggestion.accumulation > 1 and now.accumulation == 1:
        return f"  {(suggestion.batch_size or 0) * suggestion.accumulation} per step"
    return "  no gain" if (suggestion.batch_size or 0) <= (now.batch_size or 0) else ""


def _wrapped(text: str, indent: str) -> str:
    return textwrap.fill(text, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
