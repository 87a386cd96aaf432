"""What is taken for a script, and what is known of a process that could not say itself how it ended."""

from __future__ import annotations

from pathlib import Path

import pytest

from hf_bsopt.errors import UsageError
from hf_bsopt.rehearsal.outcome import Outcome
from hf_bsopt.rehearsal.run import _finished, check_script


def test_a_script_that_is_not_there_is_asked_for_after_two_dashes(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no script .*absent\.py; it is named after the two dashes"):
        check_script(tmp_path / "absent.py")


def test_a_folder_is_answered_with_a_script_in_it(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"is no file; name the script, such as .*train\.py"):
        check_script(tmp_path)


def test_a_notebook_is_answered_with_what_makes_a_script_of_it(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"jupyter nbconvert --to script .*train\.ipynb"):
        check_script(tmp_path / "train.ipynb")


@pytest.mark.parametrize(
    "content", [b"#!/bin/bash\npython train.py --epochs 3\n", b"\x7fELF\x00\x01", b"x = \xff\xfe\n"]
)
def test_what_is_not_python_is_said_to_be_none(content: bytes, tmp_path: Path) -> None:
    script = tmp_path / "train.sh"
    script.write_bytes(content)
    with pytest.raises(UsageError, match=r"train\.sh is not Python: "):
        check_script(script)


@pytest.mark.parametrize("content", [b"", b"\xef\xbb\xbfx = 1\n", b"# -*- coding: latin-1 -*-\nx = '\xe9'\n"])
def test_whatever_python_takes_is_a_script(content: bytes, tmp_path: Path) -> None:
    script = tmp_path / "train"
    script.write_bytes(content)
    assert check_script(script) is None  # type: ignore[func-returns-value]


@pytest.mark.parametrize("name", ["python", "python3", "accelerate", "torchrun"])
def test_what_would_start_the_script_is_to_be_left_out(name: str) -> None:
    with pytest.raises(UsageError, match=f"leave {name} out: the script itself follows the two dashes"):
        check_script(Path(name))


@pytest.mark.parametrize(
    ("code", "status", "message"),
    [
        (0, "ended", ""),
        (7, "failed", "it ended with exit code 7"),
        (-11, "failed", "it died of SIGSEGV"),
        (-9, "failed", "it was killed; the system does so when the host's memory runs out"),
        (None, "timeout", "it did not answer any more"),
    ],
)
def test_a_process_that_said_nothing_is_known_by_its_exit_code(code: int | None, status: str, message: str) -> None:
    finished = _finished(Outcome(steps=2, allocated_bytes=5), code)
    assert (finished.status, finished.message) == (status, message)
    assert (finished.steps, finished.allocated_bytes) == (2, 5)


@pytest.mark.parametrize("status", ["ended", "stopped", "oom", "timeout", "failed"])
def test_a_process_that_said_it_is_believed(status: str) -> None:
    outcome = Outcome(status=status)  # type: ignore[arg-type]
    assert _finished(outcome, 1) is outcome
