"""NVML on a shared device, and PyTorch using it."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from neighbours import CONTEXT, MIB, T4, TOTAL, Neighbour
from rehearsing import NEEDS_THE_DEVICE, SCRIPTS

from hf_bsopt import virtual_gpu

pytestmark = NEEDS_THE_DEVICE
needs_pynvml = pytest.mark.skipif(importlib.util.find_spec("pynvml") is None, reason="nvidia-ml-py is not installed")

INITIALIZATION_ERROR = 3


@needs_pynvml
def test_nvml_lists_the_processes_with_their_memory(first: Neighbour, second: Neighbour) -> None:
    first.ask("allocate", 1000)
    second.ask("allocate", 500)
    with_bytes = [[first.pid, CONTEXT + 1000 * MIB], [second.pid, CONTEXT + 500 * MIB]]
    assert sorted(first.ask("nvml")["processes"]) == sorted(with_bytes)
    second.kill()
    assert first.ask("nvml")["processes"] == with_bytes[:1]


@needs_pynvml
def test_nvml_and_the_runtime_agree_on_memory(first: Neighbour, second: Neighbour) -> None:
    first.ask("allocate", 1000)
    facts = second.ask("nvml")  # which does not create a context
    left = first.free_bytes()
    assert facts["memory"] == [TOTAL, left, TOTAL - left]
    assert facts["memory_v2"] == [TOTAL, left, TOTAL - left, 0]


@needs_pynvml
def test_nvml_needs_no_context_or_driver_and_works_after_a_fork(first: Neighbour, second: Neighbour) -> None:
    first.ask("allocate", 10)
    assert second.ask("nvml")["processes"] == [[first.pid, CONTEXT + 10 * MIB]]
    assert second.ask("driver_status") == INITIALIZATION_ERROR
    assert first.ask("in_fork", "nvml")["processes"] == [[first.pid, CONTEXT + 10 * MIB]]


@needs_pynvml
def test_nvml_reports_one_device_and_its_properties(first: Neighbour) -> None:
    facts = first.ask("nvml")
    assert (facts["count"], facts["name"], facts["capability"]) == (1, T4.name, [7, 5])
    assert facts["found_by_uuid"] == T4.name
    assert facts["processes"] == facts["graphics"] == []
    assert int(facts["driver"].split(".")[0]) >= 525


@needs_pynvml
def test_nvml_errors_are_those_of_the_real_one(first: Neighbour) -> None:
    facts = first.ask("nvml")
    assert facts["errors"] == ["Invalid Argument", "Not Found", "Function Not Found"]
    assert facts["after_shutdown"] == "Uninitialized"


# ---- PyTorch


@pytest.fixture(scope="module")
def torch_beside_a_neighbour(once: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Run the script beside a process that uses 4 GiB; return its facts, exit code and the free bytes around it."""

    def run() -> dict[str, Any]:
        device_file = tmp_path_factory.mktemp("shared") / "device"
        with Neighbour(device_file) as neighbour:
            neighbour.ask("allocate", 4096)
            before = neighbour.free_bytes()
            done = subprocess.run(
                [sys.executable, SCRIPTS / "torch_on_a_shared_gpu.py"],
                env=virtual_gpu.environment(T4, shared=device_file),
                capture_output=True,
                text=True,
                check=False,
            )
            ends = {"before": before, "after": neighbour.free_bytes(), "neighbour": neighbour.pid}
        assert done.stdout, done.stderr
        return {**json.loads(done.stdout), **ends, "code": done.returncode, "error": done.stderr}

    found: dict[str, Any] = once("shared_gpu", run)
    return found


@needs_pynvml
def test_importing_torch_neither_initializes_the_driver_nor_creates_a_context(
    torch_beside_a_neighbour: dict[str, Any],
) -> None:
    assert torch_beside_a_neighbour["after_import"] == [False, None]


@needs_pynvml
def test_torch_finds_the_gpu_through_nvml_without_the_driver(torch_beside_a_neighbour: dict[str, Any]) -> None:
    assert torch_beside_a_neighbour["count_by_nvml"] == 1
    assert torch_beside_a_neighbour["is_available_by_nvml"] == [True, False]


