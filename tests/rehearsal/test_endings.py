"""The process that runs a script: how it starts, each way it can end, and the outcome.

The scripts here do not import torch, which is slow.
"""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
from rehearsing import NEEDS_THE_DEVICE, has_ended

from hf_bsopt.data import catalog
from hf_bsopt.rehearsal import run
from hf_bsopt.rehearsal.outcome import ScriptOutcome
from hf_bsopt.rehearsal.run import rehearse

pytestmark = NEEDS_THE_DEVICE

T4 = catalog.gpu("T4")
Rehearse = Callable[..., ScriptOutcome]
Capture = pytest.CaptureFixture[str]


@pytest.fixture
def rehearsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Rehearse:
    """Rehearse this source as a script in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def call(source: str, *arguments: str, timeout_seconds: float = 120, **options: object) -> ScriptOutcome:
        script = tmp_path / "train.py"
        script.write_text(textwrap.dedent(source))
        return rehearse(script, arguments, T4, steps=3, timeout_seconds=timeout_seconds, **options)  # type: ignore[arg-type]

    return call


def test_a_script_runs_as_python_would_run_it(rehearsed: Rehearse, capfd: Capture, tmp_path: Path) -> None:
    (tmp_path / "helper.py").write_text("found = True")
    outcome = rehearsed(
        """
        '''The docstring.'''
        import pickle, sys
        from helper import found

        class Config: pass

        print(__name__, __doc__, sys.argv[1:], sys.argv[0] == __file__, sys.path[0] == __file__[: -len("/train.py")])
        print(type(pickle.loads(pickle.dumps(Config()))) is Config, sys.modules["__main__"].Config is Config)
        """,
        "--epochs",
        "3",
    )
    assert capfd.readouterr().out.splitlines() == ["__main__ The docstring. ['--epochs', '3'] True True", "True True"]
    assert outcome == ScriptOutcome(status="ended")


def test_dunder_file_is_absolute_for_a_relative_script_path(
    rehearsed: Rehearse, capfd: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rehearsed("print(__file__)")
    capfd.readouterr()
    rehearse(Path("train.py"), (), T4, steps=1, timeout_seconds=60)
    assert capfd.readouterr().out == f"{tmp_path / 'train.py'}\n"


def test_spawned_processes_are_not_rehearsed(rehearsed: Rehearse, capfd: Capture) -> None:
    rehearsed(
        """
        import multiprocessing, os

        def work(x):
            return x * 2, "HF_BSOPT_REHEARSAL" in os.environ

        if __name__ == "__main__":
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                print(pool.map(work, [1, 2]))
        """
    )
    assert capfd.readouterr().out == "[(2, False), (4, False)]\n"


def test_quiet_discards_the_scripts_output(rehearsed: Rehearse, capfd: Capture) -> None:
    rehearsed("import sys; print('one'); print('two', file=sys.stderr)", quiet=True)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(("argument", "status"), [("", "ended"), ("0", "ended"), ("None", "ended"), ("5", "failed")])
def test_sys_exit_is_a_failure_only_with_a_nonzero_code(rehearsed: Rehearse, argument: str, status: str) -> None:
    outcome = rehearsed(f"import sys; sys.exit({argument})")
    assert (outcome.status, outcome.exit_code) == (status, 5 if argument == "5" else 0)


def test_sys_exit_with_a_message_prints_it_and_has_code_1(rehearsed: Rehearse, capfd: Capture) -> None:
    outcome = rehearsed("import sys; sys.exit('no data')")
    assert (outcome.status, outcome.exit_code) == ("failed", 1)
    assert capfd.readouterr().err == "no data\n"


@pytest.mark.parametrize(("argument", "why"), [("5", "it exited with code 5"), ("'no data'", "no data")])
def test_sys_exit_is_explained_in_the_message(rehearsed: Rehearse, argument: str, why: str) -> None:
    assert why in rehearsed(f"import sys; sys.exit({argument})").message


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("import os; os._exit(7)", "it ended with exit code 7"),
        ("import ctypes; ctypes.string_at(0)", "it was killed by SIGSEGV"),
        ("import os; os.abort()", "it was killed by SIGABRT"),
        (
            "import os; os.kill(os.getpid(), 9)",
            "it was killed, as the system does when the host runs out of memory",
        ),
    ],
)
def test_a_process_that_died_is_explained_in_the_message(rehearsed: Rehearse, source: str, why: str) -> None:
    outcome = rehearsed(source)
    assert (outcome.status, outcome.message) == ("failed", why)


def test_os_exit_with_code_0_is_a_normal_end(rehearsed: Rehearse) -> None:
    assert rehearsed("import os; os._exit(0)").status == "ended"


def test_an_error_is_reported_with_its_line_and_message(rehearsed: Rehearse, capfd: Capture) -> None:
    outcome = rehearsed(
        """
        def load(batch):
            return batch["labels"]

        load({})
        """
    )
    assert (outcome.status, outcome.message, outcome.exit_code) == ("failed", "KeyError: 'labels'", 1)
    assert outcome.location is not None
    assert outcome.location.line == 'train.py, line 3, in load: return batch["labels"]'
    assert capfd.readouterr().err.endswith("KeyError: 'labels'\n")


FAILING = """
    from helper import again

    def inner():
        raise ValueError("inner")

    def outer():
        try:
            inner()
        except ValueError as error:
            raise RuntimeError("outer") from error

    try:
        again(outer)
    except RuntimeError:
        again(lambda: [][0])
