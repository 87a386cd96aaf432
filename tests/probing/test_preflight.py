"""What a device is like before anything runs on it."""

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
        (["sm_90", "compute_90"], 120, True),  # compiled when it is first used
        (["sm_90"], 120, False),
        (["sm_90a"], 90, True),
        (["sm_90a", "compute_90a"], 100, False),  # only there
        (["gfx942"], 90, False),
        ([], 75, False),
    ],
)
def test_whether_a_build_has_kernels_for_a_card(compiled_for: list[str], capability: int, runs: bool) -> None:
    assert has_kernels(compiled_for, capability) is runs


class Properties:
    name, major, minor, multi_processor_count, uuid, total_memory = "Tesla T4", 7, 5, 40, "u", 14 * GIB


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A T4 of 14 GiB, of which 13 are free once a context is there; nobody to ask about it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_80"])
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (13 * GIB, 14 * GIB))
    monkeypatch.setattr(nvml, "_started", lambda: None)
    return monkeypatch


def test_a_card_is_described_in_one_line(card: pytest.MonkeyPatch) -> None:
    found = cuda_preflight(PLACEHOLDER, None)
    assert found.line.startswith(f"Tesla T4 (sm_75): torch {torch.__version__} has kernels for it; 13.4 of 14.0 GiB")
    assert "0.6 GiB are taken by other processes" in found.line
    assert (found.spec.name, found.spec.total_bytes, found.spec.multiprocessors) == ("Tesla T4", 14 * GIB, 40)
    assert found.spec.context_bytes == GIB


def test_who_else_is_on_the_card_is_named_where_nvml_says(card: pytest.MonkeyPatch) -> None:
    used = iter([2 * GIB, 2 * GIB + 300 * 2**20])
    card.setattr(nvml.Card, "of", classmethod(lambda cls, uuid: cls(None)))
    card.setattr(nvml.Card, "used_bytes", lambda self: next(used))
    card.setattr(nvml.Card, "processes", lambda self: [nvml.GpuProcess(42, GIB // 2), nvml.GpuProcess(43, 0)])
    found = cuda_preflight(PLACEHOLDER, None)
    assert "2 other processes on it (process 42: 0.5 GiB)" in found.line
    assert found.spec.context_bytes == GIB - 300 * 2**20 + 430 * 2**20  # theirs, and a context as assumed


def test_memory_makes_the_card_smaller(card: pytest.MonkeyPatch) -> None:
    found = cuda_preflight(PLACEHOLDER, 8 * GIB)
    assert found.spec.total_bytes == 8 * GIB
    assert "8.0 GiB of it are used, as --memory says" in found.line


def test_more_memory_than_the_card_has_is_refused(card: pytest.MonkeyPatch) -> None:
    with pytest.raises(DeviceError, match=r"Tesla T4 has 14\.0 GiB, not the 20\.0 of --memory"):
        cuda_preflight(PLACEHOLDER, 20 * GIB)


def test_a_card_that_the_build_has_no_kernels_for_is_refused_with_those_that_it_has(card: pytest.MonkeyPatch) -> None:
    card.setattr(torch.cuda, "get_arch_list", lambda: ["sm_80", "sm_90"])
    with pytest.raises(DeviceError, match=r"no kernels for Tesla T4 \(sm_75\), only for sm_80, sm_90"):
        cuda_preflight(PLACEHOLDER, None)


def test_no_card_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceError, match="no CUDA device here"):
        cuda_preflight(PLACEHOLDER, None)


@pytest.mark.skipif(why_no_limit() is not None, reason=str(why_no_limit()))
def test_a_cpu_has_what_is_asked_for_or_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "available_bytes", lambda: (6 * GIB, "free memory of this machine"))
    asked = cpu_preflight(GpuSpec("CPU", 4 * GIB, 0, 0, 0, kind="cpu"))
    free = cpu_preflight(CPU)
    assert (asked.spec.total_bytes, free.spec.total_bytes) == (4 * GIB, 6 * GIB)
    assert "as --memory says" in asked.line
    assert "free memory of this machine" in free.line
    assert asked.spec.context_bytes > 50 * 2**20


@pytest.mark.skipif(why_no_limit() is not None, reason=str(why_no_limit()))
def test_more_memory_than_is_free_is_refused_with_what_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "available_bytes", lambda: (6 * GIB, "the limit of this control group"))
    with pytest.raises(DeviceError, match=r"8\.0 GiB .* 6\.0 GiB are there \(the limit of this control group\)"):
        cpu_preflight(GpuSpec("CPU", 8 * GIB, 0, 0, 0, kind="cpu"))


def test_a_cpu_whose_memory_can_not_be_limited_is_not_measured_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "why_no_limit", lambda: "this is no Linux")
    with pytest.raises(DeviceError, match="this is no Linux; --device predict"):
        cpu_preflight(CPU)


def test_a_mac_has_what_metal_recommends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 20 * GIB)
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: GIB // 2)
    found = mps_preflight(GpuSpec("MPS", None, 0, 0, 0, kind="mps"))
    assert (found.spec.total_bytes, found.spec.context_bytes) == (20 * GIB, GIB // 2)


def test_without_a_mac_there_is_no_mps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(DeviceError, match="no MPS device here"):
        mps_preflight(GpuSpec("MPS", None, 0, 0, 0, kind="mps"))
