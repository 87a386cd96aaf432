"""A virtual card that several processes are on: what one has, another has not, and what ends gives back."""

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


def test_each_sees_what_the_other_took_and_both_contexts(first: Neighbour, second: Neighbour) -> None:
    assert first.ask("take", 1000)[0] == 0
    assert second.ask("take", 500)[0] == 0
    left = TOTAL - 2 * CONTEXT - 1500 * MIB
    assert (first.free_bytes(), second.free_bytes()) == (left, left)


def test_what_is_given_back_is_free_for_all(first: Neighbour, second: Neighbour) -> None:
    _, address = first.ask("take", 1000)
    before = second.free_bytes()
    assert first.ask("give_back", address) == 0
    assert second.free_bytes() - before == 1000 * MIB


def test_an_allocation_is_refused_while_another_process_has_the_memory(first: Neighbour, second: Neighbour) -> None:
    _, address = first.ask("take", 10 * 1024)
    assert second.ask("take", 6 * 1024)[0] == OUT_OF_MEMORY
    assert first.ask("give_back", address) == 0
    assert second.ask("take", 6 * 1024)[0] == 0


def test_a_context_that_does_not_fit_is_out_of_memory_too(first: Neighbour, second: Neighbour) -> None:
    left = first.free_bytes()
    assert first.ask("take", left // MIB - 100)[0] == 0
    assert second.ask("call_without_context") == [0, 0, 0, 0, 0]
    assert second.ask("info")[0] == OUT_OF_MEMORY
    assert second.ask("take", 2)[0] == OUT_OF_MEMORY


def test_processes_that_take_at_once_never_have_more_than_there_is(
    first: Neighbour, second: Neighbour, device_file: Path
) -> None:
    with Neighbour(device_file) as third:
        all_of_them = (first, second, third)
        before = [neighbour.free_bytes() for neighbour in all_of_them][-1]
        for neighbour in all_of_them:
            neighbour.send("take_all", 20)
        counts = [neighbour.answer() for neighbour in all_of_them]
        assert sum(counts) == before // (20 * MIB)
        assert third.free_bytes() == before - sum(counts) * 20 * MIB


def test_two_files_are_two_cards(first: Neighbour, tmp_path: Path) -> None:
    first.ask("take", 1000)
    with Neighbour(tmp_path / "other") as elsewhere:
        assert elsewhere.free_bytes() == TOTAL - CONTEXT


# ---- contexts


def test_asking_what_card_there_is_takes_nothing_of_it(first: Neighbour, second: Neighbour) -> None:
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
def test_the_first_call_that_works_on_the_device_takes_the_context_once(
    first: Neighbour, second: Neighbour, call: str
) -> None:
    assert [second.ask("call_with_context", call) for _ in range(2)] == [0, 0]
    assert first.free_bytes() == TOTAL - 2 * CONTEXT


# ---- ends


def test_what_a_process_had_is_free_when_it_ended(first: Neighbour, second: Neighbour) -> None:
    before = first.free_bytes()
    assert second.ask("take", 3000)[0] == 0
    assert before - first.free_bytes() == CONTEXT + 3000 * MIB
    assert second.end() == 0
    assert first.free_bytes() == before


def test_what_a_process_had_is_free_when_it_was_killed(first: Neighbour, second: Neighbour) -> None:
    before = first.free_bytes()
    second.ask("take", 3000)
    second.kill()
    assert first.free_bytes() == before


def test_a_process_that_was_killed_and_that_nobody_waited_for_has_ended(first: Neighbour, device_file: Path) -> None:
    before = first.free_bytes()
    with Neighbour(device_file) as second:
        second.ask("take", 3000)
        os.kill(second.pid, signal.SIGKILL)
        os.waitid(os.P_PID, second.pid, os.WEXITED | os.WNOWAIT)  # a zombie from here on
        assert first.free_bytes() == before


@pytest.mark.parametrize("dots", [1, 2, 3, 5, 8, 13, 21, 34])
def test_a_process_that_is_killed_as_it_writes_stops_nobody(first: Neighbour, device_file: Path, dots: int) -> None:
    before = first.free_bytes()
    with Neighbour(device_file) as second:
        second.send("take_and_free_forever")
        assert second.read_dots(dots) == b"." * dots
        second.kill()
    assert first.free_bytes() == before
    assert first.ask("take", 100)[0] == 0


def test_the_lock_of_a_process_that_was_killed_inside_ends_with_it(first: Neighbour, device_file: Path) -> None:
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
    """Source: proc_pid_stat(5), field 22."""
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


def test_the_slot_of_a_process_that_lives_counts(first: Neighbour, device_file: Path) -> None:
    before = first.free_bytes()
    write_slot(device_file, 5, os.getpid(), started(os.getpid()), GIB)
    assert before - first.free_bytes() == GIB


@pytest.mark.parametrize(
    ("pid", "started_at"),
    [
        pytest.param(os.getpid, lambda: started(os.getpid()) - 1, id="its number was given to a later process"),
        pytest.param(ended_process, lambda: 1, id="it is gone"),
        pytest.param(lambda: 0, lambda: 0, id="half written"),
    ],
)
def test_the_slot_of_a_process_that_is_no_more_counts_nothing(
    first: Neighbour, device_file: Path, pid: Callable[[], int], started_at: Callable[[], int]
) -> None:
    before = first.free_bytes()
    write_slot(device_file, 5, pid(), started_at(), GIB)
    assert first.free_bytes() == before


def test_a_table_full_of_the_ended_has_room_for_the_living(
    first: Neighbour, second: Neighbour, device_file: Path
) -> None:
    before, gone = first.free_bytes(), ended_process()
    for slot in range(1, SLOTS):
        write_slot(device_file, slot, gone, 1, MIB)
    assert second.ask("take", 10)[0] == 0
    assert before - first.free_bytes() == CONTEXT + 10 * MIB


def test_a_table_full_of_the_living_is_a_card_that_is_busy(first: Neighbour, device_file: Path) -> None:
    device_file.write_bytes(b"hf_bsopt virtual GPU 1".ljust(32, b"\0") + bytes(32 * SLOTS))
    for slot in range(SLOTS):
        write_slot(device_file, slot, os.getpid(), started(os.getpid()), MIB)
    assert first.ask("take", 10)[0] == UNAVAILABLE
    assert first.ask("error", UNAVAILABLE)[0] == "cudaErrorDevicesUnavailable"


@pytest.mark.parametrize("content", [b"notes", b"n" * 4096, b"n" * 5000])
def test_a_file_that_is_no_card_is_refused_and_left_as_it_is(
    first: Neighbour, device_file: Path, content: bytes
) -> None:
    device_file.write_bytes(content)
    assert first.ask("take", 10)[0] == UNAVAILABLE
    assert device_file.read_bytes() == content
