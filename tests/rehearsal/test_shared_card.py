"""A virtual card that several processes are on: what one has, another has not, and what ends gives back."""

from __future__ import annotations

import fcntl
import importlib.util
import json
import os
import signal
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from neighbours import Neighbour
from rehearsing import NEEDS_THE_DEVICE, SCRIPTS

from hf_bsopt import catalog, rehearsal

pytestmark = NEEDS_THE_DEVICE
needs_pynvml = pytest.mark.skipif(importlib.util.find_spec("pynvml") is None, reason="nvidia-ml-py is not installed")

T4 = catalog.gpu("T4")
TOTAL, CONTEXT = T4.total_bytes or 0, T4.context_bytes
MIB, GIB = 2**20, 2**30
OUT_OF_MEMORY, INITIALIZATION_ERROR, UNAVAILABLE = 2, 3, 46
SLOTS = 127


@pytest.fixture
def card(tmp_path: Path) -> Path:
    return tmp_path / "card"


@pytest.fixture
def first(card: Path) -> Iterator[Neighbour]:
    with Neighbour(card) as neighbour:
        yield neighbour


@pytest.fixture
def second(card: Path) -> Iterator[Neighbour]:
    with Neighbour(card) as neighbour:
        yield neighbour


def free(neighbour: Neighbour) -> int:
    status, free_bytes, total = neighbour.ask("info")
    assert (status, total) == (0, TOTAL)
    return int(free_bytes)


# ---- memory


def test_each_sees_what_the_other_took_and_both_contexts(first: Neighbour, second: Neighbour) -> None:
    assert first.ask("take", 1000)[0] == 0
    assert second.ask("take", 500)[0] == 0
    left = TOTAL - 2 * CONTEXT - 1500 * MIB
    assert (free(first), free(second)) == (left, left)


def test_what_is_given_back_is_free_for_all(first: Neighbour, second: Neighbour) -> None:
    _, address = first.ask("take", 1000)
    before = free(second)
    assert first.ask("give_back", address) == 0
    assert free(second) - before == 1000 * MIB


def test_an_allocation_is_refused_while_another_process_has_the_memory(first: Neighbour, second: Neighbour) -> None:
    _, address = first.ask("take", 10 * 1024)
    assert second.ask("take", 6 * 1024)[0] == OUT_OF_MEMORY
    assert first.ask("give_back", address) == 0
    assert second.ask("take", 6 * 1024)[0] == 0


def test_a_context_that_does_not_fit_is_out_of_memory_too(first: Neighbour, second: Neighbour) -> None:
    left = free(first)
    assert first.ask("take", left // MIB - 100)[0] == 0
    assert second.ask("makes_no_context") == [0, 0, 0, 0, 0]
    assert second.ask("info")[0] == OUT_OF_MEMORY
    assert second.ask("take", 2)[0] == OUT_OF_MEMORY


def test_processes_that_take_at_once_never_have_more_than_there_is(
    first: Neighbour, second: Neighbour, card: Path
) -> None:
    with Neighbour(card) as third:
        all_of_them = (first, second, third)
        before = [free(neighbour) for neighbour in all_of_them][-1]
        for neighbour in all_of_them:
            neighbour.order("take_all", 20)
        counts = [neighbour.answer() for neighbour in all_of_them]
        assert sum(counts) == before // (20 * MIB)
        assert free(third) == before - sum(counts) * 20 * MIB


def test_two_files_are_two_cards(first: Neighbour, tmp_path: Path) -> None:
    first.ask("take", 1000)
    with Neighbour(tmp_path / "other") as elsewhere:
        assert free(elsewhere) == TOTAL - CONTEXT


# ---- contexts


def test_asking_what_card_there_is_takes_nothing_of_it(first: Neighbour, second: Neighbour) -> None:
    assert first.ask("makes_no_context") == [0, 0, 0, 0, 0]
    assert free(second) == TOTAL - CONTEXT


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
    assert [second.ask("makes_the_context", call) for _ in range(2)] == [0, 0]
    assert free(first) == TOTAL - 2 * CONTEXT


# ---- ends


def test_what_a_process_had_is_free_when_it_ended(first: Neighbour, second: Neighbour) -> None:
    before = free(first)
    assert second.ask("take", 3000)[0] == 0
    assert before - free(first) == CONTEXT + 3000 * MIB
    assert second.end() == 0
    assert free(first) == before


def test_what_a_process_had_is_free_when_it_was_killed(first: Neighbour, second: Neighbour) -> None:
    before = free(first)
    second.ask("take", 3000)
    second.kill()
    assert free(first) == before


def test_a_process_that_was_killed_and_that_nobody_waited_for_has_ended(first: Neighbour, card: Path) -> None:
    before = free(first)
    with Neighbour(card) as second:
        second.ask("take", 3000)
        os.kill(second.pid, signal.SIGKILL)
        os.waitid(os.P_PID, second.pid, os.WEXITED | os.WNOWAIT)  # a zombie from here on
        assert free(first) == before


@pytest.mark.parametrize("letters", [1, 2, 3, 5, 8, 13, 21, 34])
def test_a_process_that_is_killed_as_it_writes_stops_nobody(first: Neighbour, card: Path, letters: int) -> None:
    before = free(first)
    with Neighbour(card) as second:
        second.order("without_end")
        assert second.letters(letters) == b"." * letters
        second.kill()
    assert free(first) == before
    assert first.ask("take", 100)[0] == 0


def test_the_lock_of_a_process_that_was_killed_inside_ends_with_it(first: Neighbour, card: Path) -> None:
    before = free(first)
    source = "import fcntl, sys; f = open(sys.argv[1]); fcntl.flock(f, fcntl.LOCK_EX); print(flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", source, card], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"\n"
        first.order("info")
        assert not first.has_answered(0.3)
        holder.kill()
        assert first.answer()[1] == before


