"""Malloc of glibc: claims about `hf_bsopt.memory.replay.glibc_malloc`, rule by rule, then beside the real one."""

from __future__ import annotations

import json
import platform
import random
import subprocess
import sys
from pathlib import Path

import pytest

from hf_bsopt.memory import Predictor, Timeline
from hf_bsopt.memory.replay.caching_allocator import DeviceFull
from hf_bsopt.memory.replay.glibc_malloc import LAST_THRESHOLD, TOP_PAD, HeapAllocator
from hf_bsopt.probing.preflight import FIRST_STEP_BYTES
from hf_bsopt.records import GpuSpec, Peak
from hf_bsopt.workloads.workload import describe

KIB, MIB = 1 << 10, 1 << 20
CPU = GpuSpec("CPU", None, 0, 0, 0, kind="cpu")
Event = tuple[int, int]
"""(name, bytes), 0 bytes to free."""

on_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc of glibc is what is replayed")


def replayed(*events: Event, limit: int | None = None) -> HeapAllocator:
    heap = HeapAllocator(limit)
    for name, size in events:
        if size:
            heap.allocate(name, size)
        else:
            heap.free(name)
    return heap


def mib(size: int) -> float:
    return round(size / MIB, 1)


def raised_to(size: int) -> list[Event]:
    """After which blocks up to about ``size`` come from the heap."""
    return [(-1, size), (-1, 0)]


# ---- the threshold (__libc_free, sysmalloc)


def test_a_block_of_128_kib_is_mapped_in_pages_and_given_back_whole() -> None:
    heap = replayed((1, 128 * KIB))
    assert heap.resident == 132 * KIB  # with the room to align it in
    heap.free(1)
    assert heap.resident == 0


def test_a_smaller_block_lies_on_the_heap_which_stays_as_large_as_it_was_written() -> None:
    heap = replayed((1, 100 * KIB), (2, 16 * KIB), (1, 0))
    assert heap.resident == 120 * KIB
    assert heap.allocated == 16 * KIB + 64


def test_freeing_a_mapped_block_sends_its_like_to_the_heap() -> None:
    heap = replayed(*raised_to(8 * MIB))
    assert 8 * MIB < heap.mmap_threshold < 8 * MIB + 8 * KIB
    assert heap.trim_threshold == 2 * heap.mmap_threshold
    heap = replayed(*raised_to(8 * MIB), (1, 8 * MIB), (2, 4 * MIB), (1, 0))
    assert mib(heap.resident) == 12.0


def test_freeing_a_mapped_block_never_lowers_the_threshold() -> None:
    before = replayed((1, 1 * MIB), *raised_to(8 * MIB))
    after = replayed((1, 1 * MIB), *raised_to(8 * MIB), (1, 0))
    assert after.mmap_threshold == before.mmap_threshold


def test_blocks_above_32_mib_are_always_mapped() -> None:
    heap = replayed(*raised_to(LAST_THRESHOLD), *raised_to(40 * MIB))
    assert heap.mmap_threshold == 128 * KIB
    heap = replayed(*raised_to(31 * MIB), *raised_to(40 * MIB), (1, 40 * MIB), (2, 40 * MIB), (1, 0))
    assert mib(heap.resident) == 40.0


# ---- holes (_int_malloc, _int_memalign, _int_free)

ON_THE_HEAP = [*raised_to(30 * MIB), (1, 8 * MIB), (2, MIB), (3, 4 * MIB), (4, MIB), (5, 2 * MIB), (6, MIB)]


def test_the_smallest_hole_that_fits_is_taken() -> None:
    heap = replayed(*ON_THE_HEAP, (1, 0), (3, 0), (7, 3 * MIB), (8, 7 * MIB))
    assert mib(heap.resident) == 17.0


def test_a_hole_is_too_small_for_a_block_of_the_size_that_left_it() -> None:
    heap = replayed(*ON_THE_HEAP, (3, 0), (7, 4 * MIB))
    assert mib(heap.resident) == 21.0
    heap = replayed(*ON_THE_HEAP, (3, 0), (7, 4 * MIB - 64))
    assert mib(heap.resident) == 17.0


def test_what_is_left_of_a_hole_is_used_too() -> None:
    heap = replayed(*ON_THE_HEAP, (1, 0), (7, 5 * MIB), (8, 2 * MIB))
    assert mib(heap.resident) == 17.0


@pytest.mark.parametrize("order", [(2, 3, 4), (4, 3, 2), (2, 4, 3)])
def test_freed_neighbours_are_one_hole(order: tuple[int, ...]) -> None:
    heap = replayed(*ON_THE_HEAP, *((name, 0) for name in order), (7, 6 * MIB))
    assert mib(heap.resident) == 17.0


