"""The virtual device as PyTorch sees it through scripts/device.py: a T4, and an H100 with expandable segments."""

from __future__ import annotations

import importlib.util
import json
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from rehearsing import NEEDS_THE_DEVICE, run_on_the_device

from hf_bsopt.data import catalog

pytestmark = NEEDS_THE_DEVICE

MIB = 2**20
Facts = dict[str, Any]
Run = subprocess.CompletedProcess[str]


def run_on_both() -> dict[str, Run]:
    expandable = dict.fromkeys(("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"), "expandable_segments:True")
    sections = ("properties", "memory", "segments", "workspace", "kernels")
    with ThreadPoolExecutor(2) as threads:
        t4 = threads.submit(run_on_the_device, "T4", "device.py")
        h100 = threads.submit(run_on_the_device, "H100", "device.py", *sections, **expandable)
        return {"T4": t4.result(), "H100": h100.result()}


@pytest.fixture(scope="module")
def runs(once: Callable[..., Any]) -> dict[str, Run]:
    """Run the script on both devices in parallel."""
    found: dict[str, Run] = once("device", run_on_both)
    return found


@pytest.fixture
def t4(runs: dict[str, Run]) -> Facts:
    assert runs["T4"].returncode == 0, runs["T4"].stderr
    facts: Facts = json.loads(runs["T4"].stdout)
    return facts


@pytest.fixture
def h100(runs: dict[str, Run]) -> Facts:
    assert runs["H100"].returncode == 0, runs["H100"].stderr
    facts: Facts = json.loads(runs["H100"].stdout)
    return facts


@pytest.fixture(params=["T4", "H100"])
def device(request: pytest.FixtureRequest) -> tuple[Facts, Any]:
    """Return (the facts, the catalog's GpuSpec) of each device."""
    return request.getfixturevalue(request.param.lower()), catalog.gpu(request.param)


