"""Helpers for child processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from rehearsing import has_ended

import hf_bsopt
from hf_bsopt.errors import RehearsalError
from hf_bsopt.virtual_gpu import processes

PARENT = Path(hf_bsopt.__file__).resolve().parents[1]


@pytest.mark.parametrize(("before", "after"), [("", ""), ("/mine", f"{os.pathsep}/mine")])
def test_a_child_imports_this_package_and_the_users_path(before: str, after: str) -> None:
    made = processes.with_package({"PYTHONPATH": before, "OWN": "kept"})
    assert made == {"PYTHONPATH": f"{PARENT}{after}", "OWN": "kept"}


@pytest.mark.skipif(sys.platform != "linux", reason="the virtual device is for Linux")
def test_check_device_raises_without_the_device() -> None:
    with pytest.raises(RehearsalError, match="LD_PRELOAD has no effect in this environment"):
        processes.check_device()


@pytest.mark.skipif(sys.platform != "linux", reason="prctl exists only on Linux")
def test_a_child_ends_when_its_parent_is_killed(tmp_path: Path) -> None:
    child = (
        "from hf_bsopt.virtual_gpu.processes import end_with_parent as e; e(); import signal; print(1, flush=True); \
signal.pause()"
    )
    parent = f"""
import os, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", {child!r}], stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid, flush=True)
os.kill(os.getpid(), 9)
"""
    done = subprocess.run(
        [sys.executable, "-c", parent],
        env=processes.with_package(os.environ),
        capture_output=True,
        text=True,
        check=False,
    )
    assert has_ended(int(done.stdout))
