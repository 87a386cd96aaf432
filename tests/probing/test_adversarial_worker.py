"""The worker ends with its parent from the beginning, and imports nothing that lies in the working folder."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import misbehaving
import psutil
import pytest

from hf_bsopt.data import catalog
from hf_bsopt.probing import ProbeClient, start_worker
from hf_bsopt.probing.worker import command, use_path_of_caller
from hf_bsopt.virtual_gpu.processes import with_package

ROOT = Path(__file__).parents[2]
HELPERS = Path(misbehaving.__file__).parent
AT_ONCE_SECONDS = 2.0
START = """
import sys
sys.path.append({helpers!r})
import misbehaving
from hf_bsopt.data import catalog
from hf_bsopt.probing import ProbeClient
client = ProbeClient(misbehaving.NoDevice(catalog.gpu("T4")))
client.start()
print(client._worker._process.pid, flush=True)
input()
"""
PLANTED = ("queue", "json", "torch", "hf_bsopt", "pickle", "signal", "ctypes")


def started_parent() -> tuple[subprocess.Popen[str], int]:
    """Return a process that has just started a worker, and the worker's process number."""
    parent = subprocess.Popen(
        [sys.executable, "-c", START.format(helpers=str(HELPERS))],
        env=with_package(os.environ),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout is not None
    return parent, int(parent.stdout.readline())


def seconds_until_gone(pid: int) -> float:
    began = time.monotonic()
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        if time.monotonic() - began > 30:
            break
        time.sleep(0.01)
    return time.monotonic() - began


@pytest.mark.parametrize("delay", [0.0, 0.02, 0.1, 0.5, 2.0])
def test_a_worker_ends_with_its_killed_parent_during_its_imports_too(delay: float) -> None:
    parent, worker = started_parent()
    time.sleep(delay)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    assert seconds_until_gone(worker) < AT_ONCE_SECONDS
    for stream in (parent.stdin, parent.stdout):
        if stream is not None:
            stream.close()


def test_a_worker_whose_parent_ended_before_it_began_ends_at_once() -> None:
    done = subprocess.run(command(sys.executable, 2**22 + 1, []), env=with_package(os.environ), capture_output=True)
    assert (done.returncode, done.stdout) == (1, b"")


def test_nothing_in_the_working_folder_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in PLANTED:
        text = f"from pathlib import Path\nPath({str(tmp_path / 'ran')!r}).touch()\nraise SystemExit(7)\n"
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{os.pathsep}{HELPERS}")  # the empty entry is the working folder
    with ProbeClient(misbehaving.NoDevice(catalog.gpu("T4"))) as probe:
        monkeypatch.setenv("PYTHONPATH", "")
        trial = probe(misbehaving.Workload("error", str(tmp_path)), 8)
    assert trial.detail.startswith("ValueError: no such layer")
    assert not (tmp_path / "ran").exists()


def test_the_callers_path_comes_after_the_standard_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(tmp_path)
    use_path_of_caller(["", "/beside", *sys.path])
    standard = [place for place in sys.path if place.startswith(os.path.dirname(os.__file__))]  # noqa: PTH120
    first = [place for place in standard if "site-packages" not in place]
    assert sys.path[: len(first)] == first
    assert sys.path[len(first) : len(first) + 2] == [str(tmp_path), "/beside"]
    assert len(set(sys.path)) == len(sys.path)


def test_the_start_of_the_worker_imports_nothing_of_the_package_or_of_torch() -> None:
    code = f"import runpy, sys; runpy.run_path({start_worker.__file__!r}, run_name='other'); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert not [name for name in done.stdout.split() if name.split(".")[0] in ("torch", "hf_bsopt", "transformers")]
