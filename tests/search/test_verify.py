"""Claims about the verification of a predicted size, on devices whose memory is a function of the size."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
from examples import examples
from hypothesis import given
from hypothesis import strategies as st

from hf_bsopt.errors import UsageError
from hf_bsopt.records import Outcome, Peak, Trial
from hf_bsopt.search.choose import largest_that, round_down
from hf_bsopt.search.limits import Limits
from hf_bsopt.search.policies import FREE, REAL_GPU, with_calibration
from hf_bsopt.search.throughput import CURVE, curve_sizes, plateau
from hf_bsopt.search.verify import Verification, verify

TOTAL = 10_000
Memory = Callable[[int], float]


def device(memory: Memory, total: float = TOTAL) -> tuple[Callable[[int], Trial], list[int]]:
    """Return a device of ``total`` units on which a batch of n uses ``memory(n)``, and the list of sizes run on it."""
    ran: list[int] = []

    def probe(size: int) -> Trial:
        ran.append(size)
        used = int(memory(size))
        return Trial(size, "fits" if used <= total else "oom", Peak(used, used), used, "measured")

    return probe, ran


def line(fixed: float, each: float) -> Callable[[int], int]:
    return lambda size: int(fixed + each * size)


@dataclass(frozen=True)
class Line:
    """A prediction that a batch of n uses fixed + each·n."""

    fixed: float
    each: float

    def unlimited(self, batch_size: int) -> int:
        return int(self.fixed + self.each * batch_size)

    def expected(self, batch_size: int) -> int:
        return self.unlimited(batch_size)

    def fits_within(self, batch_size: int, total_bytes: float) -> bool:
        return self.unlimited(batch_size) <= total_bytes


def limits(fraction: float = 0.9, *, multiple_of: int = 8, most: int = 1 << 20) -> Limits:
    return Limits(fraction * TOTAL, TOTAL, lambda size: round_down(min(size, most), multiple_of))


# ---- with a prediction


def test_a_right_prediction_is_verified_by_one_probe() -> None:
    probe, ran = device(line(2000, 100))
    result = verify(probe, 64, limits=limits(), prediction=Line(2000, 100))
    assert (result.batch_size, ran, result.is_settled) == (64, [64], True)


@pytest.mark.parametrize("off", [0.5, 0.9, 1.1, 2.0])
def test_a_wrong_prediction_is_corrected_by_what_ran(off: float) -> None:
    probe, ran = device(line(2000, 100))
    predicted = Line(2000 * off, 100 * off)
    first = largest_that(lambda n: predicted.unlimited(n) <= 9000)
    result = verify(probe, first, limits=limits(), prediction=predicted)
    assert (result.batch_size, result.is_settled) == (64, True)
    assert len(ran) <= 4


def test_the_next_size_is_run_too_after_a_wrong_prediction() -> None:
    probe, ran = device(lambda size: 4000 if size < 100 else 2**20)
    result = verify(probe, 64, limits=limits(), prediction=Line(2000, 100), max_attempts=20)
    assert (result.batch_size, result.is_settled) == (96, True)
    assert 104 in ran


@dataclass(frozen=True)
class NearlyFull(Line):
    """A prediction for a device that runs every size up to 62, at the end by freeing the allocator's cache."""

    def expected(self, batch_size: int) -> int:
        return min(self.unlimited(batch_size), TOTAL - 10) if batch_size <= 62 else self.unlimited(batch_size)

    def fits_within(self, batch_size: int, total_bytes: float) -> bool:
        return batch_size <= 62 and total_bytes >= TOTAL * 0.9


def test_a_prediction_right_at_the_edge_of_the_whole_device_is_as_expected() -> None:
    predicted = NearlyFull(2000, 140)
    probe, ran = device(lambda size: predicted.expected(size) if size <= 62 else 2 * TOTAL)
    result = verify(probe, 62, limits=limits(1, multiple_of=1), prediction=predicted)
    assert (result.batch_size, ran, result.is_settled) == (62, [62], True)


def test_memory_of_other_processes_costs_one_more_probe() -> None:
    probe, ran = device(line(2300, 100))
    result = verify(probe, 64, limits=limits(0.85), prediction=Line(2000, 100))
    assert (result.batch_size, ran) == (56, [64, 56])


def test_without_a_prediction_a_line_through_the_sizes_that_ran_replaces_it() -> None:
    probe, ran = device(line(2000, 100))
    result = verify(probe, 1, limits=limits(), max_attempts=9)
    assert (result.batch_size, result.is_settled) == (64, True)
    assert ran[-1] == 72


