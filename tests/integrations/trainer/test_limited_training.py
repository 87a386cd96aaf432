"""A Trainer on a CPU that requests more memory than there is: with the callback, with auto_find_batch_size, plain."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from hf_bsopt.probing.host_memory import why_no_limit
from hf_bsopt.virtual_gpu.processes import with_package

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(why_no_limit() is not None, reason=str(why_no_limit())),
]
SCRIPT = Path(__file__).with_name("limited.py")
HELPERS = str(Path(__file__).parents[2] / "helpers")
MODES = ("callback", "auto_find", "plain")
MEMORY, REQUESTED, STEPS = "620MiB", 192, 2  # far more than fits on any machine's kernels
Facts = dict[str, Any]


def train(mode: str) -> Facts:
    command = [sys.executable, str(SCRIPT), mode, MEMORY]
    done = subprocess.run(
        command, env=with_package(os.environ, [HELPERS]), capture_output=True, text=True, check=False, timeout=600
    )
    assert done.returncode == 0, done.stderr[-2000:]
    facts: Facts = json.loads(done.stdout.splitlines()[-1])
    return facts


@pytest.fixture(scope="module")
def trained(once: Callable[..., Any]) -> dict[str, Facts]:
    def all_modes() -> dict[str, Facts]:
        with ThreadPoolExecutor(1) as pool:
            return dict(zip(MODES, pool.map(train, MODES), strict=True))

    found: dict[str, Facts] = once("limited", all_modes)
    return found


def test_plain_training_runs_out_of_memory(trained: dict[str, Facts]) -> None:
    plain = trained["plain"]
    assert "DefaultCPUAllocator: can't allocate memory" in plain["error"]
    assert (plain["steps"], plain["sizes"]) == (0, [REQUESTED])


def test_callback_trains_to_the_end_with_the_same_effective_batch(trained: dict[str, Facts]) -> None:
    ours = trained["callback"]
    assert (ours["error"], ours["steps"]) == ("", STEPS)
    assert ours["micro_batch"] < REQUESTED
    assert ours["micro_batch"] * ours["accumulation"] == REQUESTED
    assert ours["sizes"] == [ours["micro_batch"]] * (STEPS * ours["accumulation"])
    assert "fits" in ours["ran"]


def test_auto_find_batch_size_changes_the_effective_batch(trained: dict[str, Facts]) -> None:
    """The final size, and whether the second step still fits, vary from run to run."""
    theirs = trained["auto_find"]
    assert theirs["sizes"][0] == REQUESTED
    assert theirs["sizes"][-1] < REQUESTED
    assert len(set(theirs["sizes"])) > 3  # as many errors before
    assert theirs["accumulation"] == 1
