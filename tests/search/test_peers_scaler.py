"""The scenarios of other projects' searches for the largest batch size: a true limit of 100, from any start."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from hf_bsopt.search import largest
from hf_bsopt.search.largest import find_largest_batch_size

TRUE_LIMIT = 100
STEPS = 3


@pytest.fixture(autouse=True)
def no_garbage_collection(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here holds memory, and collecting the garbage of a whole test session is slow (see test_largest.py)."""
    monkeypatch.setattr(largest, "_free_memory", lambda: None)


def training(
    failing_step: int = 1, error: Callable[[], Exception] | None = None
) -> tuple[Callable[[int], None], list[int]]:
    """Return a training of three steps that runs out of memory in one of them above 100, and the sizes it was given."""
    sizes: list[int] = []

    def run(batch_size: int) -> None:
        sizes.append(batch_size)
        for step in range(1, STEPS + 1):
            if step == failing_step and batch_size > TRUE_LIMIT:
                raise error() if error else torch.OutOfMemoryError("CUDA out of memory.")

    return run, sizes


@pytest.mark.parametrize("start", [1, 2, 16, 64, 99, 100, 101, 500, 8192])
@pytest.mark.parametrize("failing_step", [1, 2, 3])
def test_the_true_limit_is_found_from_any_start_and_was_run(start: int, failing_step: int) -> None:
    run, sizes = training(failing_step)
    found = find_largest_batch_size(run, start=start)
    assert (found.batch_size, found.bound, found.is_settled) == (TRUE_LIMIT, "memory", True)
    assert TRUE_LIMIT in sizes and TRUE_LIMIT + 1 in sizes
    assert len(sizes) == len(set(sizes)) <= 20


@pytest.mark.parametrize("limit", [1, 7, 99, 100, 101, 128])
@pytest.mark.parametrize("start", [2, 16, 64, 500])
def test_a_limit_is_never_exceeded_and_reached_if_it_fits(start: int, limit: int) -> None:
    run, sizes = training()
    found = find_largest_batch_size(run, start=start, limit=limit)
    assert found.batch_size == min(TRUE_LIMIT, limit)
    assert max(sizes) <= limit
    assert found.bound == ("limit" if limit <= TRUE_LIMIT else "memory")


@pytest.mark.parametrize("attempts", [1, 2, 3, 4, 5, 6])
@pytest.mark.parametrize("start", [2, 16, 64, 500])
def test_a_search_cut_short_answers_with_the_largest_size_that_ran(start: int, attempts: int) -> None:
    run, sizes = training()
    found = find_largest_batch_size(run, start=start, max_attempts=attempts)
    assert len(sizes) <= attempts
    assert found.batch_size == max((size for size in sizes if size <= TRUE_LIMIT), default=0)
    assert found.is_settled == (found.bound == "memory")


@pytest.mark.parametrize(
    "error",
    [
        lambda: RuntimeError("CUDA error: out of memory"),
        lambda: RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear if you passed in a non-"
                             "contiguous input."),
        lambda: RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        lambda: MemoryError(),
    ],
)  # fmt: skip
def test_every_kind_of_memory_error_ends_a_size(error: Callable[[], Exception]) -> None:
    run, _ = training(2, error)
    assert find_largest_batch_size(run, start=16).batch_size == TRUE_LIMIT


def test_another_error_ends_the_search() -> None:
    run, sizes = training(2, lambda: RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        find_largest_batch_size(run, start=500)
    assert sizes == [500]


def test_nothing_fits_is_zero() -> None:
    def run(batch_size: int) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    found = find_largest_batch_size(run, start=16)
    assert (found.batch_size, found.bound) == (0, "memory")
