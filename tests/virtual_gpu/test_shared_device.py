"""A virtual GPU shared by several processes: memory used by one is not free for others until freed or it ends."""

from __future__ import annotations

import fcntl
import os
import signal
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from neighbours import CONTEXT, MIB, TOTAL, Neighbour
from rehearsing import NEEDS_THE_DEVICE

pytestmark = NEEDS_THE_DEVICE

GIB = 2**30
OUT_OF_MEMORY, UNAVAILABLE = 2, 46
SLOTS = 127


# ---- memory


def test_each_process_sees_all_allocations_and_contexts(first: Neighbour, second: Neighbour) -> None:
    assert first.ask("allocate", 1000)[0] == 0
    assert second.ask("allocate", 500)[0] == 0
    left = TOTAL - 2 * CONTEXT - 1500 * MIB
    assert (first.free_bytes(), second.free_bytes()) == (left, left)


def test_freed_memory_is_free_for_all_processes(first: Neighbour, second: Neighbour) -> None:
    _, address = first.ask("allocate", 1000)
    before = second.free_bytes()
    assert first.ask("free", address) == 0
    assert second.free_bytes() - before == 1000 * MIB


def test_an_allocation_fails_while_another_process_uses_the_memory(first: Neighbour, second: Neighbour) -> None:
    _, address = first.ask("allocate", 10 * 1024)
    assert second.ask("allocate", 6 * 1024)[0] == OUT_OF_MEMORY
    assert first.ask("free", address) == 0
    assert second.ask("allocate", 6 * 1024)[0] == 0


def test_a_context_that_does_not_fit_is_out_of_memory(first: Neighbour, second: Neighbour) -> None:
    left = first.free_bytes()
    assert first.ask("allocate", left // MIB - 100)[0] == 0
    assert second.ask("call_without_context") == [0, 0, 0, 0, 0]
    assert second.ask("info")[0] == OUT_OF_MEMORY
    assert second.ask("allocate", 2)[0] == OUT_OF_MEMORY


def test_concurrent_allocations_never_exceed_the_capacity(
    first: Neighbour, second: Neighbour, device_file: Path
) -> None:
    with Neighbour(device_file) as third:
        processes = (first, second, third)
        before = [neighbour.free_bytes() for neighbour in processes][-1]
        for neighbour in processes:
            neighbour.send("allocate_all", 20)
        counts = [neighbour.answer() for neighbour in processes]
        assert sum(counts) == before // (20 * MIB)
        assert third.free_bytes() == before - sum(counts) * 20 * MIB


def test_two_files_are_two_devices(first: Neighbour, tmp_path: Path) -> None:
    first.ask("allocate", 1000)
    with Neighbour(tmp_path / "other") as other:
        assert other.free_bytes() == TOTAL - CONTEXT


# ---- contexts


def test_querying_the_device_uses_no_memory(first: Neighbour, second: Neighbour) -> None:
    assert first.ask("call_without_context") == [0, 0, 0, 0, 0]
    assert second.free_bytes() == TOTAL - CONTEXT


@pytest.mark.parametrize(
    "call",
    [
        "cudaFree",
        "cudaSetDevice",
        "cudaMemGetInfo",
        "cudaStreamCreate",
        "cudaEventCreate",
        "cudaDeviceSynchronize",
        "cublasCreate_v2",
    ],
)
def test_the_first_call_that_works_on_the_device_creates_the_context_once(
    first: Neighbour, second: Neighbour, call: str
) -> None:
    assert [second.ask("call_with_context", call) for _ in range(2)] == [0, 0]
    assert first.free_bytes() == TOTAL - 2 * CONTEXT


# ---- end of a process


def test_memory_is_freed_when_a_process_exits(first: Neighbour, second: Neighbour) -> None:
    before = first.free_bytes()
    assert second.ask("allocate", 3000)[0] == 0
    assert before - first.free_bytes() == CONTEXT + 3000 * MIB
    assert second.end() == 0
    assert first.free_bytes() == before


def test_memory_is_freed_when_a_process_is_killed(first: Neighbour, second: Neighbour) -> None:
    before = first.free_bytes()
    second.ask("allocate", 3000)
    second.kill()
    assert first.free_bytes() == before


def test_memory_of_a_zombie_is_free(first: Neighbour, device_file: Path) -> None:
    before = first.free_bytes()
    with Neighbour(device_file) as second:
        second.ask("allocate", 3000)
        os.kill(second.pid, signal.SIGKILL)
        os.waitid(os.P_PID, second.pid, os.WEXITED | os.WNOWAIT)  # a zombie from here on
        assert first.free_bytes() == before


@pytest.mark.parametrize("dots", [1, 2, 3, 5, 8, 13, 21, 34])
def test_a_process_killed_while_writing_blocks_no_other(first: Neighbour, device_file: Path, dots: int) -> None:
    before = first.free_bytes()
    with Neighbour(device_file) as second:
        second.send("allocate_and_free_forever")
        assert second.read_dots(dots) == b"." * dots
        second.kill()
    assert first.free_bytes() == before
    assert first.ask("allocate", 100)[0] == 0


def test_the_lock_of_a_killed_process_is_released(first: Neighbour, device_file: Path) -> None:
    before = first.free_bytes()
    source = "import fcntl, sys; f = open(sys.argv[1]); fcntl.flock(f, fcntl.LOCK_EX); print(flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", source, device_file], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"\n"
        first.send("info")
        assert not first.has_answered(0.3)
        holder.kill()
        assert first.answer()[1] == before


