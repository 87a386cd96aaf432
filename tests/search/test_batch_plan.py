"""Claims about `hf_bsopt.search.batch_plan`, most of them for all inputs."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_bsopt.errors import BatchSizeError, UsageError
from hf_bsopt.search.batch_plan import BatchPlan, plan, usual_total_tokens

largest_sizes = st.integers(1, 600)
effective_batches = st.integers(1, 20_000)
process_counts = st.integers(1, 16)
lengths = st.integers(1, 4096)


def advised_batch(batch_plan: BatchPlan) -> tuple[int, int, int]:
    """Return the better effective batch that the advice names, with its micro-batch and accumulation."""
    (found,) = re.findall(
        r"nearest better effective batch is (\d+) sequences .*?micro-batch (\d+) × accumulation (\d+)",
        " ".join(batch_plan.advice),
    )
    better, micro_batch, accumulation = (int(number) for number in found)
    return better, micro_batch, accumulation


# ---- the effective batch


@given(largest_sizes, effective_batches, process_counts, lengths)
def test_parts_always_multiply_to_the_effective_batch(
    largest: int, effective: int, processes: int, length: int
) -> None:
    planned = plan(largest, length=length, effective_batch=effective, processes=processes)
    assert planned.micro_batch * planned.accumulation * planned.processes == planned.effective_batch
    assert planned.effective_tokens == planned.effective_batch * length
    assert 1 <= planned.micro_batch <= largest


@given(largest_sizes, st.integers(1, 2000), process_counts)
def test_effective_batch_is_kept_exactly_whenever_processes_divide_it(largest: int, share: int, processes: int) -> None:
    planned = plan(largest, length=128, effective_batch=share * processes, processes=processes)
    assert planned.effective_batch == share * processes
    assert not any("the plan takes the nearest" in sentence for sentence in planned.advice)


def test_effective_batch_is_kept_when_no_divisor_fits() -> None:
    planned = plan(48, length=512, effective_batch=97)
    assert (planned.micro_batch, planned.accumulation, planned.effective_batch) == (1, 97, 97)


@given(largest_sizes, effective_batches)
def test_no_larger_divisor_fits_than_the_micro_batch(largest: int, effective: int) -> None:
    planned = plan(largest, length=128, effective_batch=effective)
    assert not [size for size in range(planned.micro_batch + 1, largest + 1) if effective % size == 0]


@given(largest_sizes, effective_batches, process_counts)
def test_effective_batch_that_processes_cannot_divide_becomes_the_nearest_and_says_so(
    largest: int, effective: int, processes: int
) -> None:
    planned = plan(largest, length=128, effective_batch=effective, processes=processes)
    possible = range(processes, effective + 2 * processes, processes)
    assert planned.effective_batch in possible
    assert abs(planned.effective_batch - effective) == min(abs(other - effective) for other in possible)
    if planned.effective_batch != effective:
        assert str(effective) in planned.advice[0]
        assert str(planned.effective_batch) in planned.advice[0]


@given(largest_sizes, st.integers(1, 5_000_000), process_counts, lengths)
def test_total_tokens_become_the_nearest_total_of_whole_sequences(
    largest: int, total_tokens: int, processes: int, length: int
) -> None:
    planned = plan(largest, length=length, total_tokens=total_tokens, processes=processes)
    unit = length * processes
    below = max(unit, total_tokens // unit * unit)
    assert planned.effective_tokens in (below, below + unit)
    assert abs(planned.effective_tokens - total_tokens) == min(
        abs(below - total_tokens), abs(below + unit - total_tokens)
    )
    if planned.effective_tokens != total_tokens:
        assert f"{total_tokens:,}" in planned.advice[0]
        assert f"{planned.effective_tokens:,}" in planned.advice[0]


def test_total_tokens_determine_the_accumulation() -> None:
    planned = plan(16, length=256, total_tokens=32_768)
    assert (planned.micro_batch, planned.accumulation, planned.effective_batch) == (16, 8, 128)
    assert planned.advice == ()


def test_the_larger_of_two_equally_near_effective_batches_is_planned() -> None:
    assert plan(8, length=128, effective_batch=6, processes=4).effective_batch == 8


def test_fewer_sequences_than_processes_become_one_per_process() -> None:
    planned = plan(8, length=128, effective_batch=2, processes=4)
    assert (planned.micro_batch, planned.accumulation, planned.effective_batch) == (1, 1, 4)


@given(largest_sizes, process_counts)
def test_without_an_effective_batch_every_process_takes_the_largest_without_accumulation(
    largest: int, processes: int
) -> None:
    planned = plan(largest, length=128, processes=processes)
    assert (planned.micro_batch, planned.accumulation) == (largest, 1)
    assert planned.effective_batch == largest * processes
    assert planned.advice == ()


# ---- the advice


@given(st.integers(3, 300), st.integers(1, 5000), process_counts)
def test_advised_effective_batch_is_the_nearest_whose_micro_batch_is_at_least_half(
    largest: int, share: int, processes: int
) -> None:
    planned = plan(largest, length=128, effective_batch=share * processes, processes=processes)
    advised = any("nearest better" in sentence for sentence in planned.advice)
    assert advised == (planned.accumulation > 1 and 2 * planned.micro_batch < largest)
    if not advised:
        return
    better, micro_batch, accumulation = advised_batch(planned)
    assert micro_batch * accumulation * processes == better
    assert largest <= 2 * micro_batch <= 2 * largest
    distance = abs(better // processes - share)
    nearer = range(share - distance + 1, share + distance)
    assert not [n for n in nearer if any(n % size == 0 for size in range((largest + 1) // 2, largest + 1))]


@given(st.integers(3, 300), st.integers(1, 5000))
def test_following_the_advice_gives_the_plan_it_names(largest: int, effective: int) -> None:
    planned = plan(largest, length=128, effective_batch=effective)
    if any("nearest better" in sentence for sentence in planned.advice):
        better, micro_batch, accumulation = advised_batch(planned)
        followed = plan(largest, length=128, effective_batch=better)
        assert (followed.micro_batch, followed.accumulation) == (micro_batch, accumulation)
        assert not any("nearest better" in sentence for sentence in followed.advice)


def test_advice_on_a_poor_divisor_names_both_effective_batches() -> None:
    (advice, slow) = plan(48, length=512, effective_batch=97).advice
    assert "97" in advice
    assert "96 sequences (49,152 tokens): micro-batch 48 × accumulation 2." in advice
    assert "Accumulation 97 is slow" in slow
    assert "a larger divisor" in slow
    assert "max_length" not in slow  # memory is not the problem


def test_advice_on_a_poor_divisor_also_names_the_nearest_batch_that_uses_the_largest() -> None:
    (advice,) = plan(24, length=512, effective_batch=62).advice
    assert "63 sequences" in advice
    assert "the nearest that uses all 24 is 72 (accumulation 3)" in advice


def test_multiple_of_decides_between_equally_near_better_batches() -> None:
    assert advised_batch(plan(12, length=128, effective_batch=17, multiple_of=8))[:2] == (16, 8)
    assert advised_batch(plan(12, length=128, effective_batch=17, multiple_of=9))[:2] == (18, 9)


def test_effective_batch_that_fits_at_once_gets_no_advice() -> None:
    assert plan(48, length=512, effective_batch=7).advice == ()


@pytest.mark.parametrize(("accumulation", "slow"), [(64, False), (65, True)])
def test_accumulation_above_64_is_called_slow_with_a_remedy(accumulation: int, slow: bool) -> None:
    advice = plan(8, length=512, effective_batch=8 * accumulation * 2, processes=2).advice
    assert [sentence.startswith(f"Accumulation {accumulation} is slow") for sentence in advice] == [True] * slow
    if slow:
        assert "at most 1024" in advice[0]


# ---- the learning rate


def test_learning_rate_grows_with_the_square_root_by_default() -> None:
    planned = plan(32, length=512, learning_rate=2e-5, base_batch_size=16)
    assert planned.learning_rate == pytest.approx(2e-5 * 2**0.5)
    assert planned.warmup_epochs is None
    assert "2.83e-05" in planned.advice[0]
    assert "warmup" in planned.advice[1]


def test_learning_rate_is_scaled_by_the_whole_effective_batch() -> None:
    planned = plan(
        16, length=512, effective_batch=256, processes=4, learning_rate=1e-4, base_batch_size=64, lr_scaling="linear"
    )
    assert planned.learning_rate == pytest.approx(4e-4)
    assert planned.warmup_epochs == 5


def test_linear_growth_under_twofold_gets_warmup_in_the_advice_only() -> None:
    planned = plan(24, length=512, learning_rate=1e-4, base_batch_size=16, lr_scaling="linear")
    assert planned.learning_rate == pytest.approx(1.5e-4)
    assert planned.warmup_epochs is None
    assert "warmup" in planned.advice[-1]


def test_smaller_batch_lowers_the_rate_without_warmup() -> None:
    planned = plan(8, length=512, learning_rate=2e-5, base_batch_size=32, lr_scaling="linear")
    assert planned.learning_rate == pytest.approx(5e-6)
    assert planned.warmup_epochs is None
    assert not any("arm" in sentence for sentence in planned.advice)


@given(largest_sizes, st.floats(1e-8, 1.0), st.integers(1, 4096))
def test_scaling_none_leaves_the_rate_unchanged(largest: int, rate: float, base: int) -> None:
    planned = plan(largest, length=128, learning_rate=rate, base_batch_size=base, lr_scaling="none")
    assert (planned.learning_rate, planned.warmup_epochs, planned.advice) == (rate, None, ())


def test_rate_without_a_base_is_unchanged() -> None:
    planned = plan(32, length=512, learning_rate=2e-5)
    assert (planned.learning_rate, planned.warmup_epochs, planned.advice) == (2e-5, None, ())


# ---- invalid arguments


@pytest.mark.parametrize("value", [0, -8])
@pytest.mark.parametrize(
    ("argument", "name"),
    [
        ("effective_batch", "effective_batch_size"),
        ("total_tokens", "total_tokens"),
        ("processes", "num_processes"),
        ("length", "length"),
        ("multiple_of", "multiple_of"),
        ("learning_rate", "learning_rate"),
    ],
)
def test_zero_and_negative_values_are_invalid_and_named(argument: str, name: str, value: int) -> None:
    with pytest.raises(UsageError, match=f"{name} must be above zero, not {value}"):
        plan(8, **{"length": 128, argument: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("rate", [float("nan"), float("inf")])
def test_rate_that_is_not_finite_is_invalid(rate: float) -> None:
    with pytest.raises(UsageError, match="learning_rate must be above zero"):
        plan(8, length=128, learning_rate=rate, base_batch_size=8)


def test_effective_batch_and_total_tokens_together_are_invalid() -> None:
    with pytest.raises(UsageError, match=r"effective_batch_size 32 and total_tokens 8192 .* effective_batch_size 64"):
        plan(8, length=128, effective_batch=32, total_tokens=8192)


def test_base_batch_size_without_a_rate_is_invalid() -> None:
    with pytest.raises(UsageError, match="base_batch_size 16 needs learning_rate"):
        plan(8, length=128, base_batch_size=16)


def test_error_on_unknown_scaling_lists_the_known_ones() -> None:
    with pytest.raises(UsageError, match="sqrt, linear, none, not 'square'"):
        plan(8, length=128, lr_scaling="square")  # type: ignore[arg-type]


def test_a_plan_whose_parts_do_not_multiply_to_the_effective_batch_is_invalid() -> None:
    with pytest.raises(ValueError, match="is 32, not 33"):
        BatchPlan(8, 4, 1, 33, 128, None, None, ())


def test_usage_error_is_a_value_error_and_a_batch_size_error() -> None:
    assert issubclass(UsageError, ValueError)
    assert issubclass(UsageError, BatchSizeError)


# ---- usual totals


@pytest.mark.parametrize(
    ("parameters", "low", "high", "quoted"),
    [
        (0, 16_384, 32_768, "16K-32K"),
        (50_000_000, 16_384, 32_768, "16K-32K"),
        (108_310_272, 32_768, 262_144, "256K for BERT"),
        (124_439_808, 32_768, 262_144, "32K-64K for GPT-2"),
        (6_607_343_616, 4_194_304, 4_194_304, "4M for LLaMA 7B"),
        (403_752_042_496, 4_194_304, 4_194_304, "4M for LLaMA 7B"),
    ],
)
def test_usual_tokens_are_those_of_the_nearest_known_size(parameters: int, low: int, high: int, quoted: str) -> None:
    assert usual_total_tokens(parameters)[:2] == (low, high)
    assert quoted in usual_total_tokens(parameters)[2]


@given(st.integers(1, 10**12), st.integers(1, 10**12))
def test_larger_models_never_get_a_smaller_usual_total(one: int, other: int) -> None:
    smaller, larger = sorted((one, other))
    assert usual_total_tokens(smaller)[:2] <= usual_total_tokens(larger)[:2]


def test_batch_plan_imports_nothing_heavy() -> None:
    code = (
        "import sys, hf_bsopt.search.batch_plan; sys.exit(bool({'torch', 'numpy', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
