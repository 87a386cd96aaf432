from __future__ import annotations

import itertools
from collections.abc import Callable

from hypothesis import given
from hypothesis import strategies as st

from hf_bsopt.integrations.accelerate.next_size import FARTHEST, Next, Shortage, next_size

MIB = 2**20


def searched(start: int, shortage: Callable[[int], Shortage | None]) -> list[int]:
    """The sizes that are tried until there is no shortage, or no size left."""
    tried, doubts = [start], 0
    while (short := shortage(tried[-1])) is not None:
        following = next_size(short, len(tried), doubts)
        doubts += following.is_doubted
        if following.batch_size == 0:
            break
        tried.append(following.batch_size)
    return tried


def card(capacity: int, fixed: int, each: int, progress: float = 1.0) -> Callable[[int], Shortage | None]:
    """A training that needs fixed + each·n, and fails as soon as it has filled the card."""

    def shortage(size: int) -> Shortage | None:
        if fixed + each * size <= capacity:
            return None
        done = min(1.0, (capacity - fixed) / (each * size)) if progress < 1 else 1.0
        return Shortage(size, capacity, fixed, 0, capacity + 1, done)

    return shortage


def test_where_memory_grows_evenly_the_first_jump_lands_on_the_largest_size() -> None:
    assert searched(128, card(capacity=1000, fixed=100, each=14, progress=0.5)) == [128, 64]


def test_what_is_still_to_come_is_kept_free() -> None:
    shortage = Shortage(100, capacity_bytes=1000, fixed_bytes=100, coming_bytes=300, reached_bytes=1100)
    assert shortage.believed == 60


def test_the_reason_says_what_the_belief_rests_on() -> None:
    shortage = Shortage(128, 1000 * MIB, 100 * MIB, 0, 1060 * MIB, progress=0.5)
    assert next_size(shortage) == Next(60, "15.0 MiB a sequence, judged by 50% of the forward pass, let 60 fit")


def test_what_is_not_known_is_halved() -> None:
    assert searched(128, lambda size: Shortage(size)) == [128, 64, 32, 16, 8, 4, 2, 1]
    assert next_size(Shortage(128)) == Next(64, "half, since what it needed is not known")


def test_after_one_sequence_nothing_is_left() -> None:
    for shortage in (Shortage(1), Shortage(1, 1000, 0, 0, 1001)):
        assert next_size(shortage) == Next(0, "not even one sequence fits")


def test_no_jump_goes_below_a_quarter() -> None:
    early = Shortage(4096, 1000, 10, 0, 1001, progress=0.01)
    following = next_size(early)
    assert following.batch_size == 1024
    assert following.reason.endswith("less than a quarter is not tried at once")


def test_a_belief_that_failed_is_left_by_growing_steps() -> None:
    tried = searched(1000, lambda size: Shortage(size, 1000, 0, 0, 1000) if size > 100 else None)
    assert [before - after for before, after in itertools.pairwise(tried)][:7] == [31, 40, 58, 108, 127, 159, 119]


def test_steps_that_memory_led_to_do_not_grow() -> None:
    led = searched(128, lambda size: Shortage(size, 1000, 0, 0, 1050) if size > 90 else None)
    assert led == [128, 121, 115, 109, 103, 98, 93, 88]


def test_after_twelve_errors_they_grow_however_memory_leads() -> None:
    led = searched(1000, lambda size: Shortage(size, 1000, 0, 0, 1040) if size > 100 else None)
    shares = [round((before - after) / before, 2) for before, after in itertools.pairwise(led)]
    assert shares[:16] == [0.04] * 13 + [0.12, 0.25, 0.25]


@given(
    st.integers(1, 5000),
    st.integers(0, 10_000),
    st.integers(0, 10_000),
    st.integers(0, 10_000),
    st.integers(0, 10_000),
    st.floats(0, 1),
)
def test_sizes_fall_and_by_no_more_than_to_a_quarter_or_to_none(
    size: int, capacity: int, fixed: int, coming: int, reached: int, progress: float
) -> None:
    following = next_size(Shortage(size, capacity, fixed, coming, reached, progress))
    chosen = following.batch_size
    assert chosen < size
    assert chosen >= size // FARTHEST if size > 1 else chosen == 0
    assert (chosen == 0) == (size == 1)
    assert following.reason


@given(st.integers(1, 10_000), st.integers(0, 900), st.integers(1, 300))
def test_where_memory_grows_evenly_what_is_found_is_the_largest_or_nearly(start: int, fixed: int, each: int) -> None:
    tried = searched(start, card(1000, fixed, each, progress=0.5))
    largest = min(start, (1000 - fixed) // each)
    assert largest * 0.9 - 1 <= tried[-1] <= max(1, largest)
    assert len(tried) <= 10


@given(st.integers(1, 100_000), st.integers(0, 3000))
def test_errors_are_few_whatever_is_believed(start: int, excess: int) -> None:
    tried = searched(start, lambda size: Shortage(size, 1000, 0, 0, 1000 + excess))
    assert len(tried) <= 20 + 2.5 * start.bit_length()
