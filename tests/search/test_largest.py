"""Claims about the search for the largest batch size without a prediction."""

from __future__ import annotations

import doctest
import gc
import subprocess
import sys
import weakref
from unittest import mock

import pytest
from examples import examples
from hypothesis import given
from hypothesis import strategies as st

from hf_bsopt.errors import UsageError
from hf_bsopt.search import largest
from hf_bsopt.search.largest import Attempt, find_largest_batch_size


def test_the_examples_in_the_docstring_are_true() -> None:
    result = doctest.testmod(largest)
    assert result.attempted >= 9
    assert result.failed == 0


@examples(2000)
@given(
    true=st.integers(0, 900),
    start=st.integers(1, 900),
    limit=st.integers(1, 600),
    max_attempts=st.none() | st.integers(1, 12),
)
def test_the_result_was_run_and_is_exact_if_the_attempts_suffice(
    true: int, start: int, limit: int, max_attempts: int | None
) -> None:
    ran: list[int] = []

    def run(batch_size: int) -> None:
        ran.append(batch_size)
        if batch_size > true:
            raise MemoryError

    with mock.patch.object(largest, "_free_memory"):  # collecting the garbage of a whole test session is slow
        found = find_largest_batch_size(run, start=start, limit=limit, max_attempts=max_attempts)
    assert [attempt.batch_size for attempt in found.attempts] == ran
    assert len(ran) == len(set(ran)) <= (max_attempts or 30)
    assert found.batch_size == max((size for size in ran if size <= true), default=0)
    assert found.is_settled == (found.bound != "attempts")
    if found.is_settled:
        assert found.batch_size == min(true, limit)
        assert (found.bound == "limit") == (true >= limit)


@examples(500)
@given(misfits=st.sets(st.integers(1, 80)), start=st.integers(1, 80))
def test_if_memory_is_irregular_the_result_fits_and_the_next_size_does_not(misfits: set[int], start: int) -> None:
    ran: list[int] = []

    def run(batch_size: int) -> None:
        ran.append(batch_size)
        if batch_size in misfits:
            raise MemoryError

    with mock.patch.object(largest, "_free_memory"):
        found = find_largest_batch_size(run, start=start, limit=80)
    assert found.batch_size == max((size for size in ran if size not in misfits), default=0)
    assert found.batch_size == 80 or found.batch_size + 1 in misfits & set(ran)


def test_the_error_message_is_kept_and_tensors_in_its_traceback_are_freed() -> None:
    class Tensor:
        pass

    alive: list[weakref.ref[Tensor]] = []

    def run(batch_size: int) -> None:
        assert all(reference() is None for reference in alive)
        tensor = Tensor()
        alive.append(weakref.ref(tensor))
        if batch_size > 1:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    gc.disable()
    try:
        found = find_largest_batch_size(run, start=4, limit=8)
    finally:
        gc.enable()
    assert [attempt.fits for attempt in found.attempts] == [False, False, True]
    assert "CUDA out of memory" in found.attempts[0].detail
    assert found.attempts[2] == Attempt(1, True)


def test_an_error_other_than_out_of_memory_propagates() -> None:
    def run(batch_size: int) -> None:
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        find_largest_batch_size(run)


def test_a_return_value_of_false_is_not_a_failure() -> None:
    assert find_largest_batch_size(lambda batch_size: False, limit=32).batch_size == 32


@pytest.mark.parametrize("wrong", [{"start": 0}, {"limit": 0}, {"max_attempts": 0}, {"limit": 1.5}, {"start": True}])
def test_invalid_arguments_are_usage_errors(wrong: dict[str, int]) -> None:
    with pytest.raises(UsageError, match=f"{next(iter(wrong))} is invalid.*at least 1"):
        find_largest_batch_size(lambda batch_size: None, **wrong)


def test_torch_is_not_imported() -> None:
    code = """
import sys
from hf_bsopt.search.largest import find_largest_batch_size
def run(batch_size):
    if batch_size > 5:
        raise MemoryError
assert find_largest_batch_size(run).batch_size == 5
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