def test_calibration_sizes_run_first() -> None:
    probe, ran = device(line(2600, 95))
    result = verify(
        probe, 77, limits=limits(1, multiple_of=1), prediction=Line(2300, 100),
        policy=with_calibration(REAL_GPU, (1 / 16, 2 / 3)),
    )  # fmt: skip
    assert ran[:2] == [4, 47]
    assert len(ran) == 3
    assert result.batch_size == ran[-1] >= 0.97 * 77
    assert all(trial.fits for trial in result.trials)


def test_after_the_last_attempt_the_largest_size_that_ran_is_the_answer() -> None:
    probe, ran = device(line(0, 20))
    result = verify(probe, 8, limits=limits(multiple_of=1), max_attempts=2)
    assert result.batch_size in ran
    assert len(ran) == 2
    assert not result.is_settled


def test_the_last_attempt_is_for_the_smallest_size_if_nothing_fits_yet() -> None:
    probe, ran = device(line(8_500, 400))
    result = verify(probe, 512, limits=limits(), prediction=Line(0, 1), max_attempts=3)
    assert (result.batch_size, ran[-1]) == (1, 1)


@pytest.mark.parametrize("outcome", ["crash", "error", "timeout", "killed", "no step"])
def test_nothing_is_run_after_a_failure_other_than_memory(outcome: Outcome) -> None:
    failed = Trial(64, outcome, None, None, "measured", detail="something else")
    result = verify(lambda size: failed, 64, limits=limits())
    assert (result.batch_size, result.trials, result.failure) == (0, (failed,), failed)


@pytest.mark.parametrize("outcome", ["retries", "spill", "over limit"])
def test_a_size_that_ran_with_retries_or_host_memory_does_not_fit(outcome: Outcome) -> None:
    def probe(size: int) -> Trial:
        used = 2000 + 100 * size
        return Trial(size, outcome if size > 40 else "fits", Peak(used, used), used, "measured")

    result = verify(probe, 64, limits=limits(), prediction=Line(2000, 100), max_attempts=9)
    assert result.batch_size == 40


def test_a_size_that_fits_the_device_but_not_the_target_is_not_the_answer() -> None:
    probe, ran = device(line(2000, 100))
    result = verify(probe, 80, limits=limits(), prediction=Line(0, 100))
    assert result.batch_size == 64
    assert ran[0] == 80


def test_the_answer_is_an_allowed_size() -> None:
    divisors = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 96]
    probe, ran = device(line(2000, 100))
    only = Limits(9000, TOTAL, lambda size: max(d for d in divisors if d <= size))
    result = verify(probe, 48, limits=only, prediction=Line(2000, 100))
    assert (result.batch_size, ran, result.is_settled) == (48, [48], True)


def test_zero_attempts_are_a_usage_error() -> None:
    probe, _ = device(line(0, 1))
    with pytest.raises(UsageError, match="max_attempts is at least 1, not 0"):
        verify(probe, 1, limits=limits(), max_attempts=0)


# ---- memory curves of any shape


@st.composite
def curves(draw: st.DrawFn) -> Memory:
    """Draw a memory curve that never falls as the batch grows, with jumps, bends and flat stretches."""
    corners = draw(st.lists(st.integers(1, 400), max_size=5, unique=True).map(sorted))
    slopes = draw(st.lists(st.integers(0, 300), min_size=len(corners) + 1, max_size=len(corners) + 1))
    jumps = draw(st.lists(st.integers(0, 1500), min_size=len(corners), max_size=len(corners)))
    fixed = draw(st.integers(0, 9500))
    bend = draw(st.sampled_from([0.5, 1.0, 1.6]))
    edges = [0, *corners, 1 << 21]

    def memory(size: int) -> float:
        used, where = float(fixed), bisect.bisect_left(corners, size)
        for index in range(where + 1):
            used += slopes[index] * (min(size, edges[index + 1]) - edges[index])
        return used + sum(jumps[:where]) + size**bend

    return memory


def noisy(memory: Memory, noise: float, seed: int) -> Memory:
    """Add an error of up to ``noise`` that is the same for a size every time."""
    return lambda size: memory(size) * (1 + noise * math.sin(1e4 * (size + 1) * (seed + 1)))


