"""Cut the long lines of a diff around the changes, and mask credentials in it."""

from __future__ import annotations

import bisect
from collections.abc import Sequence

from .redaction import LONGEST_SHOWN, SURROUNDINGS, masked_region
from .sites import Edit, line_starts


def shown_edits(text: str, edits: Sequence[Edit], context: int) -> tuple[str, tuple[Edit, ...]]:
    """Return a text and its edits for a diff: as many lines, but the long ones cut, and credentials masked.

    ``context``: lines around an edit that the diff shows. :func:`unmasked` is to be applied to the diff.
    """
    starts = [*line_starts(text), len(text)]
    touched = {_line(starts, position) for edit in edits for position in (edit.start, edit.end)}
    wanted = sorted({line + away for line in touched for away in range(-context - 1, context + 2)})
    parts: list[str] = []
    moved: list[Edit] = []
    copied = length = 0
    for line in wanted:
        if not 0 <= line < len(starts) - 1:
            continue
        start, end = starts[line], starts[line + 1]
        is_open = end == len(text) and text[end - 1 : end] not in ("\r", "\n")
        inside = [edit for edit in edits if start <= edit.start < end + is_open or start == end == edit.start]
        shown, kept = _shown_with_edits(text, start, end, inside)
        parts += [text[copied:start], shown]
        length += start - copied
        moved += [Edit(edit.start + length, edit.end + length, edit.new) for edit in kept]
        length += len(shown)
        copied = end
    return "".join([*parts, text[copied:]]), tuple(moved)


def _shown_with_edits(text: str, start: int, end: int, edits: Sequence[Edit]) -> tuple[str, list[Edit]]:
    """Return a line for display, and its edits with their positions in it."""
    body = end - len(text[start:end]) + len(text[start:end].rstrip("\r\n"))
    if body - start <= LONGEST_SHOWN:
        line = [*masked_region(text, start, end)]
        for edit in edits:
            line[edit.start - start : edit.end - start] = text[edit.start : edit.end]
        return "".join(line), [Edit(edit.start - start, edit.end - start, edit.new) for edit in edits]
    parts: list[str] = []
    kept: list[Edit] = []
    done = start
    for edit in edits:
        before = max(done, edit.start - SURROUNDINGS)
        if before > done:
            after = min(before, done + SURROUNDINGS) if kept else done
            parts += [masked_region(text, done, after), "…" if before > after else ""]
        parts.append(masked_region(text, before, edit.start))
        at = sum(map(len, parts))
        kept.append(Edit(at, at + edit.end - edit.start, edit.new))
        parts.append(text[edit.start : edit.end])
        done = edit.end
    last = min(body, done + (SURROUNDINGS if edits else LONGEST_SHOWN))
    parts += [masked_region(text, done, last), "…" if last < body else "", text[body:end]]
    return "".join(parts), kept


def _line(starts: Sequence[int], position: int) -> int:
    return min(bisect.bisect_right(starts, position), len(starts) - 1) - 1
