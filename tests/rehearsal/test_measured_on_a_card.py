"""The measured road on a shared virtual card, whose driver refuses late forks as the real one does."""

from __future__ import annotations

import json
import subprocess
import sys
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

SCRIPT = Path(__file__).parent / "scripts" / "measured.py"
GIB = 2**30
CARD = GpuSpec("Tesla T4", 3 * GIB, 75, 40, 300 * 2**20)


def search(folder: Path, device: str, **options: Any) -> dict[str, Any]:
    environment = with_package(virtual_gpu.environment(CARD, shared=folder / "card"))
    command = [sys.executable, str(SCRIPT), device, json.dumps(options)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def test_a_prediction_makes_no_context_and_takes_no_memory_of_the_card(tmp_path: Path) -> None:
    answer = search(tmp_path, "predict")
    assert answer["source"] == "predicted"
    assert answer["ran"] == []
    assert answer["gpu"] == "T4"
    assert answer["left_bytes"] == 0  # seen while that process still lives


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return search(tmp_path_factory.mktemp("card"), "auto")


def test_auto_measures_on_the_card_that_is_here_within_three_probes_and_without_an_error(
    measured: dict[str, Any],
) -> None:
    assert measured["source"] == "measured"
    assert (measured["gpu"], measured["total_bytes"]) == ("Tesla T4", 3 * GIB)
    assert 1 <= len(measured["ran"]) <= 3
    assert all(outcome == "fits" for _, outcome in measured["ran"])
    assert measured["batch_size"] in [size for size, _ in measured["ran"]]
    assert any("Tesla T4 (sm_75): torch" in note and "no other process uses it" in note for note in measured["notes"])


def test_nothing_is_left_on_the_card_and_the_caller_has_no_context_there(measured: dict[str, Any]) -> None:
    assert measured["left_bytes"] == 0


def test_memory_makes_the_card_stand_in_for_a_smaller_one(tmp_path: Path, measured: dict[str, Any]) -> None:
    smaller = search(tmp_path, "cuda", memory="2GiB")
    assert smaller["total_bytes"] == 2 * GIB
    assert 0 < smaller["batch_size"] < measured["batch_size"]
    assert all(outcome == "fits" for _, outcome in smaller["ran"])


def test_all_of_the_card_is_filled_to_97_percent_of_what_a_rehearsal_finds(tmp_path: Path) -> None:
    whole = {"target": [0, 1], "multiple_of": 1}
    found = search(tmp_path, "cuda", **whole)
    rehearsed = search(tmp_path, "rehearse", gpu="3GiB", **whole)
    assert all(outcome == "fits" for _, outcome in found["ran"])
    assert len(found["ran"]) <= 3
    assert found["batch_size"] >= 0.97 * rehearsed["batch_size"]
