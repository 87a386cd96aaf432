"""Masking magics keeps the position of every character in a cell."""

from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as st

from hf_bsopt.patching.magics import mask_magics

lines = st.lists(
    st.sampled_from(["!ls", "x = !ls \\", "  -l", "%time", "y?", "s = '''", "'''", "f(", ")", "# '", "é = 1"])
)


@given(lines, st.sampled_from(["\n", "\r\n"]))
def test_masking_keeps_the_length_of_every_line(cell: list[str], newline: str) -> None:
    text = newline.join(cell)
    masked = mask_magics(text)
    assert masked is not None
    assert list(map(len, re.split(newline, masked.source))) == list(map(len, re.split(newline, text)))
    for start, end in masked.commands:
        assert "ls" in text[start:end]
