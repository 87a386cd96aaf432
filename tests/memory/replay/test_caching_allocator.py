"""Tests of `memory.replay.caching_allocator`, rule by rule, then on random requests."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_bsopt.memory.replay.caching_allocator import BLOCK_BYTES, MIB, CachingAllocator, DeviceFull

KIB = 1 << 10


def allocator_with(*sizes: int, limit: int | None = None) -> CachingAllocator:
    """Return an allocator with live blocks 0, 1, 2, … of these sizes."""
    allocator = CachingAllocator(limit)
    for name, size in enumerate(sizes):
        allocator.allocate(name, size)
    return allocator


def mib(value: int) -> float:
    return value / MIB


# ---- rounding, pools and segments


@pytest.mark.parametrize(("requested", "allocated"), [(1, 512), (512, 512), (513, 1024), (MIB - 1, MIB)])
def test_a_request_is_rounded_up_to_512_bytes(requested: int, allocated: int) -> None:
    assert allocator_with(requested).allocated == allocated


@pytest.mark.parametrize(
    ("requested", "segment"),
    [
        (1, 2 * MIB),
        (MIB, 2 * MIB),
        (MIB + 1, 20 * MIB),
        (10 * MIB - 512, 20 * MIB),
        (10 * MIB, 10 * MIB),
        (10 * MIB + 1, 12 * MIB),
        (21 * MIB, 22 * MIB),
        (100 * MIB, 100 * MIB),
    ],
)
def test_a_new_segment_is_2_mib_or_20_mib_or_the_request_rounded_up_to_2_mib(requested: int, segment: int) -> None:
    assert allocator_with(requested).reserved == segment


def test_requests_up_to_1_mib_share_a_pool_that_larger_ones_never_touch() -> None:
    allocator = allocator_with(2 * MIB)
    assert allocator.reserved == 20 * MIB
    allocator.allocate(1, MIB)  # 18 MiB are free, but in the other pool
    assert allocator.reserved == 22 * MIB
    allocator.allocate(2, MIB)
    assert allocator.reserved == 22 * MIB


def test_a_large_request_does_not_use_a_free_small_segment() -> None:
    allocator = allocator_with(MIB, MIB)
    allocator.free(0)
    allocator.free(1)
    allocator.allocate(2, 2 * MIB)
    assert allocator.reserved == 22 * MIB


# ---- which free block is used


def test_the_smallest_free_block_that_fits_is_used() -> None:
    allocator = allocator_with(8 * MIB, 2 * MIB, 4 * MIB, 6 * MIB)  # one segment of 20 MiB, full
    allocator.free(0)
    allocator.free(2)
    allocator.allocate(4, 3 * MIB)  # into the free 4 MiB, although the free 8 MiB come first
    allocator.allocate(5, 8 * MIB)
    assert mib(allocator.reserved) == 20


def test_among_free_blocks_of_equal_size_the_lowest_address_is_used() -> None:
    allocator = allocator_with(2 * MIB, 4 * MIB, 2 * MIB, 4 * MIB, 8 * MIB)
    allocator.free(1)
    allocator.free(3)
    allocator.allocate(5, 4 * MIB)
    allocator.free(4)  # beside block 3, which is still free
    allocator.allocate(6, 12 * MIB)
    assert mib(allocator.reserved) == 20


# ---- splitting


def test_a_small_block_is_split_down_to_512_bytes() -> None:
    allocator = allocator_with(MIB, MIB - BLOCK_BYTES)
    assert allocator.allocated == 2 * MIB - BLOCK_BYTES
    allocator.allocate(2, BLOCK_BYTES)
    assert allocator.reserved == allocator.allocated == 2 * MIB


def test_a_large_block_keeps_a_remainder_of_1_mib_which_counts_as_allocated() -> None:
    assert mib(allocator_with(19 * MIB).allocated) == 20


def test_a_large_block_is_split_if_more_than_1_mib_remains() -> None:
    assert allocator_with(19 * MIB - BLOCK_BYTES).allocated == 19 * MIB - BLOCK_BYTES


def test_freeing_a_block_also_frees_its_unsplit_end() -> None:
    allocator = allocator_with(19 * MIB)
    allocator.free(0)
    assert allocator.allocated == 0
    allocator.allocate(1, 20 * MIB)
    assert mib(allocator.reserved) == 20


def test_expandable_segments_split_small_remainders_of_large_blocks() -> None:
    allocator = CachingAllocator(expandable_segments=True)
    allocator.allocate(0, 19 * MIB)
    assert mib(allocator.allocated) == 19


# ---- merging


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1)])
def test_a_freed_block_merges_with_its_free_neighbours(order: tuple[int, int, int]) -> None:
    allocator = allocator_with(4 * MIB, 6 * MIB, 10 * MIB - 512, 2 * MIB)
    reserved = allocator.reserved
    for name in order:
        allocator.free(name)
    allocator.allocate(4, 20 * MIB)
    assert allocator.reserved == reserved


def test_a_freed_block_does_not_merge_across_a_live_one() -> None:
    allocator = allocator_with(9 * MIB, 2 * MIB, 9 * MIB)
    allocator.free(0)
    allocator.free(2)
    allocator.allocate(3, 10 * MIB)
    assert mib(allocator.reserved) == 30


def test_blocks_of_different_segments_never_merge() -> None:
    allocator = allocator_with(20 * MIB, 20 * MIB)
    allocator.free(0)
    allocator.free(1)
    allocator.allocate(2, 40 * MIB)
    assert mib(allocator.reserved) == 80


# ---- out of memory


def test_free_segments_are_released_before_an_oom_is_raised() -> None:
    allocator = allocator_with(20 * MIB, limit=40 * MIB)
    allocator.free(0)
    allocator.allocate(1, 30 * MIB)
    assert mib(allocator.reserved) == 30
    assert allocator.retries == 1


def test_free_segments_are_kept_while_the_device_has_memory() -> None:
    allocator = allocator_with(20 * MIB, limit=50 * MIB)
    allocator.free(0)
    allocator.allocate(1, 30 * MIB)
    assert mib(allocator.reserved) == 50
    assert allocator.retries == 0


def test_small_segments_are_released_too() -> None:
    allocator = allocator_with(MIB, limit=20 * MIB)
    allocator.free(0)
    allocator.allocate(1, 20 * MIB)
    assert mib(allocator.reserved) == 20


def test_a_segment_with_a_live_block_is_not_released() -> None:
    allocator = allocator_with(10 * MIB - 512, 2 * MIB, limit=40 * MIB)
    allocator.free(0)
    with pytest.raises(DeviceFull):
        allocator.allocate(2, 22 * MIB)
    assert mib(allocator.reserved) == 20


def test_the_last_byte_of_the_device_can_be_used() -> None:
    assert mib(allocator_with(20 * MIB, 20 * MIB, limit=40 * MIB).reserved) == 40
    with pytest.raises(DeviceFull, match="41943039"):
        allocator_with(20 * MIB, 20 * MIB, limit=40 * MIB - 1)


def test_the_segment_must_fit_and_not_only_the_request() -> None:
    with pytest.raises(DeviceFull):
        allocator_with(2 * MIB, limit=19 * MIB)


def test_an_oom_is_a_memory_error_and_leaves_live_blocks_unchanged() -> None:
    allocator = allocator_with(20 * MIB, limit=30 * MIB)
    with pytest.raises(MemoryError):
        allocator.allocate(1, 20 * MIB)
    assert mib(allocator.allocated) == 20
    allocator.free(0)
    assert allocator.allocated == 0


def test_peaks_are_kept_after_frees_and_releases() -> None:
    allocator = allocator_with(20 * MIB, 20 * MIB, limit=40 * MIB)
    allocator.free(0)
    allocator.free(1)
    allocator.allocate(2, 22 * MIB)
    assert (mib(allocator.allocated), mib(allocator.reserved)) == (22, 22)
    assert (mib(allocator.peak_allocated), mib(allocator.peak_reserved)) == (40, 40)


def test_without_a_limit_any_size_fits() -> None:
    assert allocator_with(1 << 50).reserved == 1 << 50


# ---- random requests


@dataclass
class NaiveAllocator:
    """A slow, readable implementation of the rules: segments are lists of [bytes, name or None], in order."""

    limit: int | None = None
    segments: list[tuple[bool, list[list[int | None]]]] = field(default_factory=list)

    def allocate(self, name: int, size: int) -> bool:
        size = (size + 511) // 512 * 512
        small = size <= MIB
        block = self.smallest(size, small) or self.segment(size, small)
        if block is None:
            return False
        blocks, at = block
        rest = blocks[at][0] - size  # type: ignore[operator]
        blocks[at][1] = name
        if (rest >= 512 and small) or rest > MIB:
            blocks[at][0] = size
            blocks.insert(at + 1, [rest, None])
        return True

    def smallest(self, size: int, small: bool) -> tuple[list[list[int | None]], int] | None:
        fitting = [
            (blocks[at][0], number, at)
            for number, (pool, blocks) in enumerate(self.segments)
            for at in range(len(blocks))
            if pool == small and blocks[at][1] is None and blocks[at][0] >= size  # type: ignore[operator]
        ]
        if not fitting:
            return None
        _, number, at = min(fitting)  # type: ignore[type-var]
        return self.segments[number][1], at

    def segment(self, size: int, small: bool) -> tuple[list[list[int | None]], int] | None:
        held = 2 * MIB if small else 20 * MIB if size < 10 * MIB else (size + 2 * MIB - 1) // (2 * MIB) * (2 * MIB)
        if self.limit is not None and self.reserved + held > self.limit:
            self.segments = [s for s in self.segments if any(name is not None for _, name in s[1])]
            if self.reserved + held > self.limit:
                return None
        self.segments.append((small, [[held, None]]))
        return self.segments[-1][1], 0

    def free(self, name: int) -> None:
        for _, blocks in self.segments:
            for block in blocks:
                if block[1] == name:
                    block[1] = None
            at = 0
            while at + 1 < len(blocks):
                if blocks[at][1] is None and blocks[at + 1][1] is None:
                    blocks[at][0] += blocks.pop(at + 1)[0]  # type: ignore[operator]
                else:
                    at += 1

    @property
    def reserved(self) -> int:
        return sum(size for _, blocks in self.segments for size, _ in blocks)  # type: ignore[misc]

    @property
    def allocated(self) -> int:
        return sum(size for _, blocks in self.segments for size, name in blocks if name is not None)  # type: ignore[misc]


SIZES = st.one_of(
    st.integers(1, 4 * KIB),
    st.integers(1, MIB),
    st.integers(MIB, 30 * MIB),
    st.sampled_from([512, MIB, MIB + 1, 2 * MIB, 9 * MIB, 10 * MIB, 19 * MIB, 20 * MIB]),
)
STREAMS = st.lists(st.one_of(SIZES, st.integers(-40, -1)), max_size=80)
"""An allocation of that many bytes or, if negative, the free of one of the live blocks."""
LIMITS = st.one_of(st.none(), st.integers(2 * MIB, 120 * MIB))


@settings(deadline=None)  # a shared machine may be slow for a moment
@given(STREAMS, LIMITS)
def test_the_counters_equal_those_of_a_naive_allocator(stream: list[int], limit: int | None) -> None:
    allocator, naive, alive = CachingAllocator(limit), NaiveAllocator(limit), []
    for name, request in enumerate(stream):
        if request > 0:
            try:
                allocator.allocate(name, request)
                alive.append(name)
                fitted = True
            except DeviceFull:
                fitted = False
            assert naive.allocate(name, request) == fitted
        elif alive:
            gone = alive.pop(request % len(alive))
            allocator.free(gone)
            naive.free(gone)
        assert (allocator.allocated, allocator.reserved) == (naive.allocated, naive.reserved)


@pytest.mark.parametrize("expandable", [False, True])
@settings(deadline=None)  # a shared machine may be slow for a moment
@given(stream=STREAMS, limit=LIMITS)
def test_the_counters_stay_consistent_for_any_requests(expandable: bool, stream: list[int], limit: int | None) -> None:
    allocator, alive = CachingAllocator(limit, expandable_segments=expandable), []
    peaks = (0, 0)
    for name, request in enumerate(stream):
        if request > 0:
            try:
                allocator.allocate(name, request)
                alive.append(name)
            except DeviceFull:
                assert limit is not None
        elif alive:
            allocator.free(alive.pop(request % len(alive)))
        assert allocator.reserved % (2 * MIB) == 0
        assert allocator.allocated <= allocator.reserved
        assert limit is None or allocator.reserved <= limit
        before, peaks = peaks, (allocator.peak_allocated, allocator.peak_reserved)
        assert peaks[0] >= max(before[0], allocator.allocated)
        assert peaks[1] >= max(before[1], allocator.reserved)
    for name in alive:
        allocator.free(name)
    assert allocator.allocated == 0


@settings(deadline=None)  # a shared machine may be slow for a moment
@given(STREAMS, st.integers(2 * MIB, 120 * MIB))
def test_requests_within_the_limit_release_no_segments(stream: list[int], limit: int) -> None:
    """A request served from the cache never needs the device, so a limit above the peak changes nothing."""
    without, within = CachingAllocator(), CachingAllocator(limit)
    alive: list[int] = []
    for name, request in enumerate(stream):
        if request > 0:
            without.allocate(name, request)
            alive.append(name)
            try:
                within.allocate(name, request)
            except DeviceFull:
                break
        elif alive:
            gone = alive.pop(request % len(alive))
            without.free(gone)
            within.free(gone)
    if without.peak_reserved <= limit:
        assert within.retries == 0
        assert within.peak_reserved == without.peak_reserved


@settings(deadline=None)  # a shared machine may be slow for a moment
@given(STREAMS)
def test_expandable_segments_allocate_exactly_the_requests_rounded_to_512(stream: list[int]) -> None:
    allocator = CachingAllocator(expandable_segments=True)
    alive: dict[int, int] = {}
    for name, request in enumerate(stream):
        if request > 0:
            allocator.allocate(name, request)
            alive[name] = -(-request // BLOCK_BYTES) * BLOCK_BYTES
        elif alive:
            gone = list(alive)[request % len(alive)]
            allocator.free(gone)
            del alive[gone]
        assert allocator.allocated == sum(alive.values())


# ---- the real allocator
# Recorded from torch 2.11.0+cu130 on a virtual GPU of 100 MiB (torch.cuda.caching_allocator_alloc and
# caching_allocator_delete, torch.cuda.memory_allocated and memory_reserved after every request).

# fmt: off
RECORDED_STREAM = [
    8516, 319, 3596, -4, 19456, -3, -6, 37772, 34247, 8714, -9, -8, 265, 26373, 19456, 344, 19456, -2, 2603, 19456,
    30751, 728, 721, -10, 5651, 24242, 19456, 28545, 6629, -10, 17676, 22664, -10, -8, 2992, -3, 464, 27042, -3, -3,
    32803, -3, -11, 28876,
]
"""KiB to allocate; if negative, the index of the live block to free, modulo their number."""
RECORDED: dict[bool, list[tuple[int, int] | None]] = {
    False: [
        (8516, 20), (8835, 22), (12431, 22), (8835, 22), (29315, 42), (20799, 42), (20480, 42), (58252, 80),
        (93068, 92), None, (72588, 92), (34816, 92), (35081, 94), (61454, 94), (81934, 94), (82278, 94), None,
        (61798, 94), (64401, 94), (84881, 94), None, (85609, 94), (86330, 96), (85602, 96), (91253, 96), None, None,
        None, None, (90532, 96), None, None, (87929, 94), (67449, 94), (70441, 94), (70097, 94), (70561, 94), None,
        (64910, 74), (38537, 74), (71340, 74), (68348, 74), (68083, 74), None,
    ],
    True: [
        (8516, 20), (8835, 22), (12431, 22), (8835, 22), (28291, 42), (19775, 42), (19456, 42), (57228, 82),
        (91475, 100), None, (72019, 100), (34247, 100), (34512, 42), (60885, 82), None, (61229, 82), None,
        (34856, 82), (37459, 82), (56915, 82), None, (57643, 62), (58364, 64), (38908, 64), (44559, 64), (68801, 84),
        None, None, (75430, 84), (68801, 84), None, None, (63150, 84), (38908, 84), (41900, 84), (41172, 84),
        (41636, 84), (68678, 84), (65686, 84), (64965, 84), None, (62362, 82), (35320, 82), (64196, 82),
    ],
}
"""KiB allocated and MiB reserved after each request, None if out of memory; the key is ``expandable_segments``."""
# fmt: on


@pytest.mark.parametrize("expandable", [False, True])
def test_the_counters_equal_those_recorded_on_a_device_that_ran_out_of_memory(expandable: bool) -> None:
    allocator = CachingAllocator(100 * MIB, expandable_segments=expandable)
    counted: list[tuple[int, int] | None] = []
    alive: list[int] = []
    for name, request in enumerate(RECORDED_STREAM):
        if request > 0:
            try:
                allocator.allocate(name, request * KIB)
            except DeviceFull:
                counted.append(None)
                continue
            alive.append(name)
        else:
            allocator.free(alive.pop(request % len(alive)))
        counted.append((allocator.allocated // KIB, allocator.reserved // MIB))
    assert counted == RECORDED[expandable]
