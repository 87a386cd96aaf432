"""Real steps on a virtual card of 2 GiB, each size in a process of its own; and that none of them ends the caller."""

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
CARD = GpuSpec("2 GiB card", 2 * 2**30, 80, 108, 300 * MIB)
WORKER = "hf_bsopt.probing.worker"
HERE = str(Path(__file__).parents[1] / "helpers")
DEEDS = ["error", "crash", "killed"]
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


def classifier(deed: str = "", precision: str = "fp32", accumulation: int = 1) -> ModuleWorkload:
    example = {"x": torch.zeros(1, 1024), "labels": torch.zeros(1, dtype=torch.long)}
    settings = StepSettings(precision, "adamw_torch_fused")  # type: ignore[arg-type]
    return ModuleWorkload(misbehaving.Classifier(deed), example, settings, accumulation=accumulation)


def in_a_moment(ask: ProbeClient) -> Trial:
    """What waits forever, asked with another time than the others."""
    usual, ask._timeout_seconds = ask._timeout_seconds, 3
    try:
        return ask(classifier("timeout"), 1000)
    finally:
        ask._timeout_seconds = usual


def ask_everything() -> dict[str, Trial]:
    """All on one worker, in this order: whatever one does must not be felt by the next."""
    model = describe("bert-mini", max_length=64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", HERE)
        with ProbeClient(VirtualCudaDevice(CARD)) as ask:
            answers = {
                "first": ask(classifier(), 1000),
                "again": ask(classifier(), 1000),
                "fp16": ask(classifier(precision="fp16"), 1000),
                "accumulating": ask(classifier(accumulation=2), 1000),
                "too large": ask(classifier(), 100_000),
                **{deed: ask(classifier(deed), 1000) for deed in DEEDS},
                "timeout": in_a_moment(ask),
                "afterwards": ask(classifier(), 1000),
                "larger": ask(classifier(), 2000),
                "model": ask(model, 32),
                "model again": ask(model, 32),
            }
    return answers


@pytest.fixture(scope="module")
def trials(once: Callable[..., Any]) -> dict[str, Trial]:
    found: dict[str, Trial] = once("trials", ask_everything)
    return found


@pytest.mark.parametrize(
    ("name", "outcome", "detail"),
    [
        ("first", "fits", ""),
        ("error", "error", "ValueError: no such layer (misbehaving.py, line "),
        ("crash", "crash", "the process died of SIGSEGV"),
        ("killed", "killed", "the process was killed (SIGKILL); the system does so when the host's memory runs out"),
        ("timeout", "timeout", "no answer in 3 s"),
        ("too large", "oom", "CUDA out of memory"),
    ],
)
def test_every_way_to_end_is_told_apart(trials: dict[str, Trial], name: str, outcome: str, detail: str) -> None:
    assert trials[name].outcome == outcome
    assert trials[name].detail.startswith(detail)


def test_every_trial_is_a_rehearsed_one_and_tells_no_time(trials: dict[str, Trial]) -> None:
    for trial in trials.values():
        assert trial.source == "rehearsed"
        assert trial.step_seconds is trial.samples_per_second is None


@pytest.mark.parametrize("pair", [("first", "again"), ("first", "afterwards"), ("model", "model again")])
def test_the_same_size_has_the_same_peak_whatever_was_run_before(
    trials: dict[str, Trial], pair: tuple[str, str]
) -> None:
    assert trials[pair[0]].fits
    assert trials[pair[0]] == trials[pair[1]]


def test_what_is_used_is_what_is_reserved_and_the_context(trials: dict[str, Trial]) -> None:
    for name in ("first", "fp16", "accumulating", "larger", "model"):
        trial = trials[name]
        assert trial.peak is not None
        assert trial.used_bytes == trial.peak.reserved_bytes + CARD.context_bytes
        assert trial.peak.reserved_bytes >= trial.peak.allocated_bytes


def test_weights_gradients_and_the_state_of_adam_are_in_the_peak(trials: dict[str, Trial]) -> None:
    """Four times four bytes for each parameter, and two copies of the activations between the layers."""
    activations = 1000 * 4 * (1024 + 2 * 4096)
    peak = trials["first"].peak
    assert peak is not None
    assert peak.allocated_bytes > 16 * PARAMETERS
    assert peak.allocated_bytes < 16 * PARAMETERS + 2 * activations + 64 * MIB


def test_a_larger_batch_and_accumulation_need_more(trials: dict[str, Trial]) -> None:
    first, larger, accumulating = (trials[name].peak for name in ("first", "larger", "accumulating"))
    assert first is not None
    assert larger is not None
    assert accumulating is not None
    assert larger.allocated_bytes - first.allocated_bytes > 1000 * 4 * 4096
    assert accumulating.allocated_bytes >= first.allocated_bytes


def test_a_size_that_is_too_large_is_told_with_what_was_reached(trials: dict[str, Trial]) -> None:
    trial = trials["too large"]
    assert not trial.fits
    assert trial.alloc_retries >= 1
    assert trial.used_bytes is not None
    assert CARD.context_bytes < trial.used_bytes <= (CARD.total_bytes or 0)


@pytest.mark.parametrize("name", [*DEEDS, "timeout"])
def test_a_size_without_an_answer_has_no_figures(trials: dict[str, Trial], name: str) -> None:
    assert trials[name] == dataclasses.replace(trials[name], peak=None, used_bytes=None, alloc_retries=0)


def test_no_worker_is_left(trials: dict[str, Trial]) -> None:
    assert len(trials) == len(DEEDS) + len(OTHERS)
    assert not [child for child in psutil.Process().children(recursive=True) if WORKER in child.cmdline()]
