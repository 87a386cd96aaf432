"""Measured searches on a shared virtual GPU, whose driver refuses late forks as the real one does."""

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
GPU = GpuSpec("Tesla T4", 3 * GIB, 75, 40, 300 * 2**20)


def search(folder: Path, device: str, **options: Any) -> dict[str, Any]:
    environment = with_package(virtual_gpu.environment(GPU, shared=folder / "gpu"))
    command = [sys.executable, str(SCRIPT), device, json.dumps(options)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def test_a_prediction_creates_no_context_and_uses_no_gpu_memory(tmp_path: Path) -> None:
    answer = search(tmp_path, "predict")
    assert answer["source"] == "predicted"
    assert answer["ran"] == []
    assert answer["gpu"] == "T4"
    assert answer["left_bytes"] == 0  # read while that process is still alive


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return search(tmp_path_factory.mktemp("gpu"), "auto")


def test_auto_measures_on_the_local_gpu_with_at_most_three_probes_and_no_error(
    measured: dict[str, Any],
) -> None:
    assert measured["source"] == "measured"
    assert (measured["gpu"], measured["total_bytes"]) == ("Tesla T4", 3 * GIB)
    assert 1 <= len(measured["ran"]) <= 3
    assert all(outcome == "fits" for _, outcome in measured["ran"])
    assert measured["batch_size"] in [size for size, _ in measured["ran"]]
    assert any("Tesla T4 (sm_75): torch" in note and "no other process uses it" in note for note in measured["notes"])


def test_no_gpu_memory_is_left_in_use_and_the_caller_has_no_context(measured: dict[str, Any]) -> None:
    assert measured["left_bytes"] == 0


def test_the_memory_option_limits_the_search_to_a_smaller_gpu(tmp_path: Path, measured: dict[str, Any]) -> None:
    smaller = search(tmp_path, "cuda", memory="2GiB")
    assert smaller["total_bytes"] == 2 * GIB
    assert 0 < smaller["batch_size"] < measured["batch_size"]
    assert all(outcome == "fits" for _, outcome in smaller["ran"])


def test_the_largest_measured_size_is_within_3_percent_of_the_rehearsed_one(tmp_path: Path) -> None:
    whole = {"target": [0, 1], "multiple_of": 1}
    found = search(tmp_path, "cuda", **whole)
    rehearsed = search(tmp_path, "rehearse", gpu="3GiB", **whole)
    assert all(outcome == "fits" for _, outcome in found["ran"])
    assert len(found["ran"]) <= 3
    assert found["batch_size"] >= 0.97 * rehearsed["batch_size"]