def test_a_hole_is_taken_even_by_a_block_that_would_be_mapped() -> None:
    small = [(name, 100 * KIB) for name in range(1, 10)]
    heap = replayed(*small, *((name, 0) for name in range(1, 8)), (10, 400 * KIB))
    assert heap.resident == replayed(*small).resident


# ---- the end of the heap (systrim)


def test_the_end_of_the_heap_is_kept_until_twice_the_threshold_is_free_there() -> None:
    heap = replayed(*raised_to(8 * MIB), *((name, 4 * MIB) for name in range(1, 7)), (6, 0), (5, 0), (4, 0))
    assert mib(heap.resident) == 24.0
    heap.free(3)
    assert mib(heap.resident) == mib(8 * MIB + TOP_PAD)


def test_a_small_block_at_the_end_keeps_the_heap_beneath_it() -> None:
    heap = replayed(*raised_to(8 * MIB), *((name, 4 * MIB) for name in range(1, 7)), (7, 64))
    for name in range(1, 7):
        heap.free(name)
    assert mib(heap.resident) == 24.0


def test_what_the_heap_grew_by_counts_once_it_is_written() -> None:
    heap = replayed((1, 1000))
    assert heap.resident == 4 * KIB


# ---- limits


def test_what_would_be_resident_beyond_the_limit_is_refused() -> None:
    replayed((1, 40 * MIB), (2, 40 * MIB), limit=81 * MIB)
    with pytest.raises(DeviceFull):
        replayed((1, 40 * MIB), (2, 40 * MIB), limit=80 * MIB)


def test_holes_are_not_given_back_before_a_request_is_refused() -> None:
    events = [*raised_to(30 * MIB), (1, 20 * MIB), (2, MIB), (1, 0), (3, 25 * MIB)]
    with pytest.raises(DeviceFull):
        replayed(*events, limit=40 * MIB)
    assert replayed(*events).retries == 0


# ---- beside the real one

