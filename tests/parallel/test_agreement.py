"""Processes that agree on a batch size, or get the reason why they cannot."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from ranks import run
from torch import distributed
from torch.distributed.distributed_c10d import _get_default_store

from hf_bsopt.errors import AgreementError, BatchSizeError, UsageError
from hf_bsopt.parallel.agreement import Agreement, agree, exchange, post_message, report_failure
from hf_bsopt.parallel.collectives import collectives_started

TIMEOUT_SECONDS = 1.0
SLACK_SECONDS = 10.0
"""Upper limit for a call that does not wait, even on a busy machine."""


# ---- one process


def test_single_process_keeps_its_size() -> None:
    assert agree(48) == Agreement(48, (48,))
    assert exchange("word") == ("word",)


def test_single_process_reports_nothing() -> None:
    post_message("word")
    assert report_failure(ValueError("wrong")) is None
    assert collectives_started() == {}


def test_size_under_one_is_rejected() -> None:
    with pytest.raises(UsageError, match="at least 1; rank 0 has 0"):
        agree(0)


def test_agreement_error_names_the_ranks() -> None:
    error = AgreementError("rank 1 failed", (1,))
    assert isinstance(error, BatchSizeError)
    assert error.ranks == (1,)


# ---- functions that the ranks run


def agree_on(size: int) -> Any:
    agreement = agree(size)
    return [agreement.batch_size, list(agreement.sizes), agreement.rank]


def agree_repeatedly(sizes: list[int]) -> list[int]:
    return [agree(size).batch_size for size in sizes]


def agree_or_fail(size: int | None) -> int:
    if size is not None:
        return agree(size).batch_size
    error = report_failure(ValueError("no such layer\nin two lines"))
    assert error is not None
    raise error


def agree_after_a_failure(size: int | None) -> list[Any]:
    failure: BaseException | None = None
    if size is None:
        failure = report_failure(ValueError("only once"))
    else:
        try:
            agree(size)
        except AgreementError as error:
            failure = error
    return [str(failure), agree(size or 5).batch_size]


def agree_or_exit(size: int | None) -> int:
    if size is None:
        os._exit(3)
    return agree(size, timeout_seconds=TIMEOUT_SECONDS).batch_size


def agree_or_wait_in_a_collective(size: int | None) -> int:
    if size is None:
        distributed.all_reduce(torch.ones(1))
    return agree(size or 1, timeout_seconds=TIMEOUT_SECONDS).batch_size


def arrive_late(is_late: bool) -> int:
    if is_late:
        _get_default_store().wait(["hf_bsopt/agreement/0/outcome"])
    return agree(7, timeout_seconds=TIMEOUT_SECONDS).batch_size


def post_message_or_exchange(word: str) -> list[str]:
    if word == "finished":
        post_message(word)
        return list(exchange("afterwards"))
    return [*exchange(word), *exchange("afterwards")]


def start_collectives(times: int) -> list[int]:
    group = distributed.new_group([0, 1])
    before = collectives_started()
    distributed.all_reduce(torch.ones(1))
    if times == 2:
        distributed.all_reduce(torch.ones(1), group=group, async_op=True)
    return [count - before[name] for name, count in collectives_started().items()]


# ---- outcomes


def test_all_ranks_agree_on_the_smallest_size_and_its_rank() -> None:
    first, second, third = run(agree_on, 48, 32, 40)
    assert first.value == second.value == third.value == [32, [48, 32, 40], 1]


def test_consecutive_rounds_are_independent() -> None:
    first, second = run(agree_repeatedly, [5, 9, 1, 8], [7, 3, 2, 8])
    assert first.value == second.value == [5, 3, 1, 8]


@pytest.mark.parametrize("given", [(48, None), (None, 48)])
@pytest.mark.parametrize("store_is_separate", [True, False])
def test_failure_is_reported_on_every_rank_at_once(
    given: tuple[int | None, int | None], store_is_separate: bool
) -> None:
    for answer in run(agree_or_fail, *given, store_is_separate=store_is_separate):
        failed = given.index(None)
        assert (answer.error, answer.message) == ("AgreementError", f"rank {failed} failed: ValueError: no such layer")
        assert answer.seconds < SLACK_SECONDS


def test_round_after_a_failure_succeeds() -> None:
    first, second = run(agree_after_a_failure, 6, None)
    assert first.value == second.value == ["rank 1 failed: ValueError: only once", 5]


def test_ended_rank_is_named_after_the_timeout() -> None:
    first, second = run(agree_or_exit, 48, None)
    assert first.error == "AgreementError"
    assert first.message.startswith("rank 1 of 2 did not respond within 1 s")
    assert TIMEOUT_SECONDS * 0.9 < first.seconds < TIMEOUT_SECONDS + SLACK_SECONDS
    assert second.error == ""


def test_rank_waiting_in_a_collective_is_named_and_freed_when_the_other_ends() -> None:
    first, second = run(agree_or_wait_in_a_collective, 48, None)
    assert first.message.startswith("rank 1 of 2 did not respond within 1 s")
    assert second.error in ("RuntimeError", "DistBackendError")
    assert second.seconds < TIMEOUT_SECONDS + SLACK_SECONDS


def test_all_missing_ranks_are_named() -> None:
    first, *_ = run(agree_or_exit, 48, None, None)
    assert first.message.startswith("ranks 1, 2 of 3 did not respond")


def test_late_rank_gets_the_same_error_as_the_others() -> None:
    first, second = run(arrive_late, False, True)
    assert first.error == second.error == "AgreementError"
    assert first.message == second.message
    assert first.message.startswith("rank 1 of 2 did not respond")


def test_lost_store_is_reported() -> None:
    _, second = run(agree_or_exit, None, 48, store_is_separate=False)
    assert second.error == "AgreementError"
    assert "the store of the process group does not respond" in second.message
    assert second.seconds < TIMEOUT_SECONDS + SLACK_SECONDS


def test_size_under_one_is_rejected_on_every_rank() -> None:
    first, second = run(agree_on, 4, 0)
    assert first.error == second.error == "UsageError"
    assert "rank 1 has 0" in first.message


def test_message_can_be_posted_without_waiting() -> None:
    first, second = run(post_message_or_exchange, "finished", "waiting")
    assert first.value == ["afterwards", "afterwards"]
    assert second.value == ["finished", "waiting", "afterwards", "afterwards"]


def test_started_collectives_are_counted_by_group() -> None:
    first, second = run(start_collectives, 2, 1)
    assert first.value == [1, 1]
    assert second.value == [1, 0]