# ---- the table


def started(pid: int) -> int:
    """Source: proc_pid_stat(5), field 22."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])


def write_slot(card: Path, slot: int, pid: int, started_at: int, bytes_there: int) -> None:
    with card.open("r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(32 * (1 + slot))
        file.write(struct.pack("QQQQ", pid, started_at, 0, bytes_there))


def ended_process() -> int:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    return process.pid


def test_the_slot_of_a_process_that_lives_counts(first: Neighbour, card: Path) -> None:
    before = free(first)
    write_slot(card, 5, os.getpid(), started(os.getpid()), GIB)
    assert before - free(first) == GIB


@pytest.mark.parametrize(
    ("pid", "started_at"),
    [
        pytest.param(os.getpid, lambda: started(os.getpid()) - 1, id="its number was given to a later process"),
        pytest.param(ended_process, lambda: 1, id="it is gone"),
        pytest.param(lambda: 0, lambda: 0, id="half written"),
    ],
)
def test_the_slot_of_a_process_that_is_no_more_counts_nothing(
    first: Neighbour, card: Path, pid: Callable[[], int], started_at: Callable[[], int]
) -> None:
    before = free(first)
    write_slot(card, 5, pid(), started_at(), GIB)
    assert free(first) == before


def test_a_table_full_of_the_ended_has_room_for_the_living(first: Neighbour, second: Neighbour, card: Path) -> None:
    before, gone = free(first), ended_process()
    for slot in range(1, SLOTS):
        write_slot(card, slot, gone, 1, MIB)
    assert second.ask("take", 10)[0] == 0
    assert before - free(first) == CONTEXT + 10 * MIB


def test_a_table_full_of_the_living_is_a_card_that_is_busy(first: Neighbour, card: Path) -> None:
    card.write_bytes(b"hf_bsopt virtual card 1".ljust(32, b"\0") + bytes(32 * SLOTS))
    for slot in range(SLOTS):
        write_slot(card, slot, os.getpid(), started(os.getpid()), MIB)
    assert first.ask("take", 10)[0] == UNAVAILABLE
    assert first.ask("error", UNAVAILABLE)[0] == "cudaErrorDevicesUnavailable"


@pytest.mark.parametrize("content", [b"notes", b"n" * 4096, b"n" * 5000])
def test_a_file_that_is_no_card_is_refused_and_left_as_it_is(first: Neighbour, card: Path, content: bytes) -> None:
    card.write_bytes(content)
    assert first.ask("take", 10)[0] == UNAVAILABLE
    assert card.read_bytes() == content


# ---- forks


def test_a_process_that_was_forked_before_has_a_place_of_its_own(first: Neighbour, second: Neighbour) -> None:
    before = free(first)
    assert second.ask("driver_status") == INITIALIZATION_ERROR
    (status, _), (_, seen, _) = second.ask("in_fork", "both", "take", 1000, "and", "info")
    assert (status, seen) == (0, before - CONTEXT - 1000 * MIB)
    assert free(first) == before
    assert second.ask("take", 10)[0] == 0


@pytest.mark.parametrize("before", [("makes_no_context",), ("take", 10)], ids=["initialised", "with a context"])
@pytest.mark.parametrize(
    "call", [("take", 10), ("info",), ("makes_the_context", "cudaSetDevice"), ("makes_the_context", "cudaEventCreate")]
)
def test_a_process_that_was_forked_after_is_refused(
    first: Neighbour, before: tuple[object, ...], call: tuple[object, ...]
) -> None:
    """pytorch/pytorch#190708: "CUDA error: initialization error"."""
    first.ask(*before)
    refused = first.ask("in_fork", *call)
    assert (refused[0] if isinstance(refused, list) else refused) == INITIALIZATION_ERROR
    assert first.ask("error", INITIALIZATION_ERROR) == ["cudaErrorInitializationError", "initialization error"]


