"""The memory of a process, its limit, and the memory that is available to it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hf_bsopt.errors import DeviceError
from hf_bsopt.probing import host_memory
from hf_bsopt.probing.host_memory import ProcessStatus, available_bytes, limit_this_process, why_no_limit
from hf_bsopt.probing.oom import out_of_memory

MIB = 2**20
pytestmark = pytest.mark.skipif(why_no_limit() is not None, reason=str(why_no_limit()))


def in_a_fork(work: Callable[[], str]) -> str:
    """Run ``work`` in a fork, so that limits end with it, and return its result or error."""
    reading, writing = os.pipe()
    if os.fork() == 0:
        try:
            answer = work()
        except BaseException as error:
            found = out_of_memory(error)
            answer = f"{type(error).__name__}: {found.where if found else error}"
        os.write(writing, answer.encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as stream:
        answer = stream.read()
    os.wait()
    return answer


def allocate(mib: int) -> str:
    torch.ones(mib * MIB // 4)
    return "done"


def test_an_allocation_within_the_limit_succeeds() -> None:
    limit = ProcessStatus.read().resident_bytes + 600 * MIB
    assert in_a_fork(lambda: (limit_this_process(limit), allocate(400))[1]) == "done"  # type: ignore[func-returns-value]


def test_an_allocation_beyond_the_limit_fails() -> None:
    def allocate_too_much() -> str:
        limit_this_process(ProcessStatus.read().resident_bytes + 600 * MIB)  # a fork has fewer pages than its parent
        return allocate(800)

    assert in_a_fork(allocate_too_much) == "RuntimeError: host"


def test_a_limit_below_the_size_of_the_libraries_is_refused() -> None:
    with pytest.raises(DeviceError, match=r"Python and its libraries alone take \d+ MiB"):
        limit_this_process(10 * MIB)


def test_touched_memory_stays_in_the_peak_after_it_is_freed() -> None:
    before = ProcessStatus.read()
    torch.ones(300 * MIB // 4)
    after = ProcessStatus.read()
    assert after.peak_resident_bytes - before.resident_bytes >= 290 * MIB
    assert after.resident_bytes < after.peak_resident_bytes


def write_files(folder: Path, contents: dict[str, str]) -> None:
    for name, text in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Emulate a machine with 8 GiB free; each test adds its control group."""
    write_files(tmp_path, {"meminfo": "MemTotal: 16777216 kB\nMemAvailable:    8388608 kB\n"})
    monkeypatch.setattr(host_memory, "PROC", tmp_path)
    monkeypatch.setattr(host_memory, "CGROUP", tmp_path)
    return tmp_path


def test_without_a_control_group_free_memory_of_the_machine_counts(machine: Path) -> None:
    assert available_bytes() == (8192 * MIB, "free memory of this machine")


@pytest.mark.parametrize(
    ("contents", "expected"),
    [
        ({"memory.max": f"{4096 * MIB}", "memory.current": f"{1024 * MIB}", "memory.stat": "anon 5\n"}, 3072),
        (
            {
                "memory.max": f"{4096 * MIB}",
                "memory.current": f"{1024 * MIB}",
                "memory.stat": f"anon 5\ninactive_file {512 * MIB}\n",
            },
            3584,
        ),
        (
            {
                "memory/memory.limit_in_bytes": f"{2048 * MIB}",
                "memory/memory.usage_in_bytes": f"{1024 * MIB}",
                "memory/memory.stat": f"total_inactive_file {256 * MIB}\n",
            },
            1280,
        ),
    ],
)
def test_the_control_group_limit_counts_and_cached_files_are_available(
    machine: Path, contents: dict[str, str], expected: int
) -> None:
    write_files(machine, contents)
    assert available_bytes() == (expected * MIB, "the limit of this control group")


@pytest.mark.parametrize(
    "contents",
    [
        {"memory.max": "max", "memory.current": "5", "memory.stat": ""},
        {
            "memory/memory.limit_in_bytes": str(2**63 - 4096),
            "memory/memory.usage_in_bytes": "5",
            "memory/memory.stat": "",
        },
        {"memory.max": "nonsense", "memory.current": "5", "memory.stat": ""},
    ],
)
def test_a_control_group_without_a_limit_is_ignored(machine: Path, contents: dict[str, str]) -> None:
    write_files(machine, contents)
    assert available_bytes()[0] == 8192 * MIB


def test_a_process_cannot_be_limited_on_other_systems_than_linux(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    reason = why_no_limit()
    assert reason is not None
    assert "RLIMIT_DATA" in reason
