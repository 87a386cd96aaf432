"""Tests of `memory.memory_profile` and `memory.tracing.step_phases`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from hf_bsopt.memory import Timeline, trace
from hf_bsopt.memory.memory_profile import PARTS, memory_profile
from hf_bsopt.memory.replay.recording import Recording
from hf_bsopt.records import MemoryProfile
from hf_bsopt.workloads.step_settings import StepSettings
from hf_bsopt.workloads.training_step import TrainingStep

KIB = 1024


def two_steps(batch_size: int) -> Recording:
    """Record two steps. The first has no optimizer state yet; the second has 5 + 3·b KiB live before the gradient."""
    made = Recording()
    made.allocate(KIB, "weights", "weights")
    for step in range(2):
        made.steps.append(len(made.events))
        made.phases.append((len(made.events), "forward"))
        kept = made.allocate(2 * KIB * batch_size, "linear")
        temporary = made.allocate(KIB * batch_size, "dropout")
        made.free(temporary)
        made.phases.append((len(made.events), "backward"))
        gradient = made.allocate(KIB, "linear_backward", "gradients")
        temporary = made.allocate(KIB // 2, "sum", "workspace")
        made.free(temporary)
        made.free(kept)
        made.phases.append((len(made.events), "optimizer_step"))
        if not step:
            made.allocate(4 * KIB, "adam", "optimizer")
        made.free(gradient)
    return made


@pytest.fixture(scope="module")
def by_hand() -> Timeline:
    return Timeline(two_steps(2), two_steps(3), (2, 3))


def test_the_profile_shows_the_step_with_the_highest_peak(by_hand: Timeline) -> None:
    found = memory_profile(by_hand, 10)
    assert found.length == 8  # nothing of the first step, which allocates the optimizer state
    assert found.parts["optimizer"] == (4 * KIB,) * 8
    assert found.phases == ((0, "forward"), (3, "backward"), (7, "optimizer_step"))


def test_the_parts_add_up_to_the_live_bytes_after_each_event(by_hand: Timeline) -> None:
    found = memory_profile(by_hand, 10)
    start = KIB + 4 * KIB
    kept = start + 20 * KIB
    assert found.totals == (
        kept, kept + 10 * KIB, kept, kept + KIB, kept + KIB + 512, kept + KIB, start + KIB, start,
    )  # fmt: skip
    assert found.moments == tuple(range(8))
    assert (found.peak_at, found.peak_bytes) == (1, kept + 10 * KIB) == (1, by_hand.live_bytes(10))


def test_a_block_freed_in_the_phase_that_allocated_it_is_temporary_and_one_kept_longer_is_an_activation(
    by_hand: Timeline,
) -> None:
    found = memory_profile(by_hand, 10)
    assert found.parts["activations"] == (20 * KIB,) * 6 + (0, 0)
    assert found.parts["temporary"] == (0, 10 * KIB, 0, 0, 512, 0, 0, 0)


def test_downsampling_keeps_the_peak(by_hand: Timeline) -> None:
    whole, thin = memory_profile(by_hand, 10), memory_profile(by_hand, 10, points=3)
    assert len(thin.moments) == 3
    assert (thin.peak_bytes, thin.length) == (whole.peak_bytes, whole.length)
    assert thin.moments[thin.peak_at] == whole.moments[whole.peak_at]
    assert set(thin.totals) <= set(whole.totals)


def test_a_recording_without_steps_is_shown_whole() -> None:
    def one(batch_size: int) -> Recording:
        made = Recording()
        made.free(made.allocate(512 * batch_size, "x"))
        return made

    found = memory_profile(Timeline(one(2), one(3), (2, 3)), 4)
    assert (found.totals, found.phases) == ((2048, 0), ())
    assert found.parts["activations"] == (2048, 0)


def test_the_profile_is_empty_if_nothing_was_allocated() -> None:
    assert memory_profile(Timeline(Recording(), Recording(), (2, 3)), 1) == MemoryProfile(
        0, (), dict.fromkeys(PARTS, ()), 0, ()
    )


# ---- a real step


def train(settings: StepSettings, micro_batches: int = 1) -> Timeline:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"loss": self.layers(x).square().mean()}

    steps: dict[int, TrainingStep] = {}

    def step(model: nn.Module, batch_size: int) -> None:
        if id(model) not in steps:
            steps.clear()
            steps[id(model)] = TrainingStep(model, settings)
        batches: list[Any] = [{"x": torch.ones(batch_size, 64)} for _ in range(micro_batches)]
        steps[id(model)](batches)

    return trace(Net, step, verify=False)


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_a_step_is_forward_and_backward_for_each_micro_batch_and_then_the_optimizer_step(micro_batches: int) -> None:
    timeline = train(StepSettings("fp16", "adamw_torch"), micro_batches)
    assert len(timeline.steps) == 3
    names = [name for _, name in memory_profile(timeline, 32).phases]
    assert names == ["forward", "backward"] * micro_batches + ["optimizer_step"]


def test_the_parts_at_the_peak_match_the_composition() -> None:
    timeline = train(StepSettings("fp32", "adamw_torch"))
    found, composition = memory_profile(timeline, 512), timeline.composition(512)
    at_peak = {name: sizes[found.peak_at] for name, sizes in found.parts.items()}
    assert found.peak_bytes == timeline.live_bytes(512) == sum(composition.values())
    for name in ("weights", "optimizer", "gradients"):
        assert at_peak[name] == composition[name]
    assert at_peak["activations"] + at_peak["temporary"] == composition["activations"] + composition["workspace"]
    assert at_peak["activations"] > 0
