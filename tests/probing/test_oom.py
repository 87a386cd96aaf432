"""What is want of memory and what is not, by message, by type, through chains, and where it really happens."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from oom_messages import NCCL, OTHERS, SAID
from torch._utils import ExceptionWrapper

from hf_bsopt.probing import oom
from hf_bsopt.probing.oom import LONGEST_MESSAGE, TABLE, OutOfMemory, Where, out_of_memory

ROOT = Path(__file__).resolve().parents[2]


def judged(error: BaseException) -> OutOfMemory:
    found = out_of_memory(error)
    assert found is not None
    return found


@pytest.mark.parametrize(("said", "where", "certain"), SAID)
def test_a_known_message_is_known(said: str, where: Where, certain: bool) -> None:
    found = judged(RuntimeError(said))
    assert (found.where, found.certain) == (where, certain)


def test_no_row_is_without_a_message_that_was_seen() -> None:
    sources = {judged(RuntimeError(said)).source for said, _, _ in SAID}
    assert sources == {row.source for row in TABLE}
    assert len(sources) == len(TABLE)


@pytest.mark.parametrize(("said", "where", "certain"), SAID)
def test_what_is_reported_is_one_short_line_of_the_message(said: str, where: Where, certain: bool) -> None:
    message = judged(RuntimeError(said)).message
    assert 0 < len(message) <= LONGEST_MESSAGE
    assert "\n" not in message
    assert message.rstrip("…") in said


def test_the_message_is_the_sentence_with_the_size() -> None:
    allocating = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 14.56 GiB of which 1 is"
    assert judged(RuntimeError(allocating)).message == "CUDA out of memory. Tried to allocate 2.00 GiB"
    host = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
    host += "allocate 34359738368 bytes. Error code 12 (Cannot allocate memory)"
    wanted = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 34359738368 bytes"
    assert judged(RuntimeError(host)).message == wanted


@pytest.mark.parametrize("said", OTHERS)
def test_another_error_is_not_taken_for_one(said: str) -> None:
    assert out_of_memory(RuntimeError(said)) is None


@pytest.mark.parametrize("kind", [ValueError, KeyError, TypeError, AssertionError, OSError])
def test_the_words_alone_are_not_enough(kind: type[Exception]) -> None:
    assert out_of_memory(kind("CUDA out of memory. Tried to allocate 2.00 GiB.")) is None


# ---- by type


@pytest.mark.parametrize("said", ["CUDA out of memory. Tried to allocate 2.00 GiB.", "words that nobody knows yet", ""])
def test_the_type_of_pytorch_suffices(said: str) -> None:
    found = judged(torch.OutOfMemoryError(said))
    assert (found.where, found.certain, found.source) == ("device", True, "torch.OutOfMemoryError")
    assert found.message in (said.rstrip("."), "OutOfMemoryError")


def test_a_memory_error_is_the_hosts() -> None:
    assert judged(MemoryError()) == OutOfMemory("host", True, "MemoryError", "MemoryError")


def test_an_array_of_numpy_that_does_not_fit_is_a_memory_error() -> None:
    """Of more bytes than there are addresses."""
    with pytest.raises(MemoryError) as caught:
        np.empty(1 << 59)
    found = judged(caught.value)
    assert (found.where, found.certain) == ("host", True)
    assert found.message.startswith("Unable to allocate 4.00 EiB for an array")


def test_of_the_systems_errors_only_the_one_for_memory_counts() -> None:
    found = judged(OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)))
    assert (found.where, found.certain) == ("host", True)
    assert out_of_memory(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))) is None
    assert out_of_memory(FileNotFoundError(errno.ENOENT, "Cannot allocate memory")) is None


def test_an_error_of_the_accelerator_is_looked_up() -> None:
    """PyTorch raises it, a RuntimeError, for what the runtime answers outside of its allocator."""
    found = judged(torch.AcceleratorError("CUDA error: out of memory\nSearch for `cudaErrorMemoryAllocation' in"))
    assert (found.where, found.certain, found.message) == ("device", True, "CUDA error: out of memory")


# ---- chains and wrappers


def raised(outer: BaseException, cause: BaseException) -> BaseException:
    try:
        raise outer from cause
    except BaseException as error:
        return error


def raised_while_handling(outer: BaseException, handled: BaseException) -> BaseException:
    try:
        try:
            raise handled
        except BaseException:
            raise outer  # noqa: B904  what is tested
    except BaseException as error:
        return error


def test_what_an_error_was_raised_from_counts() -> None:
    inner = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    assert judged(raised(ValueError("step 3 failed"), inner)) == judged(inner)
    assert judged(raised(KeyError("x"), raised(ValueError("step 3 failed"), inner))) == judged(inner)


def test_a_mistake_in_an_except_block_is_not_hidden_by_what_was_handled() -> None:
    error = raised_while_handling(
        NameError("name 'tocrh' is not defined"), torch.OutOfMemoryError("CUDA out of memory.")
    )
    assert error.__context__ is not None
    assert out_of_memory(error) is None


def test_out_of_memory_while_another_error_is_handled_is_one() -> None:
    assert judged(raised_while_handling(torch.OutOfMemoryError("CUDA out of memory."), ValueError("x"))).certain


def test_a_cause_that_is_another_error_changes_nothing() -> None:
    assert judged(raised(MemoryError(), ValueError("x"))).where == "host"
    assert out_of_memory(raised(ValueError("x"), KeyError("y"))) is None


def test_what_is_certain_goes_before_what_is_suspected() -> None:
    suspected = RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR")
    assert not judged(suspected).certain
    assert judged(raised(suspected, MemoryError())).certain
    assert judged(RuntimeError(f"{NCCL}Failed to CUDA calloc 4 bytes\nCuda failure 2 'out of memory'")).certain


def test_a_chain_that_bites_its_tail_ends() -> None:
    first, second = ValueError("x"), ValueError("y")
    first.__cause__, second.__cause__ = second, first
    assert out_of_memory(first) is None


@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, RuntimeError])
def test_what_a_worker_or_a_replica_sent_is_found_in_its_traceback(kind: type[Exception]) -> None:
    """As DataLoader and DataParallel raise it again: the message is in the middle of a traceback's text."""
    try:
        raise kind("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 1 has a total capacity of 14.56 GiB")
    except Exception:
        sent = ExceptionWrapper(where="in replica 1 on device 1")
    with pytest.raises(kind) as caught:
        sent.reraise()
    assert str(caught.value).startswith("Caught ")
    assert judged(caught.value).message == "CUDA out of memory. Tried to allocate 2.00 GiB"


