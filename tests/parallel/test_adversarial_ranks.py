"""A rank that fails, is interrupted, killed or stopped: every other one names it within a minute."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from typing import Any

import pytest
import torch
from ranks import run
from torch import nn
from torch.distributed.distributed_c10d import _get_default_store

from hf_bsopt.integrations.accelerate.accelerator import find_executable_batch_size
from hf_bsopt.parallel import heartbeat
from hf_bsopt.parallel.agreement import agree, exchange, failures_logged, failures_reported, start_heartbeat
from hf_bsopt.parallel.heartbeat import BEAT_SECONDS, is_gone

LIMIT_SECONDS = 60.0
SLACK_SECONDS = 20.0
PATIENT_SECONDS = 600.0
CAUSE = "CUDA out of memory"


# ---- functions that the ranks run


def end_after_a_beat(how: str) -> int:
    """Agree once, so that all ranks have a heartbeat; then one of them goes."""
    agree(8)
    time.sleep(2 * BEAT_SECONDS)
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "exit":
        os._exit(0)
    if how == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if how in INTERRUPTIONS:
        with failures_reported():
            raise INTERRUPTIONS[how]
    return agree(4, timeout_seconds=PATIENT_SECONDS).batch_size


INTERRUPTIONS = {"SIGINT": KeyboardInterrupt(), "sys.exit": SystemExit(3), "generator": GeneratorExit()}


class Model(nn.Module):
    """A model whose forward pass, of the given number, ends its process in the given way."""

    def __init__(self, how: str, at: int) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.how, self.at, self.count = how, at, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count += 1
        if self.how and self.count == self.at:
            time.sleep(2 * BEAT_SECONDS)
            leave(self.how)
        return self.layer(x)


def leave(how: str) -> None:
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif how == "hang":
        time.sleep(heartbeat.HANG_SECONDS + 10)
        os._exit(1)
    elif how == "oom":
        raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 MiB.")
    else:
        raise INTERRUPTIONS[how]


def train(given: tuple[str, int]) -> Any:
    """Train with DistributedDataParallel; one rank leaves in the forward pass of this number."""
    messages = log_to_list()

    @find_executable_batch_size(starting_batch_size=64)
    def training(batch_size: int) -> int:
        model = nn.parallel.DistributedDataParallel(Model(*given))
        for _ in range(4):
            model(torch.zeros(batch_size, 1)).sum().backward()
        return batch_size

    began = time.monotonic()
    try:
        training()
    except Exception as error:
        return [type(error).__name__, str(error), messages, time.monotonic() - began]
    except BaseException as error:
        return [type(error).__name__, "", messages, time.monotonic() - began]
    return ["", "", messages, 0.0]


def log_to_list() -> list[str]:
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("hf_bsopt").addHandler(handler)
    return messages


def name_while_waiting(how: str) -> list[str]:
    """One rank is killed while the other is in no exchange, as in a collective that never ends."""
    agree(8)
    messages = log_to_list()
    time.sleep(2 * BEAT_SECONDS)
    if how:
        leave(how)
    with failures_logged(lambda error: f"start again with 8: {error}"):
        deadline = time.monotonic() + LIMIT_SECONDS
        while not messages and time.monotonic() < deadline:
            time.sleep(0.2)
    return messages


def finish_after_the_store_is_gone(is_host: bool) -> int:
    """Rank 0, whose process has the store, ends while the other one still trains."""

    def training(batch_size: int) -> int:
        if not is_host:
            wait_for_end_of_store()
        return batch_size

    found = find_executable_batch_size(training, 16)()
    if is_host:
        os._exit(0)
    return found


def wait_for_end_of_store() -> None:
    store = _get_default_store()
    deadline = time.monotonic() + LIMIT_SECONDS
    while time.monotonic() < deadline:
        try:
            store.check(["anything"])
        except RuntimeError:
            return
        time.sleep(0.1)


def count_heartbeats(_: None) -> int:
    for _ in range(3):
        exchange("word")
        start_heartbeat()
    return sum(thread.name == "hf_bsopt heartbeat" for thread in threading.enumerate())


# ---- outcomes


@pytest.mark.parametrize("how", ["kill", "exit"])
def test_a_rank_that_ended_is_named_at_once_whatever_the_timeout(how: str) -> None:
    first, _ = run(end_after_a_beat, "", how)
    assert first.error == "AgreementError"
    assert first.message.startswith("rank 1 ended: its process ")
    assert first.seconds < SLACK_SECONDS


@pytest.mark.parametrize("how", ["SIGINT", "sys.exit", "generator"])
def test_whatever_leaves_a_rank_is_reported_to_the_others(how: str) -> None:
    first, second = run(end_after_a_beat, "", how)
    name = type(INTERRUPTIONS[how]).__name__
    assert first.error == "AgreementError"
    assert first.message.startswith(f"rank 1 failed: {name}")
    assert first.seconds < SLACK_SECONDS
    assert not second.value


@pytest.mark.slow
def test_a_stopped_rank_is_named_within_a_minute() -> None:
    first, second, third = run(end_after_a_beat, "", "", "stop", answers=2)
    for answer in (first, second):
        assert answer.error == "AgreementError"
        assert answer.message.startswith("rank 2 is silent: no sign of its process ")
        assert answer.seconds < LIMIT_SECONDS + 2 * BEAT_SECONDS
    assert third.value is None


@pytest.mark.parametrize(("how", "name"), [("SIGINT", "KeyboardInterrupt"), ("sys.exit", "SystemExit")])
@pytest.mark.parametrize("at", [1, 2])
def test_an_interrupted_rank_is_named_with_the_size_to_start_again_with(how: str, name: str, at: int) -> None:
    first, second = run(train, ("", 0), (how, at))
    kind, message, logged, seconds = first.value
    assert second.value[0] == name
    assert kind == "AgreementError"
    assert message.startswith(f"start again with 64, on all ranks: rank 1 failed: {name}")
    assert seconds < LIMIT_SECONDS
    assert all(f"rank 1 failed: {name}" in line for line in logged)


@pytest.mark.parametrize("at", [1, 2])
def test_a_killed_rank_is_named_with_the_size_to_start_again_with(at: int) -> None:
    first, second = run(train, ("", 0), ("kill", at))
    kind, message, _, seconds = first.value
    assert second.value is None
    assert kind == "AgreementError"
    assert message.startswith("start again with 64, on all ranks: rank 1 ended: its process ")
    assert seconds < LIMIT_SECONDS


@pytest.mark.slow
def test_out_of_memory_after_the_first_forward_names_rank_cause_and_size_on_both() -> None:
    first, second = run(train, ("", 0), ("oom", 3))
    for answer in (first, second):
        kind, message, _, seconds = answer.value
        assert kind == "AgreementError"
        assert message.startswith(f"64 sequences ran out of memory on rank 1 ({CAUSE}")
        assert "start again with 57, on all ranks: rank 0 of 2 did not respond" in message
        assert seconds < LIMIT_SECONDS


@pytest.mark.slow
def test_a_rank_that_hangs_before_a_later_forward_is_named_within_a_minute() -> None:
    first, _ = run(train, ("", 0), ("hang", 3))
    _, _, logged, _ = first.value
    named = [line for line in logged if "rank 1 has been in test_adversarial_ranks.py" in line]
    assert named
    assert named[0].startswith("start again with 64, on all ranks: this rank has been in ")


def test_a_rank_is_named_in_the_log_of_one_that_waits_in_a_collective() -> None:
    first, _ = run(name_while_waiting, "", "kill")
    (message,) = first.value
    assert message.startswith("start again with 8: rank 1 ended: its process ")
    assert first.seconds < LIMIT_SECONDS


def test_a_rank_that_has_finished_does_not_need_the_store() -> None:
    _, second = run(finish_after_the_store_is_gone, True, False, store_is_separate=False)
    assert (second.value, second.error) == (16, "")


def test_a_process_has_one_heartbeat() -> None:
    first, second = run(count_heartbeats, None, None)
    assert (first.value, second.value) == (1, 1)


def test_a_process_is_gone_if_its_number_belongs_to_another() -> None:
    own = heartbeat._start_time(os.getpid())
    assert not is_gone(os.getpid(), own)
    assert is_gone(os.getpid(), own + "0")
    assert is_gone(2**22 + 1, own)
    assert not is_gone(os.getpid(), "")  # unknown


def test_a_zombie_is_gone() -> None:
    child = os.fork()
    if child == 0:
        os._exit(0)
    started = heartbeat._start_time(child)
    deadline = time.monotonic() + SLACK_SECONDS
    while not is_gone(child, started) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert is_gone(child, started)
    os.waitpid(child, 0)
