"""A Trainer whose batch does not fit on its virtual GPU: with the callback, with auto_find_batch_size, alone."""

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
GPU = GpuSpec("Tesla T4", 3 * GIB, 75, 40, 300 * 2**20)
MODES = ("callback", "auto_find", "plain", "full")
REQUESTED, STEPS = 768, 2
Facts = dict[str, Any]


@pytest.fixture(scope="module")
def trained(once: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Facts]:
    folder = tmp_path_factory.mktemp("gpus")

    def train(mode: str) -> Facts:
        environment = with_package(virtual_gpu.environment(GPU, shared=folder / mode))
        done = subprocess.run(
            [sys.executable, str(SCRIPT), mode], env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[-2000:]
        facts: Facts = json.loads(done.stdout.splitlines()[-1])
        return facts

    def all_modes() -> dict[str, Facts]:
        with ThreadPoolExecutor(2) as pool:
            return dict(zip(MODES, pool.map(train, MODES), strict=True))

    found: dict[str, Facts] = once("trained", all_modes)
    return found


def test_the_requested_batch_does_not_fit(trained: dict[str, Facts]) -> None:
    plain = trained["plain"]
    assert plain["error"].startswith("OutOfMemoryError: CUDA out of memory")
    assert (plain["steps"], plain["errors"]) == (0, 1)


def test_with_the_callback_training_finishes_and_the_effective_batch_is_kept(trained: dict[str, Facts]) -> None:
    ours = trained["callback"]
    assert (ours["error"], ours["errors"], ours["steps"]) == ("", 0, STEPS)
    assert ours["micro_batch"] < REQUESTED
    assert ours["micro_batch"] * ours["accumulation"] == REQUESTED
    assert ours["shapes"] == [[ours["micro_batch"], 128]] * (STEPS * ours["accumulation"])


def test_the_size_was_measured_before_training(trained: dict[str, Facts]) -> None:
    ours = trained["callback"]
    assert ours["source"] == "measured"
    assert 1 <= len(ours["ran"]) <= 3
    assert set(ours["ran"]) == {"fits"}


def test_the_search_does_not_change_the_cuda_random_state(trained: dict[str, Facts]) -> None:
    assert trained["callback"]["random_numbers"] == [True]


def test_the_weights_are_back_on_the_gpu(trained: dict[str, Facts]) -> None:
    assert trained["callback"]["devices"] == ["cuda:0"]


def test_the_logged_memory_is_the_memory_in_use(trained: dict[str, Facts]) -> None:
    ours = trained["callback"]
    last = ours["logged"][-1]
    assert last["memory_used_gib"] == pytest.approx((ours["reserved"] + 300 * 2**20) / GIB, rel=0.01)
    assert last["memory_utilization"] == pytest.approx(last["memory_used_gib"] / 3, rel=0.01)
    assert last["memory_utilization"] <= 0.9


def test_a_full_gpu_is_an_error_and_nothing_is_trained(trained: dict[str, Facts]) -> None:
    full = trained["full"]
    assert full["error"].startswith("DeviceError: CUDA device: not even an empty process fits on the device")
    assert (full["steps"], full["shapes"], full["micro_batch"]) == (0, [], REQUESTED)
    assert full["devices"] == ["cuda:0"]


def test_auto_find_batch_size_runs_out_of_memory_and_loses_the_effective_batch(trained: dict[str, Facts]) -> None:
    theirs = trained["auto_find"]
    assert theirs["errors"] >= 5
    assert theirs["steps"] == STEPS
    assert all(size < REQUESTED for size, _ in theirs["shapes"][-STEPS:])
    assert theirs["accumulation"] == 1
