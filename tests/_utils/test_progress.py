"""What whoever waits sees: on a terminal only, on rank 0 only, and not in silence."""

from __future__ import annotations

import io
import re
import sys
from types import SimpleNamespace

import pytest

from hf_bsopt._utils import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def put(stream: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the place of standard error, which pytest itself exchanges between a fixture and the test."""
    monkeypatch.setattr(progress, "sys", SimpleNamespace(stderr=stream, modules=sys.modules))


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Standard error, with everything told at once rather than after two seconds."""
    made = Terminal()
    put(made, monkeypatch)
    monkeypatch.setattr(progress, "DELAY_SECONDS", 0.0)
    monkeypatch.setattr(progress, "TICK_SECONDS", 60.0)
    monkeypatch.delenv("RANK", raising=False)
    return made


def test_a_task_is_told_with_its_time_and_wiped_away(terminal: Terminal) -> None:
    with progress.task("running batch size 48"):
        assert "running batch size 48 [00:00]" in terminal.getvalue()
    assert terminal.getvalue().endswith("\r")
    assert "\n" not in terminal.getvalue()


def test_what_is_over_soon_is_not_told(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "DELAY_SECONDS", 60.0)
    with progress.task("quick"), progress.task("quicker"):
        pass
    assert terminal.getvalue() == ""


def test_a_bar_tells_how_many_are_done_and_of_the_task_within(terminal: Terminal) -> None:
    with progress.bar(2, "table") as line:
        with progress.task("bert-tiny"):
            line.advance()
        line.advance()
    text = terminal.getvalue()
    assert re.search(r"1/2 \|.*\| \[.*\] table, bert-tiny", text)
    assert re.search(r"2/2 \|.*\| \[.*\] table", text)


@pytest.mark.parametrize("rank", ["1", "7"])
def test_other_ranks_are_silent(rank: str, terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", rank)
    with progress.task("x"):
        pass
    assert terminal.getvalue() == ""


def test_in_silence_nothing_is_told_and_afterwards_again(terminal: Terminal) -> None:
    with progress.silent(), progress.bar(3, "table") as line:
        line.advance()
    assert terminal.getvalue() == ""
    with progress.silent(False), progress.task("again"):
        pass
    assert "again" in terminal.getvalue()


def test_where_there_is_no_terminal_nothing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = io.StringIO()
    put(pipe, monkeypatch)
    monkeypatch.setattr(progress, "DELAY_SECONDS", 0.0)
    with progress.task("x"), progress.task("y"):
        pass
    assert pipe.getvalue() == ""


def test_an_error_leaves_no_line_behind(terminal: Terminal) -> None:
    with pytest.raises(ValueError, match="broken"), progress.task("x"):
        raise ValueError("broken")
    with progress.task("next"):
        assert "next [" in terminal.getvalue()
