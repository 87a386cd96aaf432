"""find_batch_size with a rehearsal, end to end, on small models and a small virtual GPU."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import misbehaving
import psutil
import pytest
import torch

from hf_bsopt import Report, find_batch_size, virtual_gpu
from hf_bsopt.errors import NothingFitsError, RehearsalError
from hf_bsopt.records import GpuSpec, Trial

pytestmark = [
    pytest.mark.rehearsal,
    pytest.mark.skipif(virtual_gpu.why_not() is not None, reason=str(virtual_gpu.why_not())),
]

WORKER = "start_worker.py"
HERE = str(Path(__file__).parents[1] / "helpers")
GPU = GpuSpec("2 GiB GPU", 2 * 2**30, 80, 108, 300 * 2**20)


def find(model: Any = "bert-mini", **options: Any) -> Report:
    options = {"gpu": GPU, "max_length": 128, "evaluation": False, "device": "rehearse", **options}
    return find_batch_size(model, **options)


@pytest.fixture(scope="module")
def report(once: Callable[..., Any]) -> Report:
    found: Report = once("report", functools.partial(find, check=8, max_attempts=4))
    return found


def rehearsed_trials(report: Report) -> list[Trial]:
    return [trial for trial in report.trials if trial.source == "rehearsed"]


def test_the_report_says_that_it_was_rehearsed(report: Report) -> None:
    assert report.source == "rehearsed"
    assert any(note.startswith("rehearsed: real training steps on a virtual GPU") for note in report.notes)
    assert "rehearsed" in str(report)


def test_the_recommended_size_was_run_and_is_below_the_target(report: Report) -> None:
    (chosen,) = [trial for trial in rehearsed_trials(report) if trial.batch_size == report.batch_size]
    assert chosen.fits
    assert chosen.used_bytes is not None
    assert chosen.used_bytes <= 0.9 * (GPU.total_bytes or 0)
    assert report.batch_size % 8 == 0


def test_no_more_sizes_are_run_than_max_attempts(report: Report) -> None:
    assert 1 <= len(rehearsed_trials(report)) <= 4


def test_the_prediction_is_close_to_the_rehearsal(report: Report) -> None:
    predicted = {trial.batch_size: trial.used_bytes for trial in report.trials if trial.source == "predicted"}
    both = [trial for trial in rehearsed_trials(report) if trial.batch_size in predicted and trial.fits]
    assert both
    for trial in both:
        assert trial.used_bytes == pytest.approx(predicted[trial.batch_size], rel=0.02)


def test_the_size_to_check_is_run_too(report: Report) -> None:
    assert report.checked is not None
    assert (report.checked.batch_size, report.checked.source, report.checked.fits) == (8, "rehearsed", True)


def test_predicted_and_rehearsed_trials_are_labelled_in_the_json(report: Report) -> None:
    assert {trial.source for trial in report.trials} == {"predicted", "rehearsed"}
    assert "rehearsed" in json.dumps(report.to_dict())


def test_no_process_is_left_over(report: Report) -> None:
    assert report.batch_size
    commands = [child.cmdline() for child in psutil.Process().children(recursive=True)]
    assert not [words for words in commands if any(word.endswith(WORKER) for word in words)]


def test_a_module_is_rehearsed_with_an_example_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", HERE)
    example = {"x": torch.randn(3, 1024), "labels": torch.zeros(3, dtype=torch.long)}
    module = misbehaving.Classifier()
    found = find(module, example_batch=example, precision="fp32", max_length=None, max_attempts=1)
    (trial,) = rehearsed_trials(found)
    assert trial.fits
    assert trial.batch_size == found.batch_size > 1000


def test_it_is_an_error_if_nothing_fits() -> None:
    with pytest.raises(NothingFitsError, match="not even one sequence"):
        find("bert-base", gpu="1GiB", max_length=512)


def test_a_failed_probe_is_reported_with_its_own_message() -> None:
    example = {"x": torch.randn(3, 1024), "labels": torch.zeros(3, dtype=torch.long)}
    with pytest.MonkeyPatch.context() as patch, pytest.raises(RehearsalError, match=r"\(error\): .*no such layer"):
        patch.setenv("PYTHONPATH", HERE)
        find(misbehaving.Classifier("error"), example_batch=example, precision="fp32", max_length=None)
