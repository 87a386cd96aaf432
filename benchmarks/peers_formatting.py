"""Tables of benchmarks/peers.py, for a terminal or in Markdown."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass

from peers_cases import Case, RunDevice, Search

HEADER = ("contender", "trials", "OOM", "found", "of largest", "was run", "trains")
TIMES = ("wall (s)", "÷ ours")
LAYOUT = "{:<24} {:>6} {:>5} {:>6} {:>11}  {:<8} {}"
TIMED_LAYOUT = "{:<26} {:>6} {:>4} {:>6} {:>10}  {:<7} {:<6} {:>8} {:>6}"
REACHED = 0.97
"""Fraction of the true largest size from which a peer counts as reaching it."""
TIMES_ARE_NOT_REAL = "The GPU is virtual: the seconds are the time that Python took and say nothing about a real GPU."


@dataclass(frozen=True)
class Comparison:
    """The searches of one case, this project's last. ``largest``: the true largest size. ``fits``: for each size found,
    whether Trainer trains at it. ``device_name``: a description of the device.
    """

    case: Case
    device: RunDevice
    device_name: str
    searches: list[Search]
    largest: int
    fits: dict[int, bool]

    @property
    def header(self) -> tuple[str, ...]:
        return (*HEADER, *TIMES) if self.device.computes else HEADER

    @property
    def title(self) -> str:
        return f"{self.case.title()}, {self.device_name}"

    def rows(self) -> list[tuple[str, ...]]:
        return [
            (
                search.contender,
                str(len(search.attempts)),
                str(search.errors),
                str(search.size or "–"),
                f"{self._share(search):.1%}".replace("%", " %") if search.size else "–",
                _yes(search.was_run) if search.size else "–",
                _yes(self.fits[search.size]) if search.size else "–",
                *(self._times(search) if self.device.computes else ()),
            )
            for search in self.searches
        ]

    def _share(self, search: Search) -> float:
        return (search.size or 0) / self.largest if self.largest else 0.0

    def _times(self, search: Search) -> tuple[str, str]:
        ours = self.searches[-1].wall_seconds
        return f"{search.wall_seconds:.1f}", f"{search.wall_seconds / ours:.2f}"

    def failures(self) -> list[str]:
        return [f"{search.contender}: {search.failure}" for search in self.searches if search.failure]

    def fastest_peers(self) -> list[str]:
        """Return lines that compare this project's time with the fastest peers; none if times are not compared."""
        ours, peers = self.searches[-1], [search for search in self.searches[:-1] if search.size]
        if not (self.device.computes and ours.size and peers):
            return []
        lines = [TIMES_ARE_NOT_REAL] if self.device.is_emulated else []
        near = [search for search in peers if self._share(search) >= REACHED and self.fits[search.size or 0]]
        for words, group in ((f"that reaches {REACHED:.0%} of the largest and trains", near), ("of all", peers)):
            name = f"fastest peer {words}"
            if not group:
                lines.append(f"{name}: none")
                continue
            first = min(group, key=lambda search: search.wall_seconds)
            share = ours.wall_seconds / first.wall_seconds
            lines.append(f"{name}: {first.contender}, {first.wall_seconds:.1f} s; this project takes {share:.2f} of it")
        return lines

    def text(self, *, sizes: bool) -> str:
        lines = [self.title, f"true largest: {self.largest}", ""]
        layout = TIMED_LAYOUT if self.device.computes else LAYOUT
        lines += [layout.format(*row) for row in (self.header, *self.rows())]
        lines += [f"  {failure}" for failure in self.failures()]
        if sizes:
            lines += ["", "sizes run, ✗ out of memory:"]
            for search in self.searches:
                line = f"{search.contender}: {' '.join(map(str, search.attempts)) or 'none'}"
                lines += textwrap.wrap(line, 78, initial_indent="  ", subsequent_indent="    ")
        fastest = self.fastest_peers()
        return "\n".join([*lines, *(["", *fastest] if fastest else [])])

    def markdown(self) -> str:
        header = (*self.header, "sizes run")
        cells = [(*row, " ".join(map(str, s.attempts))) for row, s in zip(self.rows(), self.searches, strict=True)]
        lines = [f"**{self.title}**: true largest {self.largest}", ""]
        lines += ["| " + " | ".join(row) + " |" for row in (header, ("---",) * len(header), *cells)]
        return "\n".join([*lines, *(f"\n{line}" for line in (*self.failures(), *self.fastest_peers()))])


def line_of(search: Search, *, timed: bool) -> str:
    """Return the outcome of one search in a line."""
    trials = f"{len(search.attempts)} trials, {search.errors} out of memory"
    seconds = f", {search.wall_seconds:.1f} s" if timed else ""
    return f"{search.contender}: {search.size or search.failure}, {trials}{seconds}"


def _yes(is_so: bool) -> str:
    return "yes" if is_so else "no"
