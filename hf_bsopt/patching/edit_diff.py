"""Build a unified diff from the edits; comparing the old and the new text would be slow for a notebook of 50 MB."""

from __future__ import annotations

import bisect
import difflib
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass

from .sites import Edit, line_starts

CONTEXT = 3
LONGEST_LINE = 2_000
"""A notebook with an edited line longer than this, in characters, is shown as a diff of its cells."""


@dataclass(frozen=True)
class _Group:
    """Adjacent changed lines: from ``first`` to ``last`` (exclusive), counted from 0."""

    first: int
    last: int
    edits: tuple[Edit, ...]


def apply_edits(text: str, edits: Sequence[Edit]) -> str:
    """Return the text with the edits applied; they must be sorted and must not overlap."""
    parts: list[str] = []
    copied = 0
    for edit in edits:
        parts += [text[copied : edit.start], edit.new]
        copied = edit.end
    return "".join([*parts, text[copied:]])


def split_lines(text: str) -> list[str]:
    r"""Return the lines with their line ends: \n, \r\n or \r."""
    return re.findall(r"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+$", text)


def edits_between(text: str, other: str) -> tuple[Edit, ...]:
    """Return edits that turn ``text`` into ``other``: inserted lines, and the part of each line that differs."""
    old, new = split_lines(text), split_lines(other)
    starts = [0, *itertools.accumulate(map(len, old))]
    edits = []
    for kind, first, last, new_first, new_last in difflib.SequenceMatcher(None, old, new, False).get_opcodes():
        if kind == "replace" and last - first == new_last - new_first:
            pairs = zip(range(first, last), new[new_first:new_last], strict=True)
            edits += [_difference(starts[line], old[line], changed) for line, changed in pairs]
        elif kind != "equal":
            edits.append(Edit(starts[first], starts[last], "".join(new[new_first:new_last])))
    return tuple(edits)


def _difference(start: int, old: str, new: str) -> Edit:
    same = _common(old, new)
    tail = _common(old[same:][::-1], new[same:][::-1])
    return Edit(start + same, start + len(old) - tail, new[same : len(new) - tail])


def _common(one: str, other: str) -> int:
    """Return the number of characters that are the same at the beginning of both."""
    return next(
        (place for place, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]),
        min(len(one), len(other)),
    )


def longest_edited_line(text: str, edits: Sequence[Edit]) -> int:
    """Return the number of characters of the longest line that an edit touches."""
    ends = [*line_starts(text), len(text)]
    touched = [_line(ends[:-1], edit.start) for edit in edits]
    return max((ends[line + 1] - ends[line] for line in touched), default=0)


def unified_diff(name: str, text: str, edits: Sequence[Edit]) -> str:
    """Return the diff as ``diff -u`` formats it, with three lines of context; "" if there are no edits."""
    if not edits:
        return ""
    starts = line_starts(text)
    count = len(starts) - (starts[-1] == len(text))
    hunks = [f"--- a/{name}\n+++ b/{name}\n"]
    shift = 0
    for hunk in _hunks(_groups(text, edits), count):
        old, new, lines = _hunk(text, starts, hunk, count)
        first = max(hunk[0].first - CONTEXT, 0)
        hunks.append(f"@@ -{_range(first, old)} +{_range(first + shift, new)} @@\n{lines}")
        shift += new - old
    return "".join(hunks)


def _range(first: int, count: int) -> str:
    start = first + 1 if count else first
    return f"{start}" if count == 1 else f"{start},{count}"


def _groups(text: str, edits: Sequence[Edit]) -> list[_Group]:
    """Return the edits grouped by adjacent lines. An edit that inserts whole lines replaces no line."""
    groups: list[_Group] = []
    starts = line_starts(text)
    for edit in edits:
        first = _line(starts, edit.start)
        is_whole = edit.start == edit.end == starts[first] and edit.new.endswith(("\n", "\r"))
        last = first if is_whole else _line(starts, edit.end) + 1
        if groups and first <= groups[-1].last:
            before = groups.pop()
            groups.append(_Group(before.first, max(last, before.last), (*before.edits, edit)))
        else:
            groups.append(_Group(first, last, (edit,)))
    return groups


def _line(starts: Sequence[int], position: int) -> int:
    return bisect.bisect_right(starts, position) - 1


def _hunks(groups: list[_Group], count: int) -> list[list[_Group]]:
    hunks: list[list[_Group]] = []
    for group in groups:
        if hunks and group.first - hunks[-1][-1].last <= 2 * CONTEXT:
            hunks[-1].append(group)
        else:
            hunks.append([group])
    return hunks


def _hunk(text: str, starts: Sequence[int], groups: list[_Group], count: int) -> tuple[int, int, str]:
    """Return the number of old lines, the number of new lines and the text of a hunk."""
    ends = [*starts[1:], len(text)]

    def between(first: int, last: int) -> list[str]:
        return [text[starts[number] : ends[number]] for number in range(first, last)]

    rows: list[str] = []
    old = new = 0
    line = max(groups[0].first - CONTEXT, 0)
    for group in groups:
        kept = between(line, group.first)
        before = between(group.first, min(group.last, count))
        start = starts[group.first] if group.first < len(starts) else len(text)
        shifted = [Edit(edit.start - start, edit.end - start, edit.new) for edit in group.edits]
        after = split_lines(apply_edits("".join(before), shifted))
        rows += [*_rows(" ", kept), *_rows("-", before), *_rows("+", after)]
        old += len(kept) + len(before)
        new += len(kept) + len(after)
        line = min(group.last, count)
    kept = between(line, min(line + CONTEXT, count))
    rows += _rows(" ", kept)
    return old + len(kept), new + len(kept), "".join(rows)


def _rows(sign: str, lines: list[str]) -> list[str]:
    return [sign + line + ("" if line.endswith(("\n", "\r")) else "\n\\ No newline at end of file\n") for line in lines]
