"""Checks of the script path, and the outcome of a process that died before it could write it."""

from __future__ import annotations

from pathlib import Path

import pytest

from hf_bsopt.errors import UsageError
from hf_bsopt.rehearsal.outcome import ScriptOutcome
from hf_bsopt.rehearsal.run import _finished, check_script


def test_the_error_for_a_missing_script_shows_the_two_dashes(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no script .*absent\.py; .* come after the two dashes: -- train\.py"):
        check_script(tmp_path / "absent.py")


def test_the_error_for_a_folder_suggests_a_script_in_it(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"is not a file; name the script, such as .*train\.py"):
        check_script(tmp_path)


def test_the_error_for_a_notebook_shows_how_to_convert_it(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"jupyter nbconvert --to script .*train\.ipynb"):
        check_script(tmp_path / "train.ipynb")


@pytest.mark.parametrize(
    "content", [b"#!/bin/bash\npython train.py --epochs 3\n", b"\x7fELF\x00\x01", b"x = \xff\xfe\n"]
)
def test_files_that_are_not_python_are_refused(content: bytes, tmp_path: Path) -> None:
    script = tmp_path / "train.sh"
    script.write_bytes(content)
    with pytest.raises(UsageError, match=r"train\.sh is not Python: "):
        check_script(script)


@pytest.mark.parametrize("content", [b"", b"\xef\xbb\xbfx = 1\n", b"# -*- coding: latin-1 -*-\nx = '\xe9'\n"])
def test_any_file_that_python_can_compile_is_accepted(content: bytes, tmp_path: Path) -> None:
    script = tmp_path / "train"
    script.write_bytes(content)
    assert check_script(script) is None  # type: ignore[func-returns-value]


@pytest.mark.parametrize("name", ["python", "python3", "accelerate", "torchrun"])
def test_the_error_for_a_launcher_says_to_leave_it_out(name: str) -> None:
    with pytest.raises(UsageError, match=f"leave {name} out: the script itself comes after the two dashes"):
        check_script(Path(name))


@pytest.mark.parametrize(
    ("code", "status", "message"),
    [
        (0, "ended", ""),
        (7, "failed", "it ended with exit code 7"),
        (-11, "failed", "it was killed by SIGSEGV"),
        (-9, "failed", "it was killed, as the system does when the host runs out of memory"),
        (None, "timeout", "it stopped responding"),
    ],
)
def test_the_exit_code_explains_a_process_that_wrote_no_status(code: int | None, status: str, message: str) -> None:
    finished = _finished(ScriptOutcome(steps=2, allocated_bytes=5), code)
    assert (finished.status, finished.message) == (status, message)
    assert (finished.steps, finished.allocated_bytes) == (2, 5)


@pytest.mark.parametrize("status", ["ended", "stopped", "oom", "timeout", "failed"])
def test_a_status_that_was_written_is_kept(status: str) -> None:
    outcome = ScriptOutcome(status=status)  # type: ignore[arg-type]
    assert _finished(outcome, 1) is outcome