RULES: dict[str, list[Event]] = {
    "mapped and given back": [(n // 2, MIB * (1 - n % 2)) for n in range(20)],
    "threshold": [*raised_to(20 * MIB), (1, 8 * MIB), (2, 12 * MIB), (1, 0), (3, 40 * MIB)],
    "always mapped": [*raised_to(31 * MIB), *raised_to(40 * MIB), (1, 40 * MIB), (2, 40 * MIB)],
    "hole of the same size": [*ON_THE_HEAP, (3, 0), (7, 4 * MIB)],
    "hole of a smaller size": [*ON_THE_HEAP, (3, 0), (7, 4 * MIB - 64)],
    "one hole of many": [*ON_THE_HEAP, (2, 0), (4, 0), (3, 0), (7, 6 * MIB)],
    "best fit": [*ON_THE_HEAP, (1, 0), (3, 0), (7, 3 * MIB), (8, 7 * MIB)],
    "kept at the end": [
        *raised_to(8 * MIB),
        *((name, 4 * MIB) for name in range(1, 7)),
        (6, 0),
        (5, 0),
        (4, 0),
        (7, 40 * MIB),
    ],
    "trimmed": [
        *raised_to(8 * MIB),
        *((name, 4 * MIB) for name in range(1, 7)),
        *((name, 0) for name in range(6, 0, -1)),
        (7, 40 * MIB),
    ],
}


def really_resident(events: list[Event], shifts: int = 0) -> int:
    child = subprocess.run(
        [sys.executable, str(Path(__file__).parents[1] / "real_heap.py"), str(shifts)],
        input=json.dumps(events),
        capture_output=True,
        text=True,
        check=True,
    )
    return int(child.stdout)


@on_glibc
@pytest.mark.parametrize("rule", RULES)
def test_each_rule_is_that_of_the_real_one(rule: str) -> None:
    events = RULES[rule]
    assert abs(replayed(*events).peak_reserved - really_resident(events)) < MIB


def stream(seed: int) -> list[Event]:
    """Births of every scale from 512 bytes to 45 MiB, deaths in any order, at most 60 MiB alive."""
    chance = random.Random(seed)
    events: list[Event] = []
    live: dict[int, int] = {}
    for name in range(600):
        size = int(2 ** chance.uniform(9, 25.5))
        while live and (sum(live.values()) + size > 60 * MIB or chance.random() < 0.35):
            gone = chance.choice(list(live))
            del live[gone]
            events.append((gone, 0))
        live[name] = size
        events.append((name, size))
    return events


@on_glibc
def test_random_streams_are_as_large_as_the_real_ones_on_the_whole() -> None:
    """Not each by itself: where holes are cut up at random, sixteen bytes decide what fits, and one stream may be a
    quarter off.
    """
    streams = [stream(seed) for seed in range(6)]
    ours = [replayed(*events).peak_reserved for events in streams]
    theirs = [really_resident(events) for events in streams]
    assert sum(ours) == pytest.approx(sum(theirs), rel=0.08)
    for one, other in zip(ours, theirs, strict=True):
        assert one == pytest.approx(other, rel=0.3)


@pytest.fixture(scope="module")
def bert_mini() -> Timeline:
    workload = describe("bert-mini", task="sequence-classification", max_length=128, precision="fp32")
    return Predictor(workload, CPU).timeline


@on_glibc
@pytest.mark.parametrize("batch_size", [2, 16])
def test_a_training_steps_stream_is_as_large_as_the_real_one_from_the_worse_place(
    bert_mini: Timeline, batch_size: int
) -> None:
    """From some places blocks come to lie so that a freed one fits its like: then up to a sixth less is resident. In
    a training process more was than from the worse place (benchmarks/host_peaks.py).
    """
    events = list(bert_mini.requests(batch_size, CPU))
    assert len(events) > 1000
    real = [really_resident(events, shifts) for shifts in (0, 2)]
    assert replayed(*events).peak_reserved == pytest.approx(max(real), rel=0.04)
    assert min(real) > 0.8 * max(real)


# ---- the timeline of a CPU

MEASURED = {2: 498, 4: 535, 16: 745, 32: 998, 64: 1532, 128: 2565, 200: 3853, 260: 3898, 300: 4428}
LIBRARIES = 263
"""MiB that were resident at most, and before anything ran: measured, 2 cores, torch 2.13 CPU, command: python
benchmarks/host_peaks.py 2 4 16 32 64 128 200 260 300. The same size takes up to 2 % more or less another time."""


def test_measured_peaks_are_foretold_a_little_too_low(bert_mini: Timeline) -> None:
    """What small objects do to the heap is not replayed."""
    short = []
    for size, measured in MEASURED.items():
        foretold = LIBRARIES * MIB + FIRST_STEP_BYTES + bert_mini.peak(size, CPU).reserved_bytes
        short.append(1 - foretold / (measured * MIB))
    assert min(short) > -0.01 and max(short) < 0.07
    assert sorted(short)[len(short) // 2] < 0.04


def test_a_step_up_to_32_mib_a_tensor_takes_more_a_sequence_than_one_above_as_measured(bert_mini: Timeline) -> None:
    def each(low: int, high: int) -> float:
        peaks = [bert_mini.peak(size, CPU).reserved_bytes for size in (low, high)]
        return (peaks[1] - peaks[0]) / (high - low) / MIB

    assert each(64, 128) == pytest.approx((MEASURED[128] - MEASURED[64]) / 64, rel=0.03)
    assert each(260, 300) == pytest.approx((MEASURED[300] - MEASURED[260]) / 40, rel=0.05)
    assert each(200, 260) == pytest.approx(1.9, abs=1.2)  # 260 · 128 tokens · 256 · 4 bytes are just above 32 MiB


def test_on_a_cpu_more_is_resident_than_lives_and_most_where_blocks_are_under_32_mib(bert_mini: Timeline) -> None:
    beyond = {size: bert_mini.peak(size, CPU).reserved_bytes - bert_mini.live_bytes(size, CPU) for size in (128, 256)}
    assert beyond[128] > 400 * MIB
    assert 0 < beyond[256] < 100 * MIB


def test_a_cpus_limit_is_on_what_is_resident_with_the_libraries(bert_mini: Timeline) -> None:
    needed = bert_mini.peak(64, CPU).reserved_bytes
    roomy = GpuSpec("CPU", needed + 300 * MIB, 0, 0, 300 * MIB, kind="cpu")
    tight = GpuSpec("CPU", needed + 300 * MIB - 1, 0, 0, 300 * MIB, kind="cpu")
    assert bert_mini.replay(64, roomy).fits
    assert not bert_mini.replay(64, tight).fits


def test_on_a_macs_gpu_what_is_live_is_what_is_taken(bert_mini: Timeline) -> None:
    mps = GpuSpec("MPS", None, 0, 0, 0, kind="mps")
    live = bert_mini.live_bytes(64, mps)
    assert bert_mini.peak(64, mps) == Peak(live, live)
