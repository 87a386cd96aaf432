"""A Trainer that asks for more than its virtual card takes: with the callback, with auto_find_batch_size, alone."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from hf_bsopt import virtual_gpu
from hf_bsopt.records import GpuSpec
from hf_bsopt.virtual_gpu.processes import with_package

pytestmark = [
    pytest.mark.rehearsal,
    pytest.mark.skipif(virtual_gpu.why_not() is not None, reason=str(virtual_gpu.why_not())),
]

SCRIPT = Path(__file__).parent / "scripts" / "trained.py"
GIB = 2**30
CARD = GpuSpec("Tesla T4", 3 * GIB, 75, 40, 300 * 2**20)
WAYS = ("callback", "auto_find", "plain", "full")
ASKED, STEPS = 768, 2
Facts = dict[str, Any]


@pytest.fixture(scope="module")
def trained(once: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Facts]:
    folder = tmp_path_factory.mktemp("cards")

    def train(way: str) -> Facts:
        environment = with_package(virtual_gpu.environment(CARD, shared=folder / way))
        done = subprocess.run(
            [sys.executable, str(SCRIPT), way], env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[-2000:]
        facts: Facts = json.loads(done.stdout.splitlines()[-1])
        return facts

    def all_ways() -> dict[str, Facts]:
        with ThreadPoolExecutor(2) as lanes:
            return dict(zip(WAYS, lanes.map(train, WAYS), strict=True))

    found: dict[str, Facts] = once("trained", all_ways)
    return found


def test_what_the_arguments_ask_for_does_not_fit(trained: dict[str, Facts]) -> None:
    plain = trained["plain"]
    assert plain["error"].startswith("OutOfMemoryError: CUDA out of memory")
    assert (plain["steps"], plain["errors"]) == (0, 1)


def test_with_the_callback_it_trains_to_the_end_and_the_effective_batch_is_kept(trained: dict[str, Facts]) -> None:
    ours = trained["callback"]
    assert (ours["error"], ours["errors"], ours["steps"]) == ("", 0, STEPS)
    assert ours["micro_batch"] < ASKED
    assert ours["micro_batch"] * ours["accumulation"] == ASKED
    assert ours["shapes"] == [[ours["micro_batch"], 128]] * (STEPS * ours["accumulation"])


def test_the_size_was_run_on_the_card_before(trained: dict[str, Facts]) -> None:
    ours = trained["callback"]
    assert ours["source"] == "measured"
    assert 1 <= len(ours["ran"]) <= 3
    assert set(ours["ran"]) == {"fits"}


def test_the_cards_random_numbers_go_on_as_if_nothing_had_been_searched(trained: dict[str, Facts]) -> None:
    assert trained["callback"]["random_numbers"] == [True]


def test_the_weights_are_on_the_card_again(trained: dict[str, Facts]) -> None:
    assert trained["callback"]["devices"] == ["cuda:0"]


def test_the_card_is_as_full_as_is_logged(trained: dict[str, Facts]) -> None:
    ours = trained["callback"]
    last = ours["logged"][-1]
    assert last["memory_used_gib"] == pytest.approx((ours["reserved"] + 300 * 2**20) / GIB, rel=0.01)
    assert last["memory_utilization"] == pytest.approx(last["memory_used_gib"] / 3, rel=0.01)
    assert last["memory_utilization"] <= 0.9


def test_a_card_without_room_is_told_with_who_has_it_and_nothing_is_trained(trained: dict[str, Facts]) -> None:
    full = trained["full"]
    assert full["error"].startswith(
        "DeviceError: CUDA device: it is so full that not even a process without tensors fits"
    )
    assert (full["steps"], full["shapes"], full["micro_batch"]) == (0, [], ASKED)
    assert full["devices"] == ["cuda:0"]


def test_auto_find_batch_size_crashes_into_it_and_loses_the_effective_batch(trained: dict[str, Facts]) -> None:
    theirs = trained["auto_find"]
    assert theirs["errors"] >= 5
    assert theirs["steps"] == STEPS
    assert all(size < ASKED for size, _ in theirs["shapes"][-STEPS:])
    assert theirs["accumulation"] == 1