def test_even_asking_for_the_driver_is_refused_there(first: Neighbour) -> None:
    """triton-lang/triton#10443: cuInit itself gives CUDA_ERROR_NOT_INITIALIZED. Launches tell it by the last error."""
    first.ask("makes_no_context")
    assert first.ask("in_fork", "makes_no_context") == [INITIALIZATION_ERROR] * 5
    assert first.ask("in_fork", "last_errors") == [INITIALIZATION_ERROR] * 2
    assert first.ask("last_errors") == [0, 0]


def test_the_parent_goes_on_after_such_a_fork(first: Neighbour) -> None:
    first.ask("take", 10)
    before = free(first)
    first.ask("in_fork", "take", 10)
    assert free(first) == before
    assert first.ask("take", 10)[0] == 0


# ---- NVML


@needs_pynvml
def test_nvml_lists_the_processes_with_what_they_have(first: Neighbour, second: Neighbour) -> None:
    first.ask("take", 1000)
    second.ask("take", 500)
    with_bytes = [[first.pid, CONTEXT + 1000 * MIB], [second.pid, CONTEXT + 500 * MIB]]
    assert sorted(first.ask("nvml")["processes"]) == sorted(with_bytes)
    second.kill()
    assert first.ask("nvml")["processes"] == with_bytes[:1]


@needs_pynvml
def test_nvml_says_of_the_memory_what_the_runtime_says(first: Neighbour, second: Neighbour) -> None:
    first.ask("take", 1000)
    facts = second.ask("nvml")  # which is on the card no more than before
    left = free(first)
    assert facts["memory"] == [TOTAL, left, TOTAL - left]
    assert facts["memory_v2"] == [TOTAL, left, TOTAL - left, 0]


@needs_pynvml
def test_nvml_asks_without_a_context_or_a_driver_and_can_be_asked_after_a_fork(
    first: Neighbour, second: Neighbour
) -> None:
    first.ask("take", 10)
    assert second.ask("nvml")["processes"] == [[first.pid, CONTEXT + 10 * MIB]]
    assert second.ask("driver_status") == INITIALIZATION_ERROR
    assert first.ask("in_fork", "nvml")["processes"] == [[first.pid, CONTEXT + 10 * MIB]]


@needs_pynvml
def test_nvml_knows_one_card_and_which(first: Neighbour) -> None:
    facts = first.ask("nvml")
    assert (facts["count"], facts["name"], facts["capability"]) == (1, T4.name, [7, 5])
    assert facts["found_by_uuid"] == T4.name
    assert facts["processes"] == facts["graphics"] == []
    assert int(facts["driver"].split(".")[0]) >= 525


@needs_pynvml
def test_nvml_refuses_as_the_real_one(first: Neighbour) -> None:
    facts = first.ask("nvml")
    assert facts["errors"] == ["Invalid Argument", "Not Found", "Function Not Found"]
    assert facts["after_shutdown"] == "Uninitialized"


# ---- PyTorch


