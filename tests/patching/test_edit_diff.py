"""The unified diff that is built from edits turns the old text into the new one."""

from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as st

from hf_bsopt.patching import edit_diff
from hf_bsopt.patching.sites import Edit, line_starts


def applied(text: str, diff: str) -> str:
    """Apply a unified diff as strictly as the `patch` command does, and return the text."""
    old, new, here = edit_diff.split_lines(text), [], 0
    rows = re.findall(r"[^\r\n]*(?:\r\n|\r|\n)", diff)[2:]
    for place, row in enumerate(rows):
        if found := re.match(r"@@ -(\d+)(?:,(\d+))? \+(\d+)(?:,(\d+))? @@", row):
            start = int(found[1]) - (found[2] != "0")
            new += old[here:start]
            here = start
            assert len(new) == int(found[3]) - (found[4] != "0")
            continue
        is_last = place + 1 < len(rows) and rows[place + 1].startswith("\\")
        body = row[1:-1] if is_last else row[1:]
        if row[0] in " -":
            assert old[here] == body
            here += 1
        if row[0] in " +":
            new.append(body)
    return "".join(new + old[here:])


@given(
    st.lists(st.sampled_from(["a = 1", "b", "", "é = 22"]), min_size=1, max_size=40),
    st.lists(st.tuples(st.integers(0, 400), st.integers(0, 2), st.sampled_from(["48", "x", "new\n"])), max_size=4),
    st.sampled_from(["\n", "\r\n"]),
    st.booleans(),
)
def test_applying_the_diff_gives_the_edited_text(
    rows: list[str], places: list[tuple[int, int, str]], newline: str, ends: bool
) -> None:
    text = newline.join(rows) + (newline if ends else "")
    edits: list[Edit] = []
    for at, length, new in sorted(places):
        if "\n" in new:  # whole lines are inserted between lines
            starts = line_starts(text)
            start = starts[at % len(starts)]
            edit = Edit(start, start, new.replace("\n", newline))
        else:  # numbers are replaced inside lines
            start = min(at, len(text))
            edit = Edit(start, min(start + length, len(text)), new)
        inside = set(text[edit.start : edit.end]) & {"\r", "\n"}
        if not inside and not text[: edit.start].endswith("\r") and (not edits or edits[-1].end < edit.start):
            edits.append(edit)
    assert applied(text, edit_diff.unified_diff("a.py", text, edits)) == edit_diff.apply_edits(text, edits)