@needs_pynvml
def test_torch_creates_a_context_only_for_its_first_tensor(torch_beside_a_neighbour: dict[str, Any]) -> None:
    assert torch_beside_a_neighbour["is_available"] == [True, True, None]
    assert torch_beside_a_neighbour["after_properties"] is None
    assert torch_beside_a_neighbour["after_64_mib"] == CONTEXT + 64 * MIB


@needs_pynvml
def test_torch_sees_the_memory_of_the_neighbour(torch_beside_a_neighbour: dict[str, Any]) -> None:
    left = TOTAL - 2 * CONTEXT - 4096 * MIB - 64 * MIB
    assert torch_beside_a_neighbour["free_and_total"] == [left, TOTAL]


@needs_pynvml
def test_torch_and_nvml_report_the_same_uuid(torch_beside_a_neighbour: dict[str, Any]) -> None:
    by_torch, by_nvml = torch_beside_a_neighbour["uuids"]
    assert by_torch == by_nvml


@needs_pynvml
def test_torch_works_in_a_fork_only_before_initialization(
    torch_beside_a_neighbour: dict[str, Any],
) -> None:
    assert torch_beside_a_neighbour["fork_before"] == ["", "[4]"]
    assert torch_beside_a_neighbour["fork_after"][0] == "RuntimeError"
    assert "Cannot re-initialize CUDA in forked subprocess" in torch_beside_a_neighbour["fork_after"][1]
    assert torch_beside_a_neighbour["tensor_of_the_parent"] == ["AcceleratorError", "CUDA error: initialization error"]


@needs_pynvml
def test_torchs_out_of_memory_error_names_the_process_that_uses_the_memory(
    torch_beside_a_neighbour: dict[str, Any],
) -> None:
    assert torch_beside_a_neighbour["code"] == 1
    assert (
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 12.00 GiB" in torch_beside_a_neighbour["error"]
    )
    having = f"Process {torch_beside_a_neighbour['neighbour']} has 4.42 GiB memory in use"
    assert having in torch_beside_a_neighbour["error"]


@needs_pynvml
def test_memory_is_freed_after_a_process_ends_out_of_memory(torch_beside_a_neighbour: dict[str, Any]) -> None:
    assert torch_beside_a_neighbour["after"] == torch_beside_a_neighbour["before"]


def test_on_a_full_device_torchs_first_call_raises_another_type(first: Neighbour, device_file: Path) -> None:
    """pytorch/pytorch#46084: the context does not fit, so there is no caching allocator yet."""
    first.ask("allocate_all", 20)
    done = subprocess.run(
        [sys.executable, "-c", "import torch; torch.zeros(1, device='cuda')"],
        env=virtual_gpu.environment(T4, shared=device_file),
        capture_output=True,
        text=True,
        check=False,
    )
    assert "AcceleratorError: CUDA error: out of memory" in done.stderr
    assert "OutOfMemoryError" not in done.stderr


def test_a_shared_device_with_one_process_equals_an_unshared_one(device_file: Path) -> None:
    def facts(shared: Path | None) -> dict[str, Any]:
        done = subprocess.run(
            [
                sys.executable,
                SCRIPTS / "device.py",
                "properties",
                "memory",
                "segments",
                "values",
                "workspace",
                "scaler",
            ],
            env={**virtual_gpu.environment(T4, shared=shared), "PYTORCH_ALLOC_CONF": "expandable_segments:True"},
            capture_output=True,
            text=True,
            check=True,
        )
        found: dict[str, Any] = json.loads(done.stdout)
        for error in ("one_page_more", "too_much", "over_the_fraction"):
            kind, message = found["memory"][error]
            found["memory"][error] = [kind, message.split(". GPU 0")[0]]  # the rest of the message comes from NVML
        return found

    alone, own = facts(device_file), facts(None)
    assert alone["segments"]["expandable"] == [True]
    assert alone == own
