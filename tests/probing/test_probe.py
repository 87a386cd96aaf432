"""Real steps on a virtual GPU of 2 GiB, each size in its own process; no failure ends the caller."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import misbehaving
import psutil
import pytest
import torch

from hf_bsopt import virtual_gpu
from hf_bsopt.probing import ProbeClient, VirtualCudaDevice
from hf_bsopt.records import GpuSpec, Trial
from hf_bsopt.workloads.module import ModuleWorkload
from hf_bsopt.workloads.step_settings import StepSettings
from hf_bsopt.workloads.workload import describe

pytestmark = [
    pytest.mark.rehearsal,
    pytest.mark.skipif(virtual_gpu.why_not() is not None, reason=str(virtual_gpu.why_not())),
]

MIB = 2**20
GPU = GpuSpec("2 GiB GPU", 2 * 2**30, 80, 108, 300 * MIB)
WORKER = "start_worker.py"
HERE = str(Path(__file__).parents[1] / "helpers")
FAILURES = ["error", "crash", "killed"]
OTHERS = [
    "timeout",
    "first",
    "again",
    "fp16",
    "accumulating",
    "too large",
    "afterwards",
    "larger",
    "model",
    "model again",
]
PARAMETERS = 1024 * 4096 + 4096 + 4096 * 10 + 10


def classifier(failure: str = "", precision: str = "fp32", accumulation: int = 1) -> ModuleWorkload:
    example = {"x": torch.zeros(1, 1024), "labels": torch.zeros(1, dtype=torch.long)}
    settings = StepSettings(precision, "adamw_torch_fused")  # type: ignore[arg-type]
    return ModuleWorkload(misbehaving.Classifier(failure), example, settings, accumulation=accumulation)


def probe_with_short_timeout(probe: ProbeClient) -> Trial:
    """Run the workload that hangs, with a short timeout."""
    usual, probe._timeout_seconds = probe._timeout_seconds, 3
    try:
        return probe(classifier("timeout"), 1000)
    finally:
        probe._timeout_seconds = usual


def probe_everything() -> dict[str, Trial]:
    """Run all sizes on one worker, in this order: no size may affect the next."""
    model = describe("bert-mini", max_length=64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", HERE)
        with ProbeClient(VirtualCudaDevice(GPU)) as probe:
            answers = {
                "first": probe(classifier(), 1000),
                "again": probe(classifier(), 1000),
                "fp16": probe(classifier(precision="fp16"), 1000),
                "accumulating": probe(classifier(accumulation=2), 1000),
                "too large": probe(classifier(), 100_000),
                **{failure: probe(classifier(failure), 1000) for failure in FAILURES},
                "timeout": probe_with_short_timeout(probe),
                "afterwards": probe(classifier(), 1000),
                "larger": probe(classifier(), 2000),
                "model": probe(model, 32),
                "model again": probe(model, 32),
            }
    return answers


@pytest.fixture(scope="module")
def trials(once: Callable[..., Any]) -> dict[str, Trial]:
    found: dict[str, Trial] = once("trials", probe_everything)
    return found


@pytest.mark.parametrize(
    ("name", "outcome", "detail"),
    [
        ("first", "fits", ""),
        ("error", "error", "ValueError: no such layer (misbehaving.py, line "),
        ("crash", "crash", "the process crashed (SIGSEGV)"),
        ("killed", "killed", "the process was killed (SIGKILL); the system does this if host memory runs out"),
        ("timeout", "timeout", "no answer in 3 s"),
        ("too large", "oom", "CUDA out of memory"),
    ],
)
def test_every_failure_has_its_own_outcome_and_detail(
    trials: dict[str, Trial], name: str, outcome: str, detail: str
) -> None:
    assert trials[name].outcome == outcome
    assert trials[name].detail.startswith(detail)


def test_every_trial_is_rehearsed_and_has_no_times(trials: dict[str, Trial]) -> None:
    for trial in trials.values():
        assert trial.source == "rehearsed"
        assert trial.step_seconds is trial.samples_per_second is None


@pytest.mark.parametrize("pair", [("first", "again"), ("first", "afterwards"), ("model", "model again")])
def test_the_same_size_has_the_same_peak_whatever_ran_before(trials: dict[str, Trial], pair: tuple[str, str]) -> None:
    assert trials[pair[0]].fits
    assert trials[pair[0]] == trials[pair[1]]


def test_used_bytes_are_reserved_bytes_plus_the_context(trials: dict[str, Trial]) -> None:
    for name in ("first", "fp16", "accumulating", "larger", "model"):
        trial = trials[name]
        assert trial.peak is not None
        assert trial.used_bytes == trial.peak.reserved_bytes + GPU.context_bytes
        assert trial.peak.reserved_bytes >= trial.peak.allocated_bytes


def test_the_peak_includes_weights_gradients_and_adams_state(trials: dict[str, Trial]) -> None:
    """16 bytes per parameter, and two copies of the activations between the layers."""
    activations = 1000 * 4 * (1024 + 2 * 4096)
    peak = trials["first"].peak
    assert peak is not None
    assert peak.allocated_bytes > 16 * PARAMETERS
    assert peak.allocated_bytes < 16 * PARAMETERS + 2 * activations + 64 * MIB


def test_a_larger_batch_and_accumulation_need_more_memory(trials: dict[str, Trial]) -> None:
    first, larger, accumulating = (trials[name].peak for name in ("first", "larger", "accumulating"))
    assert first is not None
    assert larger is not None
    assert accumulating is not None
    assert larger.allocated_bytes - first.allocated_bytes > 1000 * 4 * 4096
    assert accumulating.allocated_bytes >= first.allocated_bytes


def test_a_size_that_is_too_large_reports_the_memory_it_reached(trials: dict[str, Trial]) -> None:
    trial = trials["too large"]
    assert not trial.fits
    assert trial.alloc_retries >= 1
    assert trial.used_bytes is not None
    assert GPU.context_bytes < trial.used_bytes <= (GPU.total_bytes or 0)


@pytest.mark.parametrize("name", [*FAILURES, "timeout"])
def test_a_size_without_an_answer_has_no_measurements(trials: dict[str, Trial], name: str) -> None:
    assert trials[name] == dataclasses.replace(trials[name], peak=None, used_bytes=None, alloc_retries=0)


def test_no_worker_is_left_over(trials: dict[str, Trial]) -> None:
    assert len(trials) == len(FAILURES) + len(OTHERS)
    assert not [
        child
        for child in psutil.Process().children(recursive=True)
        if any(word.endswith(WORKER) for word in child.cmdline())
    ]
