"""Progress is shown on a terminal only, on rank 0 only, and not within ``silent()``."""

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


def replace_stderr(stream: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the stderr that progress uses; pytest itself replaces sys.stderr between a fixture and the test."""
    monkeypatch.setattr(progress, "sys", SimpleNamespace(stderr=stream, modules=sys.modules))


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Return a fake terminal as standard error; progress is shown at once instead of after two seconds."""
    made = Terminal()
    replace_stderr(made, monkeypatch)
    monkeypatch.setattr(progress, "DELAY_SECONDS", 0.0)
    monkeypatch.setattr(progress, "TICK_SECONDS", 60.0)
    monkeypatch.delenv("RANK", raising=False)
    return made


def test_a_task_is_shown_with_its_time_and_then_erased(terminal: Terminal) -> None:
    with progress.task("running batch size 48"):
        assert "running batch size 48 [00:00]" in terminal.getvalue()
    assert terminal.getvalue().endswith("\r")
    assert "\n" not in terminal.getvalue()


def test_a_short_task_is_not_shown(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "DELAY_SECONDS", 60.0)
    with progress.task("quick"), progress.task("quicker"):
        pass
    assert terminal.getvalue() == ""


def test_a_bar_shows_the_count_and_the_task_within_it(terminal: Terminal) -> None:
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


def test_nothing_is_shown_while_silent_and_output_resumes_afterwards(terminal: Terminal) -> None:
    with progress.silent(), progress.bar(3, "table") as line:
        line.advance()
    assert terminal.getvalue() == ""
    with progress.silent(False), progress.task("again"):
        pass
    assert "again" in terminal.getvalue()


def test_nothing_is_shown_without_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = io.StringIO()
    replace_stderr(pipe, monkeypatch)
    monkeypatch.setattr(progress, "DELAY_SECONDS", 0.0)
    with progress.task("x"), progress.task("y"):
        pass
    assert pipe.getvalue() == ""


def test_an_error_closes_the_line(terminal: Terminal) -> None:
    with pytest.raises(ValueError, match="broken"), progress.task("x"):
        raise ValueError("broken")
    with progress.task("next"):
        assert "next [" in terminal.getvalue()
