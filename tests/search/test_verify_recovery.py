"""Claims about the search after an OOM refuted the prediction: how close it comes to the true largest size, how fast.

Memory is affine in the size: used = a + b·n, exact to the byte, with any a >= 0 and b > 0; the prediction is any other
line. Then five attempts suffice. If the bytes carry no information, each attempt gives one bit: the bound is weaker.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from examples import examples
from hypothesis import given
from hypothesis import strategies as st

from hf_bsopt.records import Peak, Trial
from hf_bsopt.search.choose import round_down
from hf_bsopt.search.limits import Limits
from hf_bsopt.search.policies import FREE, REAL_GPU, Policy, with_calibration
from hf_bsopt.search.verify import Verification, verify

TOTAL = 80 * 2**30
POLICIES = st.sampled_from([FREE, REAL_GPU])


class PredictedLine:
    """A prediction by which ``largest`` is the largest size within 90 % of the device.

    constant: fraction of the 90 % that does not depend on the size.
    """

    def __init__(self, largest: int, constant: float, fraction: float = 0.9) -> None:
        self.fixed = constant * fraction * TOTAL
        self.each = (fraction * TOTAL - self.fixed) / (largest + 0.5)

    def unlimited(self, batch_size: int) -> int:
        return int(self.fixed + self.each * batch_size)

    def expected(self, batch_size: int) -> int:
        return self.unlimited(batch_size)

    def fits_within(self, batch_size: int, total_bytes: float) -> bool:
        return self.unlimited(batch_size) <= total_bytes


def search(
    true: int,
    predicted: int,
    memory: Callable[[int], int | None],
    *,
    multiple_of: int,
    policy: Policy,
    max_attempts: int,
    predicted_constant: float = 0.3,
) -> tuple[Verification, int]:
    """Return (the result, the largest allowed size), on a device where sizes up to ``true`` fit."""
    ran: list[int] = []

    def probe(size: int) -> Trial:
        ran.append(size)
        if size > true:
            return Trial(size, "oom", None, None, "measured")
        used = memory(size)
        return Trial(size, "fits", Peak(used or 0, used or 0), used, "measured")

    limits = Limits(0.9 * TOTAL, TOTAL, lambda n: round_down(n, multiple_of))
    first = limits.allowed(predicted)
    prediction = PredictedLine(predicted, predicted_constant)
    result = verify(probe, first, limits=limits, policy=policy, prediction=prediction, max_attempts=max_attempts)
    assert len(ran) == len(set(ran)) <= max_attempts
    assert result.batch_size == max((size for size in ran if size <= true), default=0)
    return result, limits.allowed(true)


def affine(true: int, constant: float) -> Callable[[int], int]:
    """Return memory that reaches 90 % of the device half a sequence above ``true``.

    constant: fraction of the 90 % that does not depend on the size.
    """
    limit = 0.9 * TOTAL
    fixed = constant * limit
    return lambda n: int(fixed + (limit - fixed) / (true + 0.5) * n)


@examples(3000)
@given(
    data=st.data(),
    predicted=st.integers(8, 4096),
    constant=st.floats(0, 0.99),
    predicted_constant=st.floats(0, 0.99),
    multiple_of=st.sampled_from([1, 8]),
    policy=POLICIES,
    attempts=st.sampled_from([5, 10]),
)
def test_affine_memory_is_learned_whatever_the_prediction(
    data: st.DataObject,
    predicted: int,
    constant: float,
    predicted_constant: float,
    multiple_of: int,
    policy: Policy,
    attempts: int,
) -> None:
    true = data.draw(st.integers(1, predicted))
    result, largest = search(
        true,
        predicted,
        affine(true, constant),
        multiple_of=multiple_of,
        policy=policy,
        max_attempts=attempts,
        predicted_constant=predicted_constant,
    )
    fraction = 0.75 if attempts == 5 else 0.97
    assert (
        result.batch_size >= largest * fraction or round_down(int(largest * fraction), multiple_of) <= result.batch_size
    )
    if attempts == 10:
        assert result.is_settled


@examples(2000)
@given(
    data=st.data(),
    predicted=st.integers(8, 4096),
    flat=st.none() | st.floats(0, 0.89),
    multiple_of=st.sampled_from([1, 8]),
    policy=POLICIES,
    attempts=st.sampled_from([5, 10]),
)
def test_bisection_bounds_the_loss_if_bytes_carry_no_information(
    data: st.DataObject, predicted: int, flat: float | None, multiple_of: int, policy: Policy, attempts: int
) -> None:
    """Four more attempts give four bits, and the limit is in a range of up to 2^12: 75 % cannot be guaranteed."""
    true = data.draw(st.integers(1, predicted))
    result, largest = search(
        true,
        predicted,
        lambda n: None if flat is None else int(flat * TOTAL),
        multiple_of=multiple_of,
        policy=policy,
        max_attempts=attempts,
    )
    fraction = {(False, 5): 1 / 8, (False, 10): 0.88, (True, 5): 1 / 48, (True, 10): 0.7}[flat is not None, attempts]
    assert result.batch_size >= round_down(int(largest * fraction), multiple_of)


@pytest.mark.parametrize(("true", "predicted"), [(165, 503), (100, 128)])
@pytest.mark.parametrize("policy", [FREE, REAL_GPU, with_calibration(REAL_GPU, (1 / 100,))])
@pytest.mark.parametrize("is_flat", [False, True])
def test_the_search_does_not_grow_slowly_from_a_small_size(
    true: int, predicted: int, policy: Policy, is_flat: bool
) -> None:
    memory = (lambda n: TOTAL // 4) if is_flat else affine(true, 0.3)
    result, _ = search(true, predicted, memory, multiple_of=1, policy=policy, max_attempts=5)
    assert result.batch_size >= (0.15 if is_flat else 0.95) * true


def test_a_refuted_prediction_is_reported_with_its_error() -> None:
    memory = affine(100, 0.3)
    result, _ = search(100, 400, memory, multiple_of=1, policy=FREE, max_attempts=9)
    assert (result.batch_size, result.predicted_size, result.refuted) == (100, 400, True)
    assert result.memory_factor == pytest.approx(memory(100) / PredictedLine(400, 0.3).expected(100))


def test_a_correct_prediction_is_not_refuted() -> None:
    result, _ = search(100, 100, affine(100, 0.3), multiple_of=1, policy=FREE, max_attempts=5)
    assert (result.batch_size, result.predicted_size, result.refuted) == (100, 100, False)
    assert result.memory_factor == pytest.approx(1)
