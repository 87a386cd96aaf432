"""Our decorator and accelerate's run the same training on a virtual GPU, each in its own process."""

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
from hf_bsopt.data import catalog

pytestmark = [
    pytest.mark.rehearsal,
    pytest.mark.skipif(virtual_gpu.why_not() is not None, reason=str(virtual_gpu.why_not())),
]

SCRIPT = Path(__file__).with_name("decorated.py")
MEMORY = "2GiB"
MODEL = ("bert-mini", "128", "fp16")
START = 512
CASES = [(whose, place) for whose in ("ours", "accelerates") for place in ("outside", "inside")]
Facts = dict[str, Any]


def searched(whose: str, place: str) -> Facts:
    done = subprocess.run(
        [sys.executable, SCRIPT, whose, place, *MODEL, str(START)],
        env={**virtual_gpu.environment(catalog.gpu(MEMORY)), "PYTHONPATH": str(SCRIPT.parents[3])},
        capture_output=True,
        text=True,
        check=True,
    )
    facts: Facts = json.loads(done.stdout)
    return facts


def all_searched() -> dict[tuple[str, str], Facts]:
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(CASES, pool.map(lambda case: searched(*case), CASES), strict=True))


@pytest.fixture(scope="module")
def facts(once: Callable[..., Any]) -> dict[tuple[str, str], Facts]:
    found: dict[tuple[str, str], Facts] = once("decorated", all_searched)
    return found


@pytest.mark.parametrize("place", ["outside", "inside"])
def test_finds_at_least_the_size_of_accelerate_with_fewer_errors(
    facts: dict[tuple[str, str], Facts], place: str
) -> None:
    ours, theirs = facts["ours", place], facts["accelerates", place]
    assert ours["found"] >= theirs["found"]
    assert ours["errors"] < theirs["errors"] / 2


@pytest.mark.parametrize("place", ["outside", "inside"])
def test_report_lists_every_attempt(facts: dict[tuple[str, str], Facts], place: str) -> None:
    ours = facts["ours", place]
    assert ours["sizes"] == ours["tried"]
    assert ours["fits"] == [False] * ours["errors"] + [True]
    assert all("of the forward pass:" in detail for detail in ours["details"][:-1])
    total = catalog.gpu(MEMORY).total_bytes or 0
    assert all(0.7 * total < peak < total for peak in ours["peaks"])
