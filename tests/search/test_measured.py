"""Claims about measured answers, with small models on a CPU whose memory is limited, every size in its own process."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from hf_bsopt import Report, find_batch_size
from hf_bsopt.cli.main import INTERRUPTED, main
from hf_bsopt.errors import NothingFitsError, ProbeError, SearchInterrupted, UsageError
from hf_bsopt.memory.predictor import Predictor
from hf_bsopt.probing import ProbeClient
from hf_bsopt.probing.host_memory import why_no_limit
from hf_bsopt.records import Trial
from hf_bsopt.search import cached_answers, prediction
from hf_bsopt.search.choose import round_down
from hf_bsopt.search.throughput import curve_sizes

pytestmark = pytest.mark.skipif(why_no_limit() is not None, reason=str(why_no_limit()))

MEMORY = "500MiB"
TOTAL = 500 * 2**20


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_BSOPT_CACHE", str(tmp_path))


def find(**options: Any) -> Report:
    options = {"max_length": 64, "device": "cpu", "memory": MEMORY, "evaluation": False, "cache": False, **options}
    return find_batch_size("bert-tiny", **options)


def measured(report: Report) -> list[Trial]:
    return [trial for trial in report.trials if trial.source == "measured"]


@pytest.fixture(scope="module")
def report(once: Callable[..., Any]) -> Report:
    found: Report = once("measured", functools.partial(find, check=8, max_attempts=8))
    return found


def test_the_size_in_the_answer_was_run_and_is_under_the_target(report: Report) -> None:
    assert report.source == "measured"
    (chosen,) = [trial for trial in measured(report) if trial.batch_size == report.batch_size]
    assert chosen.fits
    assert 0.6 * TOTAL < (chosen.used_bytes or 0) <= 0.9 * TOTAL
    assert report.batch_size % 8 == 0


def test_the_report_names_the_device_and_the_speed(report: Report) -> None:
    text = report.format(verbose=True)
    assert "measured: real training steps on this CPU device, as asked" in text
    assert "0.5 GiB for the training process" in text
    assert f"Speed at {report.batch_size}:" in text
    assert max(map(len, text.splitlines())) <= 78


def test_a_measured_trial_has_seconds_samples_and_tokens(report: Report) -> None:
    for trial in measured(report):
        if trial.fits:
            assert trial.step_seconds is not None
            assert trial.samples_per_second == pytest.approx(trial.batch_size / trial.step_seconds)
            assert trial.tokens_per_second == pytest.approx(64 * (trial.samples_per_second or 0))


def test_a_checked_size_is_run_too(report: Report) -> None:
    assert report.checked is not None
    assert (report.checked.batch_size, report.checked.source, report.checked.fits) == (8, "measured", True)


def test_no_worker_process_is_left(report: Report) -> None:
    assert report.batch_size
    children = psutil.Process().children(recursive=True)
    assert not [child for child in children if any(word.endswith("start_worker.py") for word in child.cmdline())]


class OptimisticPredictor(Predictor):
    """A wrong predictor: it predicts for each size what a fourth of it needs, so its first size is far too large."""

    def __call__(self, batch_size: int) -> Trial:
        return dataclasses.replace(super().__call__(max(1, batch_size // 4)), batch_size=batch_size)

    def unlimited(self, batch_size: int) -> int:
        return super().unlimited(max(1, batch_size // 4))

    def fits_within(self, batch_size: int, total_bytes: float) -> bool:
        return super().fits_within(max(1, batch_size // 4), total_bytes)


@pytest.mark.slow
def test_the_search_recovers_from_an_oom_after_a_wrong_prediction(
    monkeypatch: pytest.MonkeyPatch, report: Report
) -> None:
    monkeypatch.setattr(prediction, "Predictor", OptimisticPredictor)
    found = find(max_attempts=12)
    failed = [trial for trial in measured(found) if trial.outcome == "oom"]
    assert failed
    assert "DefaultCPUAllocator: can't allocate memory" in failed[0].detail
    assert failed[0].batch_size > report.batch_size
    assert found.batch_size == pytest.approx(report.batch_size, abs=8)
    assert (next(t for t in measured(found) if t.batch_size == found.batch_size)).fits
    assert "the prediction was" in found.reason


@pytest.mark.slow
def test_after_the_last_attempt_the_largest_size_that_ran_is_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prediction, "Predictor", OptimisticPredictor)
    found = find(max_attempts=3)
    assert len(measured(found)) == 3
    assert found.batch_size == max(trial.batch_size for trial in measured(found) if trial.fits)


@pytest.mark.slow
def test_evaluation_is_run_if_requested() -> None:
    found = find(verify_evaluation=True, batch_size=8)
    assert found.evaluation is not None
    assert found.evaluation.trial.source == "measured"
    assert found.evaluation.trial.fits
    assert f"per_device_eval_batch_size up to {found.evaluation.batch_size}" in str(found)
    assert found.evaluation.batch_size > found.batch_size


@pytest.mark.slow
def test_a_generation_has_its_own_largest_batch() -> None:
    found = find_batch_size(
        "tinystories",
        max_length=16,
        generate=4,
        device="cpu",
        memory="800MiB",
        batch_size=1,
        evaluation=False,
        cache=False,
    )
    assert found.generation is not None
    assert found.generation.trial.source == "measured"
    assert f"Generation: up to {found.generation.batch_size} prompts at once" in str(found)
    assert found.to_dict()["generation"]["batch_size"] == found.generation.batch_size


@pytest.mark.slow
def test_with_throughput_the_smallest_size_on_the_plateau_is_recommended() -> None:
    found = find(throughput=True, target=(0.8, 0.9))
    total = found.device.total_bytes or 0
    timed = {t.batch_size: t.samples_per_second or 0 for t in measured(found) if t.fits}
    fitting = [t.batch_size for t in measured(found) if t.fits and (t.used_bytes or 0) <= 0.9 * total]
    curve = curve_sizes(max(fitting), lambda size: round_down(size, 8))  # the others were timed for fewer steps
    assert len(timed) >= 3
    assert timed[found.batch_size] >= 0.98 * max(timed[size] for size in curve if size in fitting)
    if found.decision.bound == "throughput plateau":
        assert "trains no faster" in found.reason


@pytest.mark.slow
def test_the_length_of_the_dataset_is_a_limit() -> None:
    found = find(dataset_size=16)
    assert (found.batch_size, found.decision.bound) == (16, "dataset size")
    assert find(dataset_size=16, num_processes=2, device="predict", memory=None).batch_size == 8


@pytest.mark.slow
def test_if_no_sequence_fits_the_error_says_so() -> None:
    with pytest.raises(NothingFitsError, match="not even one sequence"):
        find(memory="400MiB", max_length=512, target=(0.1, 0.2))


@pytest.mark.slow
def test_the_error_on_a_timeout_names_the_model_the_size_and_the_device() -> None:
    with pytest.raises(ProbeError, match=r"training step of .*bert-tiny.* size \d+ on CPU \(timeout\): no answer"):
        find(probe_timeout=0.001)


def test_fp16_on_a_cpu_is_a_usage_error_as_in_trainer() -> None:
    with pytest.raises(UsageError, match="does not train in fp16"):
        find(precision="fp16")


# ---- cached answers


def record_sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list to which every size that is run from now on is added."""
    ran: list[int] = []
    original = ProbeClient.__call__

    def recording(self: ProbeClient, workload: Any, batch_size: int, *args: Any, **options: Any) -> Trial:
        ran.append(batch_size)
        return original(self, workload, batch_size, *args, **options)

    monkeypatch.setattr(ProbeClient, "__call__", recording)
    return ran


