"""The ways out of a memory that is too small, as they were predicted, and how they are told."""

from __future__ import annotations

import html
import textwrap
from dataclasses import asdict, dataclass
from typing import Any

GIB = 2**30
WIDTH = 78
NAME_WIDTH = 31
HEADING = "Ways out, each predicted at up to {limit:.0f} % of the memory, in order of preference:"
COMPUTE = (
    "compute: the operations of matrix products and attention, forward and backward, for one sequence, counted on the "
    "traced step; now = 1. What moves memory alone takes time too and is not in it."
)


@dataclass(frozen=True)
class WayOut:
    """One thing that could be done, and what it would give.

    name: in words. flags: as the command line takes it. batch_size: the micro-batch that would be chosen; 0 where not
    even one sequence fits, None where nothing could be predicted (obstacle says why). accumulation: micro-batches in an
    optimizer step. used_bytes: predicted at that size; where nothing fits, what one sequence needs, or, where
    is_lower_bound, weights, gradients and optimizer's state alone. total_bytes: of the device. compute: floating-point
    operations a sequence over those of now, None where they could not be counted. cost: what it costs besides, and
    who says so.
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
    def share(self) -> float | None:
        """Used memory over the device's, at the size that would be chosen."""
        return (self.used_bytes or 0) / self.total_bytes if self.fits else None


@dataclass(frozen=True)
class WaysOut:
    """now: what was asked, predicted as the others are. ways: in order of preference. limit: the share of the
    memory that none passes. Printing it shows a table.
    """

    now: WayOut
    ways: tuple[WayOut, ...]
    limit: float

    def __str__(self) -> str:
        return told(self)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return f"<pre style='line-height:1.35'>{html.escape(str(self))}</pre>"

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


def told(ways_out: WaysOut) -> str:
    """At most 78 columns wide."""
    if not ways_out.ways:
        return "Ways out: none is known here that is not taken already."
    now, ways = ways_out.now, ways_out.ways
    lines = [
        HEADING.format(limit=ways_out.limit * 100),
        f"{'':{NAME_WIDTH}} {'batch size':>11} {'of memory':>9} {'compute':>8}",
    ]
    lines += [_row(way, now) for way in (now, *ways)]
    lines += ["", _wrapped(COMPUTE, "")]
    lines += [_wrapped(f"{way.name} ({way.flags}): {way.cost}", "  ") for way in ways]
    return "\n".join(lines)


def _row(way: WayOut, now: WayOut) -> str:
    if way.batch_size is None:
        return _wrapped(f"{way.name:{NAME_WIDTH}}  {way.obstacle}", " " * (NAME_WIDTH + 2))
    if not way.fits:
        needed, total = (way.used_bytes or 0) / GIB, way.total_bytes / GIB
        over = "over " if way.is_lower_bound else ""
        return f"{way.name:{NAME_WIDTH}}  does not fit: needs {over}{needed:.2f} of {total:.2f} GiB"
    compute = "–" if way.compute is None else f"× {way.compute:.2f}"
    size = f"{way.batch_size}" if way.accumulation == 1 else f"{way.batch_size} × {way.accumulation}"
    share = f"{(way.share or 0) * 100:.0f} %"
    return f"{way.name:{NAME_WIDTH}} {size:>11} {share:>9} {compute:>8}{_verdict(way, now)}"


def _verdict(way: WayOut, now: WayOut) -> str:
    if way is now:
        return ""
    if not now.fits:
        return "  fits"
    if way.accumulation > 1 and now.accumulation == 1:
        return f"  {(way.batch_size or 0) * way.accumulation} a step"
    return "  no more" if (way.batch_size or 0) <= (now.batch_size or 0) else ""


def _wrapped(text: str, indent: str) -> str:
    return textwrap.fill(text, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