# ---- the table


def started(pid: int) -> int:
    """Return the start time of a process in ticks. Source: proc_pid_stat(5), field 22."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])


def write_slot(device_file: Path, slot: int, pid: int, started_at: int, bytes_there: int) -> None:
    with device_file.open("r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(32 * (1 + slot))
        file.write(struct.pack("QQQQ", pid, started_at, 0, bytes_there))


def ended_process() -> int:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    return process.pid


def test_the_slot_of_a_running_process_counts(first: Neighbour, device_file: Path) -> None:
    before = first.free_bytes()
    write_slot(device_file, 5, os.getpid(), started(os.getpid()), GIB)
    assert before - first.free_bytes() == GIB


@pytest.mark.parametrize(
    ("pid", "started_at"),
    [
        pytest.param(os.getpid, lambda: started(os.getpid()) - 1, id="pid reused by a later process"),
        pytest.param(ended_process, lambda: 1, id="process has ended"),
        pytest.param(lambda: 0, lambda: 0, id="half written"),
    ],
)
def test_the_slot_of_an_ended_process_does_not_count(
    first: Neighbour, device_file: Path, pid: Callable[[], int], started_at: Callable[[], int]
) -> None:
    before = first.free_bytes()
    write_slot(device_file, 5, pid(), started_at(), GIB)
    assert first.free_bytes() == before


def test_slots_of_ended_processes_are_reused(first: Neighbour, second: Neighbour, device_file: Path) -> None:
    before, ended = first.free_bytes(), ended_process()
    for slot in range(1, SLOTS):
        write_slot(device_file, slot, ended, 1, MIB)
    assert second.ask("allocate", 10)[0] == 0
    assert before - first.free_bytes() == CONTEXT + 10 * MIB


def test_a_table_full_of_running_processes_is_a_busy_device(first: Neighbour, device_file: Path) -> None:
    device_file.write_bytes(b"hf_bsopt virtual GPU 1".ljust(32, b"\0") + bytes(32 * SLOTS))
    for slot in range(SLOTS):
        write_slot(device_file, slot, os.getpid(), started(os.getpid()), MIB)
    assert first.ask("allocate", 10)[0] == UNAVAILABLE
    assert first.ask("error", UNAVAILABLE)[0] == "cudaErrorDevicesUnavailable"


@pytest.mark.parametrize("content", [b"notes", b"n" * 4096, b"n" * 5000])
def test_a_file_that_is_not_a_device_table_is_refused_and_unchanged(
    first: Neighbour, device_file: Path, content: bytes
) -> None:
    device_file.write_bytes(content)
    assert first.ask("allocate", 10)[0] == UNAVAILABLE
    assert device_file.read_bytes() == content
