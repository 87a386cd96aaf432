"""Claims about the choice of the batch size, on devices whose memory is linear in it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_bsopt.errors import NothingFitsError, UsageError
from hf_bsopt.options import MAX_BATCH_SIZE, SearchOptions, check_target
from hf_bsopt.records import Decision, Peak, Trial
from hf_bsopt.search.choose import decide, largest_that, round_down


def device(fixed: int, each: int, total: int) -> tuple[Callable[[int], Trial], list[int]]:
    """Return a device of ``total`` units on which a batch of n uses fixed + each·n, and the list of probed sizes."""
    probed: list[int] = []

    def probe(size: int) -> Trial:
        probed.append(size)
        used = fixed + each * size
        return Trial(size, "fits" if used <= total else "oom", Peak(used, used), used, "predicted")

    return probe, probed


def test_the_choice_is_the_largest_multiple_of_8_under_the_target() -> None:
    probe, _ = device(fixed=0, each=1, total=100)
    assert decide(probe, total_bytes=100).batch_size == 88


def test_below_the_first_multiple_the_largest_size_is_chosen() -> None:
    probe, _ = device(fixed=0, each=15, total=100)
    decision = decide(probe, total_bytes=100)
    assert decision.batch_size == 6
    assert decision.bound == "memory"


def test_the_true_largest_size_is_found_too() -> None:
    probe, _ = device(fixed=10, each=1, total=100)
    assert decide(probe, total_bytes=100).largest == 90


def test_a_target_of_1_and_no_multiple_give_the_true_largest() -> None:
    probe, _ = device(fixed=7, each=3, total=100)
    assert decide(probe, total_bytes=100, target=(0, 1), multiple_of=1).batch_size == 31


def test_the_safe_size_leaves_memory_free() -> None:
    probe, _ = device(fixed=0, each=1, total=100)
    assert decide(probe, total_bytes=100).safe == 64


def test_an_upper_limit_is_kept_and_is_the_bound() -> None:
    probe, _ = device(fixed=0, each=1, total=100)
    decision = decide(probe, total_bytes=100, limit=32)
    assert (decision.batch_size, decision.bound) == (32, "limit")
    assert decision.largest == 100


def test_no_size_under_the_target_is_an_error() -> None:
    probe, _ = device(fixed=95, each=1, total=100)
    with pytest.raises(NothingFitsError):
        decide(probe, total_bytes=100)


def test_a_size_that_needs_more_than_its_successor_is_not_recommended() -> None:
    def probe(size: int) -> Trial:
        used = 95 if size == 40 else size
        return Trial(size, "fits", Peak(used, used), used, "predicted")

    decision = decide(probe, total_bytes=100, limit=47)
    assert decision.batch_size == 32


def test_a_good_guess_needs_few_probes() -> None:
    probe, probed = device(fixed=0, each=1, total=10_000)
    largest_that(lambda size: probe(size).fits, guess=9_990)
    assert len(probed) < 12


@pytest.mark.parametrize("target", [(0.9, 0.8), (-0.1, 0.9), (0.8, 1.1), (0.0, 0.0)])
def test_invalid_targets_are_usage_errors(target: tuple[float, float]) -> None:
    with pytest.raises(UsageError):
        check_target(target)


def test_the_error_on_a_swapped_target_shows_the_right_order() -> None:
    with pytest.raises(UsageError, match=r"0\.8 0\.9"):
        check_target((0.9, 0.8))


@pytest.mark.parametrize("wrong", [{"multiple_of": 0}, {"batch_size": 0}, {"batch_size": -3}])
def test_invalid_multiples_and_limits_are_usage_errors(wrong: dict[str, int]) -> None:
    with pytest.raises(UsageError, match="is at least 1"):
        SearchOptions(**wrong)  # type: ignore[arg-type]


def test_without_a_limit_the_default_maximum_is_kept_and_not_called_optimal() -> None:
    probe, _ = device(fixed=0, each=1, total=100_000)
    decision = decide(probe, total_bytes=100_000)
    assert (decision.batch_size, decision.bound, decision.is_optimal) == (8192, "default maximum", False)
    assert decide(probe, total_bytes=100_000, limit=50_000).batch_size == 50_000


@given(st.integers(0, 5000), st.integers(1, 6000), st.integers(1, 5000))
def test_largest_that_finds_the_largest_size_from_any_guess(edge: int, guess: int, limit: int) -> None:
    assert largest_that(lambda size: size <= edge, guess=guess, limit=limit) == min(edge, limit)


@given(
    fixed=st.integers(0, 500),
    each=st.integers(1, 300),
    total=st.integers(1, 100_000),
    multiple_of=st.integers(1, 64),
    high=st.floats(0.05, 1.0),
    limit=st.none() | st.integers(1, 500),
    guess=st.integers(1, 5_000),
)
def test_the_choice_fits_and_the_next_multiple_does_not(
    fixed: int, each: int, total: int, multiple_of: int, high: float, limit: int | None, guess: int
) -> None:
    probe, _ = device(fixed, each, total)

    def chosen() -> Decision:
        return decide(
            probe,
            total_bytes=total,
            target=(0, high),
            multiple_of=multiple_of,
            limit=limit,
            guess=lambda fraction: guess,
        )

    if fixed + each > high * total:
        with pytest.raises(NothingFitsError):
            chosen()
        return
    decision = chosen()
    size, upper = decision.batch_size, limit or MAX_BATCH_SIZE
    assert fixed + each * size <= high * total
    assert size <= upper
    assert size % multiple_of == 0 or size < multiple_of
    following = size + 1 if size < multiple_of else size + multiple_of
    assert following > upper or fixed + each * following > high * total or (size < multiple_of <= following)
    assert decision.largest == (total - fixed) // each
    assert 1 <= decision.safe <= size


@given(st.integers(1, 10_000), st.integers(1, 100))
def test_rounding_down_never_returns_zero(size: int, multiple_of: int) -> None:
    rounded = round_down(size, multiple_of)
    assert 1 <= rounded <= size
    assert rounded % multiple_of == 0 or rounded == size < multiple_of
