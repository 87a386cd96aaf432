"""Names with control characters do not command the terminal."""

from __future__ import annotations

import pytest

from hf_bsopt._utils.terminal import printable, show


def test_control_characters_are_shown_as_their_escapes() -> None:
    assert printable("a\x1b[2Jb\x07\x9b1m\x7f\x00") == r"a\x1b[2Jb\x07\x9b1m\x7f\x00"
    assert printable("safe\u202egnp.exe") == r"safe\u202egnp.exe"
    assert printable("hidden\rshown") == r"hidden\rshown"


def test_text_and_line_ends_stay() -> None:
    text = "é 漢字 ✅\tcolumn\r\nnext\nlast │ ─"
    assert printable(text) == text


def test_values_are_printed_with_spaces_between(capsys: pytest.CaptureFixture[str]) -> None:
    show("size", 8, "\x1b[31m")
    assert capsys.readouterr().out == "size 8 \\x1b[31m\n"