def test_there_is_one_gpu_with_the_requested_properties(device: tuple[Facts, Any]) -> None:
    facts, spec = device[0]["properties"], device[1]
    assert facts["is_available"] is True
    assert facts["count"] == 1
    assert facts["name"] == spec.name
    assert facts["total"] == spec.total_bytes
    assert facts["capability"] == [spec.compute_capability // 10, spec.compute_capability % 10]
    assert facts["multiprocessors"] == spec.multiprocessors
    assert facts["threads"] == spec.threads_per_multiprocessor


def test_shared_memory_per_block_follows_the_compute_capability(t4: Facts, h100: Facts) -> None:
    """CUDA C++ Programming Guide, technical specifications per compute capability: 64 KiB and 227 KiB."""
    assert (t4["properties"]["shared"], h100["properties"]["shared"]) == (64 << 10, 227 << 10)


def test_bfloat16_support_follows_the_compute_capability(t4: Facts, h100: Facts) -> None:
    assert (t4["properties"]["bf16"], h100["properties"]["bf16"]) == (False, True)


def test_a_second_gpu_is_an_invalid_ordinal(t4: Facts) -> None:
    assert "invalid device ordinal" in t4["properties"]["second_gpu"][1]


def test_the_context_uses_memory_before_anything_is_allocated(device: tuple[Facts, Any]) -> None:
    free, total = device[0]["properties"]["free_and_total"]
    assert total - free == device[1].context_bytes > 0


def test_all_free_memory_can_be_allocated_and_not_a_page_more(device: tuple[Facts, Any]) -> None:
    facts, spec = device[0]["memory"], device[1]
    assert facts["whole_device"] + facts["left"] == spec.total_bytes - spec.context_bytes
    assert facts["left"] < 20 * MIB
    assert facts["one_page_more"][0] == "OutOfMemoryError"
    assert "Tried to allocate 20.00 MiB" in facts["one_page_more"][1]
    assert facts["freed"] is True


def test_too_large_an_allocation_raises_torchs_out_of_memory_error_with_the_devices_capacity(t4: Facts) -> None:
    kind, message = t4["memory"]["too_much"]
    assert kind == "OutOfMemoryError"
    assert message.startswith(
        "CUDA out of memory. Tried to allocate 14.16 GiB. GPU 0 has a total capacity of 14.56 GiB"
    )


def test_the_device_can_be_used_after_an_out_of_memory_error(device: tuple[Facts, Any]) -> None:
    assert device[0]["memory"]["usable_after_oom"] is True


def test_a_memory_fraction_is_respected(device: tuple[Facts, Any]) -> None:
    facts = device[0]["memory"]
    assert facts["under_the_fraction"] == []
    assert facts["over_the_fraction"][0] == "OutOfMemoryError"


def test_segments_and_memory_history_are_those_of_the_real_allocator(t4: Facts) -> None:
    facts = t4["segments"]
    assert facts["expandable"] == [False, False]
    assert facts["bytes"] == [30 * MIB, 30 * MIB]
    assert facts["events"] == [
        ["segment_alloc", 30 * MIB],
        ["alloc", 30 * MIB],
        ["segment_alloc", 30 * MIB],
        ["alloc", 30 * MIB],
        ["free_requested", 30 * MIB],
        ["free_completed", 30 * MIB],
    ]
    assert facts["reserved_after"] == 0


def test_an_expandable_segment_grows_by_20_mib(h100: Facts) -> None:
    facts = h100["segments"]
    assert facts["expandable"] == [True]
    assert facts["bytes"] == [60 * MIB]
    maps = [size for action, size in facts["events"] if action == "segment_map"]
    assert maps == [40 * MIB, 20 * MIB]
    assert facts["reserved_after"] == 0


def test_values_read_from_the_device_are_zero_and_host_values_are_kept(t4: Facts) -> None:
    facts = t4["values"]
    assert facts["back"] == [0, 0, 0, 0]
    assert (facts["item"], facts["found"]) == (0, 0)
    assert facts["on_the_host"] == [1, 2, 3, 4]


def test_pinned_memory_is_pinned_and_keeps_its_values(t4: Facts) -> None:
    facts = t4["values"]
    assert facts["pinned"] == [True, True, False]
    assert facts["pinned_values"] == [5, 5, 5, 5]
    assert facts["pinned_on_the_device"] == "cuda"


def test_streams_and_events_are_always_complete(t4: Facts) -> None:
    assert t4["order"]["query"] == [True, True]
    assert t4["order"]["elapsed"] >= 0
    assert t4["order"]["different"] is True


def test_the_cublas_workspace_is_that_of_the_gpu(device: tuple[Facts, Any]) -> None:
    assert device[0]["workspace"] == device[1].cublas_workspace_bytes


def test_convolutions_and_recurrent_layers_run_without_cudnn(device: tuple[Facts, Any]) -> None:
    facts = device[0]["kernels"]
    assert facts["cudnn"] == [False, False]
    assert facts["convolution"] == [[2, 8, 14, 14], [8, 3, 3, 3]]
    assert facts["lstm"] == [2, 5, 16]


def test_attention_is_flash_on_an_h100_and_memory_efficient_on_a_t4(t4: Facts, h100: Facts) -> None:
    assert h100["kernels"]["attention"].startswith("ScaledDotProductFlashAttention")
    assert t4["kernels"]["attention"].startswith("ScaledDotProductEfficientAttention")


def test_attention_with_a_mask_is_memory_efficient_on_both(device: tuple[Facts, Any]) -> None:
    assert device[0]["kernels"]["attention_with_mask"].startswith("ScaledDotProductEfficientAttention")


def test_kernels_compiled_at_run_time_run(device: tuple[Facts, Any]) -> None:
    assert device[0]["kernels"]["compiled_at_run_time"] == [3]


def test_the_optimizer_steps_with_a_gradient_scaler(t4: Facts) -> None:
    assert t4["scaler"] == {"steps": 3, "states": 2}


@pytest.mark.parametrize(
    ("call", "error", "function"),
    [
        ("eigh", "cusolverDnCreate", "cusolverDnCreate"),
        ("fft", "cuFFT error", "cufftCreate"),
        ("graph", "the virtual CUDA device does not implement cudaStreamBeginCapture", "cudaStreamBeginCapture"),
    ],
)
def test_a_function_that_is_not_implemented_is_refused_by_name(
    t4: Facts, runs: dict[str, Run], call: str, error: str, function: str
) -> None:
    assert error in t4["not_implemented"][call][1]
    assert f"virtual CUDA device: {function} is not implemented and was refused\n" in runs["T4"].stderr


def test_the_device_can_be_used_after_a_refusal(t4: Facts) -> None:
    assert t4["not_implemented"]["after_refusals"] == []


def test_nothing_that_training_needs_is_refused(runs: dict[str, Run]) -> None:
    assert "virtual CUDA device" not in runs["H100"].stderr


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_eight_bit_adam_and_four_bit_linear_layers_of_bitsandbytes_work(t4: Facts) -> None:
    assert t4["eight_and_four_bits"] == {
        "state": "torch.uint8",
        "weight": ["torch.uint8", 128 * 64 // 2],
        "output": [4, 64],
        "gradient": [4, 128],
    }