@pytest.fixture(scope="module")
def torch_beside_a_neighbour(once: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The facts, how it ended, and what was free before and after, beside a process that has 4 GiB."""

    def run() -> dict[str, Any]:
        card = tmp_path_factory.mktemp("shared") / "card"
        with Neighbour(card) as neighbour:
            neighbour.ask("take", 4096)
            before = free(neighbour)
            done = subprocess.run(
                [sys.executable, SCRIPTS / "torch_on_a_shared_card.py"],
                env=rehearsal.environment(T4, shared=card),
                capture_output=True,
                text=True,
                check=False,
            )
            ends = {"before": before, "after": free(neighbour), "neighbour": neighbour.pid}
        assert done.stdout, done.stderr
        return {**json.loads(done.stdout), **ends, "code": done.returncode, "error": done.stderr}

    found: dict[str, Any] = once("shared_card", run)
    return found


@needs_pynvml
def test_importing_torch_neither_initialises_the_driver_nor_makes_a_context(
    torch_beside_a_neighbour: dict[str, Any],
) -> None:
    assert torch_beside_a_neighbour["after_import"] == [False, None]


@needs_pynvml
def test_torch_finds_the_card_by_nvml_without_the_driver(torch_beside_a_neighbour: dict[str, Any]) -> None:
    assert torch_beside_a_neighbour["count_by_nvml"] == 1
    assert torch_beside_a_neighbour["is_available_by_nvml"] == [True, False]


@needs_pynvml
def test_torch_makes_a_context_only_for_its_first_tensor(torch_beside_a_neighbour: dict[str, Any]) -> None:
    assert torch_beside_a_neighbour["is_available"] == [True, True, None]
    assert torch_beside_a_neighbour["after_properties"] is None
    assert torch_beside_a_neighbour["after_64_mib"] == CONTEXT + 64 * MIB


@needs_pynvml
def test_torch_sees_what_the_neighbour_has(torch_beside_a_neighbour: dict[str, Any]) -> None:
    left = TOTAL - 2 * CONTEXT - 4096 * MIB - 64 * MIB
    assert torch_beside_a_neighbour["free_and_total"] == [left, TOTAL]


@needs_pynvml
def test_torch_and_nvml_mean_the_same_card(torch_beside_a_neighbour: dict[str, Any]) -> None:
    by_torch, by_nvml = torch_beside_a_neighbour["uuids"]
    assert by_torch == by_nvml


@needs_pynvml
def test_torch_is_refused_in_a_fork_that_came_too_late_and_in_no_other(
    torch_beside_a_neighbour: dict[str, Any],
) -> None:
    assert torch_beside_a_neighbour["fork_before"] == ["", "[4]"]
    assert torch_beside_a_neighbour["fork_after"][0] == "RuntimeError"
    assert "Cannot re-initialize CUDA in forked subprocess" in torch_beside_a_neighbour["fork_after"][1]
    assert torch_beside_a_neighbour["tensor_of_the_parent"] == ["AcceleratorError", "CUDA error: initialization error"]


@needs_pynvml
def test_torchs_out_of_memory_error_names_the_process_that_has_the_memory(
    torch_beside_a_neighbour: dict[str, Any],
) -> None:
    assert torch_beside_a_neighbour["code"] == 1
    assert (
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 12.00 GiB" in torch_beside_a_neighbour["error"]
    )
    having = f"Process {torch_beside_a_neighbour['neighbour']} has 4.42 GiB memory in use"
    assert having in torch_beside_a_neighbour["error"]


@needs_pynvml
def test_what_a_process_had_is_free_when_it_died_of_out_of_memory(torch_beside_a_neighbour: dict[str, Any]) -> None:
    assert torch_beside_a_neighbour["after"] == torch_beside_a_neighbour["before"]


def test_on_a_full_card_torchs_first_call_is_out_of_memory_of_another_type(first: Neighbour, card: Path) -> None:
    """pytorch/pytorch#46084: the context does not fit, and so there is no allocator yet to say it."""
    first.ask("take_all", 20)
    done = subprocess.run(
        [sys.executable, "-c", "import torch; torch.zeros(1, device='cuda')"],
        env=rehearsal.environment(T4, shared=card),
        capture_output=True,
        text=True,
        check=False,
    )
    assert "AcceleratorError: CUDA error: out of memory" in done.stderr
    assert "OutOfMemoryError" not in done.stderr
