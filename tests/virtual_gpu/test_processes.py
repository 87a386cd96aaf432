"""What a child process needs, and does for itself at its start."""

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
def test_a_child_imports_this_very_package_and_what_the_user_has_set(before: str, after: str) -> None:
    made = processes.with_package({"PYTHONPATH": before, "OWN": "kept"})
    assert made == {"PYTHONPATH": f"{PARENT}{after}", "OWN": "kept"}


@pytest.mark.skipif(sys.platform != "linux", reason="the virtual device is for Linux")
def test_a_process_without_the_device_is_told_that_it_has_none() -> None:
    with pytest.raises(RehearsalError, match="LD_PRELOAD has no effect in this environment"):
        processes.check_device()


@pytest.mark.skipif(sys.platform != "linux", reason="the system's own means on Linux")
def test_a_child_ends_with_its_parent_however_that_ended(tmp_path: Path) -> None:
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
