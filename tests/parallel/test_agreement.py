"""Two processes that agree on a size, or hear why they can't."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from ranks import run
from torch import distributed
from torch.distributed.distributed_c10d import _get_default_store

from hf_bsopt.errors import AgreementError, BatchSizeError, UsageError
from hf_bsopt.parallel.agreement import Agreement, agree, collectives_begun, exchange, leave_word, report_failure

SOON = 2.0
MOMENT = 10.0
"""Seconds in which something is over that waits for nothing, on a busy machine too."""


# ---- one process


def test_alone_the_size_is_what_it_was() -> None:
    assert agree(48) == Agreement(48, (48,))
    assert exchange("word") == ("word",)


def test_alone_there_is_nobody_to_tell() -> None:
    leave_word("word")
    assert report_failure(ValueError("wrong")) is None
    assert collectives_begun() == {}


def test_a_size_under_one_is_refused() -> None:
    with pytest.raises(UsageError, match="at least 1, not 0"):
        agree(0)


def test_the_error_is_one_of_this_package_and_names_ranks() -> None:
    error = AgreementError("rank 1 failed", (1,))
    assert isinstance(error, BatchSizeError)
    assert error.ranks == (1,)


# ---- what the ranks do


def take(size: int) -> Any:
    agreement = agree(size)
    return [agreement.batch_size, list(agreement.sizes), agreement.rank]


def take_one_after_another(sizes: list[int]) -> list[int]:
    return [agree(size).batch_size for size in sizes]


def take_or_fail(size: int | None) -> int:
    if size is not None:
        return agree(size).batch_size
    error = report_failure(ValueError("no such layer\nin two lines"))
    assert error is not None
    raise error


def take_after_a_failure(size: int | None) -> list[Any]:
    told: BaseException | None = None
    if size is None:
        told = report_failure(ValueError("only once"))
    else:
        try:
            agree(size)
        except AgreementError as error:
            told = error
    return [str(told), agree(size or 5).batch_size]


def take_or_end(size: int | None) -> int:
    if size is None:
        os._exit(3)
    return agree(size, timeout_seconds=SOON).batch_size


def take_or_wait_in_a_collective(size: int | None) -> int:
    if size is None:
        distributed.all_reduce(torch.ones(1))
    return agree(size or 1, timeout_seconds=SOON).batch_size


def come_too_late(is_late: bool) -> int:
    if is_late:
        _get_default_store().wait(["hf_bsopt/agreement/0/outcome"])
    return agree(7, timeout_seconds=SOON).batch_size


def leave_word_or_exchange(word: str) -> list[str]:
    if word == "through":
        leave_word(word)
        return list(exchange("afterwards"))
    return [*exchange(word), *exchange("afterwards")]


def begin_collectives(times: int) -> list[int]:
    group = distributed.new_group([0, 1])
    before = collectives_begun()
    distributed.all_reduce(torch.ones(1))
    if times == 2:
        distributed.all_reduce(torch.ones(1), group=group, async_op=True)
    return [count - before[name] for name, count in collectives_begun().items()]


# ---- what comes of it


def test_all_take_the_smallest_and_know_whose_it_is() -> None:
    first, second, third = run(take, 48, 32, 40)
    assert first.value == second.value == third.value == [32, [48, 32, 40], 1]


def test_rounds_are_not_mixed_up() -> None:
    first, second = run(take_one_after_another, [5, 9, 1, 8], [7, 3, 2, 8])
    assert first.value == second.value == [5, 3, 1, 8]


@pytest.mark.parametrize("given", [(48, None), (None, 48)])
@pytest.mark.parametrize("store_is_apart", [True, False])
def test_a_failure_is_told_on_every_rank_at_once(given: tuple[int | None, int | None], store_is_apart: bool) -> None:
    for answer in run(take_or_fail, *given, store_is_apart=store_is_apart):
        failed = given.index(None)
        assert (answer.error, answer.words) == ("AgreementError", f"rank {failed} failed: ValueError: no such layer")
        assert answer.seconds < MOMENT


def test_after_a_failure_the_next_round_is_a_new_one() -> None:
    first, second = run(take_after_a_failure, 6, None)
    assert first.value == second.value == ["rank 1 failed: ValueError: only once", 5]


def test_a_rank_that_has_ended_is_named_after_the_timeout() -> None:
    first, second = run(take_or_end, 48, None)
    assert first.error == "AgreementError"
    assert first.words.startswith("rank 1 of 2 did not come to an agreement within 2 s")
    assert SOON * 0.9 < first.seconds < SOON + MOMENT
    assert second.error == ""


def test_who_waits_in_a_collective_is_named_and_is_freed_when_the_other_ends() -> None:
    first, second = run(take_or_wait_in_a_collective, 48, None)
    assert first.words.startswith("rank 1 of 2 did not come to an agreement within 2 s")
    assert second.error in ("RuntimeError", "DistBackendError")
    assert second.seconds < SOON + MOMENT


def test_all_who_are_missing_are_named() -> None:
    first, *_ = run(take_or_end, 48, None, None)
    assert first.words.startswith("ranks 1, 2 of 3 did not come")


def test_a_rank_that_comes_too_late_hears_that_the_others_gave_up() -> None:
    first, second = run(come_too_late, False, True)
    assert first.error == second.error == "AgreementError"
    assert first.words == second.words
    assert first.words.startswith("rank 1 of 2 did not come")


def test_a_store_that_is_gone_is_told_as_that() -> None:
    _, second = run(take_or_end, None, 48, store_is_apart=False)
    assert second.error == "AgreementError"
    assert "the store in which the ranks meet does not answer" in second.words
    assert second.seconds < SOON + MOMENT


def test_a_size_under_one_is_refused_on_every_rank() -> None:
    first, second = run(take, 4, 0)
    assert first.error == second.error == "UsageError"
    assert "as rank 1 has it" in first.words


def test_a_word_can_be_left_without_waiting() -> None:
    first, second = run(leave_word_or_exchange, "through", "stuck")
    assert first.value == ["afterwards", "afterwards"]
    assert second.value == ["through", "stuck", "afterwards", "afterwards"]


def test_collectives_are_counted_as_they_begin_in_every_group() -> None:
    first, second = run(begin_collectives, 2, 1)
    assert first.value == [1, 1]
    assert second.value == [1, 0]