"""


def test_a_traceback_is_exactly_the_one_that_python_prints(rehearsed: Rehearse, capfd: Capture, tmp_path: Path) -> None:
    (tmp_path / "helper.py").write_text("def again(function):\n    return function()\n")
    rehearsed(FAILING)
    ours = capfd.readouterr().err
    alone = subprocess.run([sys.executable, tmp_path / "train.py"], capture_output=True, text=True, check=False).stderr
    assert ours == alone
    assert len(re.findall("Traceback", alone)) == 3


def test_an_error_from_a_replaced_function_shows_no_frame_of_this_package(rehearsed: Rehearse, capfd: Capture) -> None:
    assert rehearsed("import shutil; shutil.rmtree(3.5)").message.startswith("TypeError")
    errors = capfd.readouterr().err
    assert errors.startswith("Traceback (most recent call last):\n")
    assert "hf_bsopt" not in errors


def test_an_endless_loop_times_out_and_its_line_is_reported(rehearsed: Rehearse) -> None:
    outcome = rehearsed(
        """
        def generate():
            token = 0
            while token != 1:
                pass

        generate()
        """,
        timeout_seconds=2,
    )
    assert outcome.status == "timeout"
    assert outcome.location is not None
    assert outcome.location.line in (
        "train.py, line 4, in generate: while token != 1:",
        "train.py, line 5, in generate: pass",
    )


def test_a_process_that_stopped_responding_is_killed(rehearsed: Rehearse, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "GRACE_SECONDS", 1.0)
    outcome = rehearsed("import os, signal; os.kill(os.getpid(), signal.SIGSTOP)", timeout_seconds=2)
    assert (outcome.status, outcome.message) == ("timeout", "it stopped responding")


def test_processes_that_a_script_leaves_running_are_killed(rehearsed: Rehearse, tmp_path: Path) -> None:
    rehearsed(
        """
        import pathlib, subprocess, sys
        left = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
        pathlib.Path("pid").write_text(str(left.pid))
        """
    )
    assert has_ended(int((tmp_path / "pid").read_text()))


def test_a_fork_does_not_change_the_outcome(rehearsed: Rehearse) -> None:
    outcome = rehearsed(
        """
        import os, sys
        if os.fork() == 0:
            os._exit(7)
        os.wait()
        """
    )
    assert outcome.status == "ended"


def test_a_fork_that_ends_by_sys_exit_does_not_change_the_outcome(rehearsed: Rehearse) -> None:
    outcome = rehearsed(
        """
        import os, sys
        if os.fork() == 0:
            sys.exit(7)
        os.wait()
        os._exit(0)
        """
    )
    assert outcome.status == "ended"


def test_nothing_is_left_in_the_temporary_folder(
    rehearsed: Rehearse, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    rehearsed("import os; os._exit(7)")
    assert list(temporary.iterdir()) == []
