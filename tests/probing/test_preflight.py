"""The inspection of a device before anything runs on it."""

from __future__ import annotations

import pytest
import torch

from hf_bsopt.errors import DeviceError
from hf_bsopt.probing import nvml, preflight
from hf_bsopt.probing.host_memory import why_no_limit
from hf_bsopt.probing.preflight import cpu_preflight, cuda_preflight, has_kernels, mps_preflight
from hf_bsopt.records import GpuSpec

GIB = 2**30
PLACEHOLDER = GpuSpec("CUDA device", 14 * GIB, 75, 40, 430 * 2**20)
CPU = GpuSpec("CPU", None, 0, 0, 0, kind="cpu")


@pytest.mark.parametrize(
    ("compiled_for", "capability", "runs"),
    [
        (["sm_75", "sm_80", "sm_90"], 75, True),
        (["sm_75", "sm_80", "sm_90"], 86, True),  # machine code of sm_80 runs on 8.6
        (["sm_75", "sm_80", "sm_90"], 60, False),  # a P100, as on Kaggle
        (["sm_75", "sm_80", "sm_90"], 70, False),  # a V100 under CUDA 13
        (["sm_86"], 80, False),  # not the other way round
        (["sm_90", "compute_90"], 120, True),  # PTX is compiled at first use
        (["sm_90"], 120, False),
        (["sm_90a"], 90, True),
        (["sm_90a", "compute_90a"], 100, False),  # architecture-specific
        (["gfx942"], 90, False),
        ([], 75, False),
    ],
)
def test_has_kernels_follows_cudas_compatibility_rules(compiled_for: list[str], capability: int, runs: bool) -> None:
    assert has_kernels(compiled_for, capability) is runs


class Properties:
    name, major, minor, multi_processor_count, uuid, total_memory = "Tesla T4", 7, 5, 40, "u", 14 * GIB


@pytest.fixture
def t4(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Emulate a T4 of 14 GiB, of which 13 are free after the context is created, without NVML."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_80"])
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (13 * GIB, 14 * GIB))
    monkeypatch.setattr(nvml, "_initialized_nvml", lambda: None)
    return monkeypatch


def test_a_gpu_is_described_in_one_line(t4: pytest.MonkeyPatch) -> None:
    found = cuda_preflight(PLACEHOLDER, None)
    assert found.line.startswith(f"Tesla T4 (sm_75): torch {torch.__version__} has kernels for it; 13.4 of 14.0 GiB")
    assert "0.6 GiB are used by other processes" in found.line
    assert (found.spec.name, found.spec.total_bytes, found.spec.multiprocessors) == ("Tesla T4", 14 * GIB, 40)
    assert found.spec.context_bytes == GIB


def test_other_processes_are_listed_if_nvml_reports_them(t4: pytest.MonkeyPatch) -> None:
    used = iter([2 * GIB, 2 * GIB + 300 * 2**20])
    t4.setattr(nvml.NvmlDevice, "from_uuid", classmethod(lambda cls, uuid: cls(None)))
    t4.setattr(nvml.NvmlDevice, "used_bytes", lambda self: next(used))
    t4.setattr(nvml.NvmlDevice, "processes", lambda self: [nvml.GpuProcess(42, GIB // 2), nvml.GpuProcess(43, 0)])
    found = cuda_preflight(PLACEHOLDER, None)
    assert "2 other processes on it (process 42: 0.5 GiB)" in found.line
    assert found.spec.context_bytes == GIB - 300 * 2**20 + 430 * 2**20  # the other processes and the assumed context


def test_a_memory_limit_reduces_the_capacity(t4: pytest.MonkeyPatch) -> None:
    found = cuda_preflight(PLACEHOLDER, 8 * GIB)
    assert found.spec.total_bytes == 8 * GIB
    assert "8.0 GiB of it are used (--memory)" in found.line


def test_a_memory_limit_above_the_capacity_is_refused(t4: pytest.MonkeyPatch) -> None:
    with pytest.raises(DeviceError, match=r"--memory 20\.0 GiB is more than the 14\.0 GiB of Tesla T4"):
        cuda_preflight(PLACEHOLDER, 20 * GIB)


def test_a_gpu_without_kernels_is_refused_with_the_supported_architectures(t4: pytest.MonkeyPatch) -> None:
    t4.setattr(torch.cuda, "get_arch_list", lambda: ["sm_80", "sm_90"])
    with pytest.raises(DeviceError, match=r"no kernels for Tesla T4 \(sm_75\), only for sm_80, sm_90"):
        cuda_preflight(PLACEHOLDER, None)


def test_it_is_an_error_if_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceError, match="no CUDA device here"):
        cuda_preflight(PLACEHOLDER, None)


@pytest.mark.skipif(why_no_limit() is not None, reason=str(why_no_limit()))
def test_a_cpu_has_the_requested_or_the_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "available_bytes", lambda: (6 * GIB, "free memory of this machine"))
    requested = cpu_preflight(GpuSpec("CPU", 4 * GIB, 0, 0, 0, kind="cpu"))
    free = cpu_preflight(CPU)
    assert (requested.spec.total_bytes, free.spec.total_bytes) == (4 * GIB, 6 * GIB)
    assert "set by --memory" in requested.line
    assert "free memory of this machine" in free.line
    assert requested.spec.context_bytes > 50 * 2**20


@pytest.mark.skipif(why_no_limit() is not None, reason=str(why_no_limit()))
def test_more_memory_than_is_free_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "available_bytes", lambda: (6 * GIB, "the limit of this control group"))
    with pytest.raises(DeviceError, match=r"8\.0 GiB .* 6\.0 GiB are available \(the limit of this control group\)"):
        cpu_preflight(GpuSpec("CPU", 8 * GIB, 0, 0, 0, kind="cpu"))


def test_a_cpu_is_refused_if_memory_cannot_be_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "why_no_limit", lambda: "this is not Linux")
    with pytest.raises(DeviceError, match="this is not Linux; --device predict"):
        cpu_preflight(CPU)


def test_a_mac_has_the_memory_that_metal_recommends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 20 * GIB)
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: GIB // 2)
    found = mps_preflight(GpuSpec("MPS", None, 0, 0, 0, kind="mps"))
    assert (found.spec.total_bytes, found.spec.context_bytes) == (20 * GIB, GIB // 2)


def test_mps_is_refused_without_a_mac(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(DeviceError, match="no MPS device here"):
        mps_preflight(GpuSpec("MPS", None, 0, 0, 0, kind="mps"))
