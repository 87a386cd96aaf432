"""The batch size that is tried after an out-of-memory error."""

from __future__ import annotations

import itertools
from collections.abc import Callable

from hypothesis import given
from hypothesis import strategies as st

from hf_bsopt.integrations.accelerate.next_size import LARGEST_FACTOR, NextSize, OomFacts, next_size

MIB = 2**20


def searched(start: int, attempt: Callable[[int], OomFacts | None]) -> list[int]:
    """Return the sizes that are tried until one fits or none is left."""
    tried, contradictions = [start], 0
    while (facts := attempt(tried[-1])) is not None:
        following = next_size(facts, len(tried), contradictions)
        contradictions += following.contradicts_estimate
        if following.batch_size == 0:
            break
        tried.append(following.batch_size)
    return tried


def limited_device(capacity: int, fixed: int, each: int, progress: float = 1.0) -> Callable[[int], OomFacts | None]:
    """Return a training that needs fixed + each·n and fails as soon as the device is full."""

    def attempt(size: int) -> OomFacts | None:
        if fixed + each * size <= capacity:
            return None
        done = min(1.0, (capacity - fixed) / (each * size)) if progress < 1 else 1.0
        return OomFacts(size, capacity, fixed, 0, capacity + 1, done)

    return attempt


def test_linear_memory_finds_the_largest_size_in_one_step() -> None:
    assert searched(128, limited_device(capacity=1000, fixed=100, each=14, progress=0.5)) == [128, 64]


def test_pending_bytes_are_reserved() -> None:
    facts = OomFacts(100, capacity_bytes=1000, fixed_bytes=100, pending_bytes=300, reached_bytes=1100)
    assert facts.estimate == 60


def test_reason_states_the_basis_of_the_estimate() -> None:
    facts = OomFacts(128, 1000 * MIB, 100 * MIB, 0, 1060 * MIB, progress=0.5)
    assert next_size(facts) == NextSize(
        60, "15.0 MiB per sequence, estimated from 50% of the forward pass: 60 should fit"
    )


def test_nine_tenths_follow_if_memory_is_unknown() -> None:
    """A limit of 100 from 128 ends with 92, as in accelerate."""
    assert searched(128, lambda size: OomFacts(size) if size > 100 else None) == [128, 115, 103, 92]
    assert next_size(OomFacts(128)) == NextSize(115, "1/10 less, because the memory that it needed is unknown")


def test_steps_grow_after_24_errors_if_memory_is_unknown() -> None:
    tried = searched(100_000, lambda size: OomFacts(size))
    shares = [round(following / before, 2) for before, following in itertools.pairwise(tried)]
    assert shares[:24] == [0.9] * 24
    assert shares[24:30] == [0.87, 0.83, 0.75, 0.67, 0.5, 0.5]
    assert tried[-1] == 1
    assert len(tried) < 45


@given(st.integers(1, 500))
def test_where_memory_is_unknown_at_least_the_size_of_accelerate_is_found(limit: int) -> None:
    """Down to a tenth of the start: below it, 24 errors have happened."""
    start = 10 * limit
    size = start
    while size > limit:
        size = int(size * 0.9)
    assert searched(start, lambda size: OomFacts(size) if size > limit else None)[-1] == size


def test_no_size_is_left_after_one_sequence() -> None:
    for facts in (OomFacts(1), OomFacts(1, 1000, 0, 0, 1001)):
        assert next_size(facts) == NextSize(0, "not even one sequence fits")


def test_no_step_goes_below_a_quarter() -> None:
    early = OomFacts(4096, 1000, 10, 0, 1001, progress=0.01)
    following = next_size(early)
    assert following.batch_size == 1024
    assert following.reason.endswith("; no step goes below a quarter")


def test_steps_grow_while_estimates_are_contradicted() -> None:
    tried = searched(1000, lambda size: OomFacts(size, 1000, 0, 0, 1000) if size > 100 else None)
    assert [before - after for before, after in itertools.pairwise(tried)][:7] == [31, 40, 58, 108, 127, 159, 119]


def test_steps_do_not_grow_while_the_estimate_is_lower() -> None:
    tried = searched(128, lambda size: OomFacts(size, 1000, 0, 0, 1050) if size > 90 else None)
    assert tried == [128, 121, 115, 109, 103, 98, 93, 88]


def test_steps_grow_after_twelve_errors_in_any_case() -> None:
    tried = searched(1000, lambda size: OomFacts(size, 1000, 0, 0, 1040) if size > 100 else None)
    shares = [round((before - after) / before, 2) for before, after in itertools.pairwise(tried)]
    assert shares[:16] == [0.04] * 13 + [0.12, 0.25, 0.25]


@given(
    st.integers(1, 5000),
    st.integers(0, 10_000),
    st.integers(0, 10_000),
    st.integers(0, 10_000),
    st.integers(0, 10_000),
    st.floats(0, 1),
)
def test_sizes_decrease_to_no_less_than_a_quarter_or_to_zero(
    size: int, capacity: int, fixed: int, pending: int, reached: int, progress: float
) -> None:
    following = next_size(OomFacts(size, capacity, fixed, pending, reached, progress))
    chosen = following.batch_size
    assert chosen < size
    assert chosen >= size // LARGEST_FACTOR if size > 1 else chosen == 0
    assert (chosen == 0) == (size == 1)
    assert following.reason


@given(st.integers(1, 10_000), st.integers(0, 900), st.integers(1, 300))
def test_linear_memory_finds_nearly_the_largest_size(start: int, fixed: int, each: int) -> None:
    tried = searched(start, limited_device(1000, fixed, each, progress=0.5))
    largest = min(start, (1000 - fixed) // each)
    assert largest * 0.9 - 1 <= tried[-1] <= max(1, largest)
    assert len(tried) <= 10


@given(st.integers(1, 100_000), st.integers(0, 3000))
def test_number_of_errors_is_bounded_for_any_estimate(start: int, excess: int) -> None:
    tried = searched(start, lambda size: OomFacts(size, 1000, 0, 0, 1000 + excess))
    assert len(tried) <= 20 + 2.5 * start.bit_length()