@pytest.mark.slow
def test_a_cached_answer_is_confirmed_by_one_probe_or_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        cached_answers, "band", lambda free_bytes, total_bytes: 0
    )  # free memory may cross the edge of a band
    first = find(cache=True, batch_size=8)
    ran = record_sizes(monkeypatch)
    again = find(cache=True, batch_size=8)
    assert ran == [first.batch_size]
    assert again.batch_size == first.batch_size
    assert again.source == "measured"
    trusted = find(cache=True, batch_size=8, trust_cache=True)
    assert ran == [first.batch_size]
    assert trusted.batch_size == first.batch_size
    assert find(cache=True, batch_size=16).batch_size == 16  # another question
    assert len(ran) > 1


@pytest.mark.slow
def test_a_broken_cache_file_is_ignored_and_replaced(tmp_path: Path) -> None:
    first = find(cache=True, batch_size=4)
    (path,) = (tmp_path / "answers").iterdir()
    whole = path.read_text()
    path.write_text(whole[: len(whole) // 2])
    assert find(cache=True, batch_size=4).batch_size == first.batch_size
    assert path.read_text().startswith(whole[:20])
    assert len(path.read_text()) > len(whole) // 2


@pytest.mark.slow
def test_without_a_cache_nothing_is_written(tmp_path: Path) -> None:
    find(cache=False, batch_size=8)
    assert not (tmp_path / "answers").exists()


# ---- Ctrl-C


def interrupting(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    original = ProbeClient.__call__
    calls: list[int] = []

    def call(self: ProbeClient, workload: Any, batch_size: int, *args: Any, **options: Any) -> Trial:
        if len(calls) == after:
            raise KeyboardInterrupt
        calls.append(batch_size)
        return original(self, workload, batch_size, *args, **options)

    monkeypatch.setattr(ProbeClient, "__call__", call)


@pytest.mark.slow
def test_ctrl_c_raises_an_error_with_the_trials_so_far(monkeypatch: pytest.MonkeyPatch) -> None:
    interrupting(monkeypatch, after=1)
    with pytest.raises(SearchInterrupted) as caught:
        find()
    assert len(caught.value.trials) == 1
    assert caught.value.predicted > 0
    assert isinstance(caught.value, KeyboardInterrupt)


@pytest.mark.slow
def test_ctrl_c_in_the_evaluation_raises_an_error_with_the_trials_so_far(monkeypatch: pytest.MonkeyPatch) -> None:
    original = ProbeClient.__call__

    def call(self: ProbeClient, workload: Any, batch_size: int, phase: str = "training", **options: Any) -> Trial:
        if phase == "evaluation":
            raise KeyboardInterrupt
        return original(self, workload, batch_size)

    monkeypatch.setattr(ProbeClient, "__call__", call)
    with pytest.raises(SearchInterrupted) as caught:
        find(verify_evaluation=True, batch_size=4)
    assert [trial.batch_size for trial in caught.value.trials if trial.fits][-1] == 4


@pytest.mark.slow
def test_the_command_prints_the_trials_after_ctrl_c(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    interrupting(monkeypatch, after=1)
    arguments = ["--model", "bert-tiny", "--max_length", "64", "--device", "cpu", "--memory", MEMORY]
    assert main([*arguments, "--no_evaluation", "--no_cache"]) == INTERRUPTED
    errors = capsys.readouterr().err
    assert "interrupted. These sizes were run:" in errors
    assert "✓ Batch size" in errors
    assert "Predicted, not verified:" in errors
    assert not [child for child in psutil.Process(os.getpid()).children() if "worker" in " ".join(child.cmdline())]
