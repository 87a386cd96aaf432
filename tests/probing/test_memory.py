"""Memory counters of each device, and when they show that a size does not fit."""

from __future__ import annotations

import time

import pytest
import torch

from hf_bsopt.probing.memory import CpuMemory, CudaMemory, MpsMemory
from hf_bsopt.records import Peak

GIB = 2**30


class Cuda:
    """Values of torch.cuda's counters, set by the test."""

    total, free, reserved, peak_allocated, peak_reserved, retries = 16 * GIB, 12 * GIB, GIB, 0, 0, 0


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    counters = Cuda()
    for name, answer in {
        "synchronize": lambda: None,
        "empty_cache": lambda: None,
        "reset_peak_memory_stats": lambda: None,
        "reset_accumulated_memory_stats": lambda: None,
        "mem_get_info": lambda: (counters.free, counters.total),
        "memory_reserved": lambda: counters.reserved,
        "max_memory_allocated": lambda: counters.peak_allocated,
        "max_memory_reserved": lambda: counters.peak_reserved,
        "memory_stats": lambda: {"num_alloc_retries": counters.retries},
    }.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    return counters


def test_used_bytes_are_the_reserved_peak_plus_all_other_memory_in_use(cuda: Cuda) -> None:
    memory = CudaMemory()
    memory.start()
    cuda.peak_allocated, cuda.peak_reserved = 7 * GIB, 8 * GIB
    assert memory.peak() == Peak(7 * GIB, 8 * GIB)
    assert memory.used_bytes() == 8 * GIB + 3 * GIB  # 16 total, 12 free, 1 of the used 4 is reserved here


def test_memory_that_the_driver_allocates_late_counts(cuda: Cuda) -> None:
    memory = CudaMemory()
    memory.start()
    cuda.peak_reserved, cuda.reserved, cuda.free = 8 * GIB, 8 * GIB, 4 * GIB
    assert memory.used_bytes() == 12 * GIB


def test_reserving_more_than_was_free_is_a_spill(cuda: Cuda) -> None:
    memory = CudaMemory()
    memory.start()
    cuda.peak_reserved = 13 * GIB
    assert memory.spilled() == ""
    cuda.peak_reserved = 14 * GIB
    assert memory.spilled().startswith("1.00 GiB more were reserved than the device had")


def test_metals_peak_is_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    now = {"allocated": 0, "driver": 0}
    monkeypatch.setattr(torch.mps, "synchronize", lambda: None)
    monkeypatch.setattr(torch.mps, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.mps, "current_allocated_memory", lambda: now["allocated"])
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: now["driver"])
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 10 * GIB)
    memory = MpsMemory()
    memory.start()
    now.update(allocated=3 * GIB, driver=11 * GIB)
    deadline = time.monotonic() + 10
    while (memory._allocated._peak, memory._driver._peak) != (3 * GIB, 11 * GIB) and time.monotonic() < deadline:
        time.sleep(0.001)
    now.update(allocated=GIB, driver=2 * GIB)
    memory.end()
    assert memory.peak() == Peak(3 * GIB, 11 * GIB)
    assert memory.used_bytes() == 11 * GIB
    assert "1.00 GiB more than Metal recommends" in memory.spilled()


def test_on_a_cpu_the_peak_excludes_the_libraries() -> None:
    memory = CpuMemory()
    memory.start()
    torch.ones(400 * 2**20 // 4)
    assert memory.used_bytes() >= 400 * 2**20
    assert 0 < memory.peak().allocated_bytes < memory.used_bytes()
    assert memory.peak().allocated_bytes == memory.peak().reserved_bytes
