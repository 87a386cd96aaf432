"""Which exceptions are out-of-memory errors: by message, by type, through chains, and in real failures."""

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
from oom_messages import NCCL, OOM_MESSAGES, OTHER_MESSAGES
from torch._utils import ExceptionWrapper

from hf_bsopt.probing import oom
from hf_bsopt.probing.oom import LONGEST_MESSAGE, TABLE, OutOfMemory, Where, out_of_memory

ROOT = Path(__file__).resolve().parents[2]


def classified(error: BaseException) -> OutOfMemory:
    found = out_of_memory(error)
    assert found is not None
    return found


@pytest.mark.parametrize(("message", "where", "certain"), OOM_MESSAGES)
def test_a_known_message_is_recognized(message: str, where: Where, certain: bool) -> None:
    found = classified(RuntimeError(message))
    assert (found.where, found.certain) == (where, certain)


def test_every_row_matches_a_message_that_was_seen() -> None:
    sources = {classified(RuntimeError(message)).source for message, _, _ in OOM_MESSAGES}
    assert sources == {row.source for row in TABLE}
    assert len(sources) == len(TABLE)


@pytest.mark.parametrize(("message", "where", "certain"), OOM_MESSAGES)
def test_the_reported_message_is_one_short_line(message: str, where: Where, certain: bool) -> None:
    line = classified(RuntimeError(message)).message
    assert 0 < len(line) <= LONGEST_MESSAGE
    assert "\n" not in line
    assert line.rstrip("…") in message


def test_the_reported_message_includes_the_size() -> None:
    allocating = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 14.56 GiB of which 1 is"
    assert classified(RuntimeError(allocating)).message == "CUDA out of memory. Tried to allocate 2.00 GiB"
    host = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
    host += "allocate 34359738368 bytes. Error code 12 (Cannot allocate memory)"
    wanted = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 34359738368 bytes"
    assert classified(RuntimeError(host)).message == wanted


@pytest.mark.parametrize("message", OTHER_MESSAGES)
def test_other_errors_are_not_out_of_memory(message: str) -> None:
    assert out_of_memory(RuntimeError(message)) is None


@pytest.mark.parametrize("kind", [ValueError, KeyError, TypeError, AssertionError, OSError])
def test_the_message_alone_is_not_enough_for_other_types(kind: type[Exception]) -> None:
    assert out_of_memory(kind("CUDA out of memory. Tried to allocate 2.00 GiB.")) is None


# ---- by type


@pytest.mark.parametrize("message", ["CUDA out of memory. Tried to allocate 2.00 GiB.", "an unknown message", ""])
def test_pytorchs_type_is_enough(message: str) -> None:
    found = classified(torch.OutOfMemoryError(message))
    assert (found.where, found.certain, found.source) == ("device", True, "torch.OutOfMemoryError")
    assert found.message in (message.rstrip("."), "OutOfMemoryError")


def test_a_memory_error_is_host_memory() -> None:
    assert classified(MemoryError()) == OutOfMemory("host", True, "MemoryError", "MemoryError")


def test_a_numpy_array_that_is_too_large_is_host_memory() -> None:
    """The array has more bytes than the address space."""
    with pytest.raises(MemoryError) as caught:
        np.empty(1 << 59)
    found = classified(caught.value)
    assert (found.where, found.certain) == ("host", True)
    assert found.message.startswith("Unable to allocate 4.00 EiB for an array")


def test_enomem_is_the_only_os_error_that_counts() -> None:
    found = classified(OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)))
    assert (found.where, found.certain) == ("host", True)
    assert out_of_memory(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))) is None
    assert out_of_memory(FileNotFoundError(errno.ENOENT, "Cannot allocate memory")) is None


def test_an_accelerator_error_is_classified_by_its_message() -> None:
    """PyTorch raises this RuntimeError for runtime errors outside its allocator."""
    found = classified(torch.AcceleratorError("CUDA error: out of memory\nSearch for `cudaErrorMemoryAllocation' in"))
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
            raise outer  # noqa: B904  this is the case under test
    except BaseException as error:
        return error


def test_the_cause_of_an_error_counts() -> None:
    inner = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    assert classified(raised(ValueError("step 3 failed"), inner)) == classified(inner)
    assert classified(raised(KeyError("x"), raised(ValueError("step 3 failed"), inner))) == classified(inner)


def test_a_bug_in_an_except_block_is_not_out_of_memory() -> None:
    error = raised_while_handling(
        NameError("name 'tocrh' is not defined"), torch.OutOfMemoryError("CUDA out of memory.")
    )
    assert error.__context__ is not None
    assert out_of_memory(error) is None


def test_out_of_memory_raised_while_handling_another_error_counts() -> None:
    assert classified(raised_while_handling(torch.OutOfMemoryError("CUDA out of memory."), ValueError("x"))).certain


def test_an_unrelated_cause_changes_nothing() -> None:
    assert classified(raised(MemoryError(), ValueError("x"))).where == "host"
    assert out_of_memory(raised(ValueError("x"), KeyError("y"))) is None


def test_certain_matches_take_precedence() -> None:
    suspected = RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR")
    assert not classified(suspected).certain
    assert classified(raised(suspected, MemoryError())).certain
    assert classified(RuntimeError(f"{NCCL}Failed to CUDA calloc 4 bytes\nCuda failure 2 'out of memory'")).certain


def test_a_circular_chain_of_causes_ends() -> None:
    first, second = ValueError("x"), ValueError("y")
    first.__cause__, second.__cause__ = second, first
    assert out_of_memory(first) is None


@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, RuntimeError])
def test_the_message_is_found_in_the_traceback_of_a_worker_or_replica(kind: type[Exception]) -> None:
    """DataLoader and DataParallel re-raise errors with the message in the middle of a traceback."""
    try:
        raise kind("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 1 has a total capacity of 14.56 GiB")
    except Exception:
        sent = ExceptionWrapper(where="in replica 1 on device 1")
    with pytest.raises(kind) as caught:
        sent.reraise()
    assert str(caught.value).startswith("Caught ")
    assert classified(caught.value).message == "CUDA out of memory. Tried to allocate 2.00 GiB"


def test_a_message_after_a_prefix_is_found() -> None:
    assert classified(RuntimeError("step 3 failed: CUDA error: out of memory")).message == "CUDA error: out of memory"
    assert classified(RuntimeError("[rank7]: CUDA out of memory.")).certain


# ---- in separate processes


def run(script: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    return done.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="the limit holds for mapped memory only on Linux")
@pytest.mark.parametrize(
    ("allocation", "source"),
    [("torch.empty(1 << 33)", "PyTorch, c10/core/impl/alloc_cpu.cpp"), ("bytearray(1 << 36)", "MemoryError")],
)
def test_a_real_failed_host_allocation_is_recognized(allocation: str, source: str) -> None:
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


def test_classifying_does_not_import_torch() -> None:
    """The module is loaded alone, since its package does import torch."""
    output = run(
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('oom', {oom.__file__!r})\n"
        "module = sys.modules['oom'] = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "print(module.out_of_memory(RuntimeError('CUDA error: out of memory')).where, 'torch' in sys.modules)"
    )
    assert output.split() == ["device", "False"]