@examples(5000)
@given(
    memory=curves(),
    noise=st.sampled_from([0.0, 0.01, 0.1]),
    seed=st.integers(0, 1000),
    guess=st.tuples(st.integers(0, 20_000), st.integers(1, 6000)) | st.none(),
    multiple_of=st.sampled_from([1, 8]),
    most=st.integers(1, 600),
    fraction=st.sampled_from([0.5, 0.9, 1.0]),
    is_cautious=st.booleans(),
    calibration=st.sampled_from([(), (1 / 100, 2 / 3), (1 / 16, 1 / 2)]),
    attempts=st.integers(1, 60),
)
def test_the_answer_was_run_and_fits_and_is_the_largest_if_attempts_allow(
    memory: Memory,
    noise: float,
    seed: int,
    guess: tuple[int, int] | None,
    multiple_of: int,
    most: int,
    fraction: float,
    is_cautious: bool,
    calibration: Sequence[float],
    attempts: int,
) -> None:
    memory = noisy(memory, noise, seed)
    probe, ran = device(memory)
    predicted = Line(*guess) if guess else None
    first = largest_that(lambda n: predicted.unlimited(n) <= fraction * TOTAL, limit=most) if predicted else 1
    within = limits(fraction, multiple_of=multiple_of, most=most)
    policy = with_calibration(REAL_GPU if is_cautious else FREE, tuple(calibration))
    result = verify(probe, first, limits=within, prediction=predicted, policy=policy, max_attempts=attempts)
    assert len(ran) == len(set(ran)) <= attempts
    assert [trial.batch_size for trial in result.trials] == ran
    fitting = [size for size in ran if int(memory(size)) <= fraction * TOTAL]
    assert result.batch_size == max(fitting, default=0)
    if result.is_settled and not _was_trusted(result, predicted):
        following = within.following(result.batch_size)
        is_worth_it = following >= result.batch_size * (1 + REAL_GPU.smallest_gain) or not (is_cautious and predicted)
        assert following == 0 or following in ran or not is_worth_it
    if attempts >= 30:
        assert result.is_settled
    if attempts >= 30 and predicted is None and noise == 0:
        assert result.batch_size == _largest_allowed(memory, within, most)


def _was_trusted(result: Verification, predicted: Line | None) -> bool:
    """Return whether the search may have trusted its prediction: not without one, nor if it was far off at first."""
    if predicted is None:
        return False
    first = result.trials[0]
    return not first.fits or abs((first.used_bytes or 0) - predicted.unlimited(first.batch_size)) <= 0.05 * TOTAL


def _largest_allowed(memory: Memory, within: Limits, most: int) -> int:
    sizes = {within.allowed(size) for size in range(1, most + 1)}
    return max((size for size in sizes if int(memory(size)) <= within.limit_bytes), default=0)


@examples(2500)
@given(
    fixed=st.integers(100, 6000),
    each=st.integers(5, 2000),
    scale=st.floats(0.96, 1.04),
    offset=st.integers(-90, 90),
    fraction=st.sampled_from([0.8, 0.9, 1.0]),
    multiple_of=st.sampled_from([1, 8]),
    calibration=st.sampled_from([(), (1 / 100, 2 / 3), (1 / 16, 1 / 2)]),
)
def test_a_prediction_within_5_percent_needs_at_most_three_probes_and_no_oom(
    fixed: int, each: int, scale: float, offset: int, fraction: float, multiple_of: int, calibration: Sequence[float]
) -> None:
    memory = line(fixed * scale + offset, each * scale)
    probe, ran = device(memory)
    predicted = Line(fixed, each)
    within = limits(fraction, multiple_of=multiple_of)
    policy = with_calibration(REAL_GPU, tuple(calibration))
    first = within.allowed(largest_that(lambda n: predicted.unlimited(n) <= fraction * TOTAL))
    if first == 0 or memory(1) > fraction * TOTAL * 0.95:
        return
    result = verify(probe, first, limits=within, prediction=predicted, policy=policy)
    assert len(ran) <= 3
    assert all(trial.fits for trial in result.trials)
    largest = within.allowed(largest_that(lambda n: memory(n) <= fraction * TOTAL))
    assert result.batch_size in ran
    assert result.batch_size >= 0.97 * largest or within.following(result.batch_size) == largest


# ---- throughput


def timed(size: int, samples_per_second: float | None, outcome: Outcome = "fits") -> Trial:
    return Trial(size, outcome, Peak(1, 1), 1, "measured", samples_per_second=samples_per_second)


def test_the_throughput_curve_has_at_most_five_allowed_sizes() -> None:
    assert curve_sizes(64, lambda n: round_down(n, 8)) == (64, 48, 32, 16, 8)
    assert curve_sizes(3, lambda n: n) == (3, 2, 1)
    assert len(CURVE) == 5


def test_the_smallest_size_within_2_percent_of_the_best_is_on_the_plateau() -> None:
    trials = [timed(64, 100.0), timed(48, 101.0), timed(32, 99.5), timed(16, 80.0)]
    chosen = plateau(trials)
    assert chosen is not None
    assert chosen.batch_size == 32


def test_sizes_that_do_not_fit_or_were_not_timed_are_not_on_the_plateau() -> None:
    chosen = plateau([timed(64, 100.0), timed(32, 99.9, "retries")])
    assert chosen is not None
    assert chosen.batch_size == 64
    assert plateau([timed(64, None)]) is None