def test_a_message_behind_somebodys_own_words_is_found() -> None:
    assert judged(RuntimeError("step 3 failed: CUDA error: out of memory")).message == "CUDA error: out of memory"
    assert judged(RuntimeError("[rank7]: CUDA out of memory.")).certain


# ---- in processes of their own


def run(script: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    return done.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="the limit holds for mapped memory only on Linux")
@pytest.mark.parametrize(
    ("allocation", "source"),
    [("torch.empty(1 << 33)", "PyTorch, c10/core/impl/alloc_cpu.cpp"), ("bytearray(1 << 36)", "MemoryError")],
)
def test_a_real_failure_of_the_hosts_allocator_is_known(allocation: str, source: str) -> None:
    found = json.loads(
        run(
            "import dataclasses, json, resource, torch\n"
            "from hf_bsopt.probing.oom import out_of_memory\n"
            "resource.setrlimit(resource.RLIMIT_DATA, (1 << 32, 1 << 32))\n"
            f"try:\n    {allocation}\n"
            "except Exception as error:\n    print(json.dumps(dataclasses.asdict(out_of_memory(error))))\n"
        )
    )
    assert (found["where"], found["certain"]) == ("host", True)
    assert found["source"].startswith(source)


def test_pytorch_is_not_imported_to_ask() -> None:
    """The module by itself: its package does import it."""
    said = run(
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('oom', {oom.__file__!r})\n"
        "module = sys.modules['oom'] = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "print(module.out_of_memory(RuntimeError('CUDA error: out of memory')).where, 'torch' in sys.modules)"
    )
    assert said.split() == ["device", "False"]
