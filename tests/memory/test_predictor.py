"""Tests of `hf_bsopt.memory.predictor`."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import BertConfig, LlamaConfig

from hf_bsopt.data import catalog
from hf_bsopt.memory import Predictor
from hf_bsopt.records import GpuSpec
from hf_bsopt.workloads.module import ModuleWorkload
from hf_bsopt.workloads.step_settings import StepSettings
from hf_bsopt.workloads.trainable import Phase
from hf_bsopt.workloads.workload import Workload, describe

T4, A100 = catalog.gpu("T4"), catalog.gpu("A100-40GB")
MIB = 1 << 20

# ---- real steps


@pytest.mark.parametrize(
    ("model", "gpu", "batch_size", "options", "allocated", "reserved"),
    [
        ("biobert", T4, 8, {"max_length": 128}, 1967852544, 2101346304),
        ("biobert", T4, 8, {"max_length": 512, "attention": "eager"}, 5394322432, 5656018944),
        ("biobert", T4, 8, {"max_length": 256, "precision": "fp32"}, 2650231296, 2885681152),
        ("biobert", T4, 16, {"max_length": 512, "activation_checkpointing": True}, 2083087360, 2319450112),
        ("biobert", T4, 16, {"max_length": 512, "accumulation": 2}, 5402438144, 5666504704),
        ("biobert", T4, 16, {"max_length": 512, "optimizer": "adamw_torch"}, 4956833280, 5190451200),
        ("biobert", A100, 8, {"max_length": 512, "precision": "bf16"}, 3296473600, 3468689408),
        ("gpt2", A100, 2, {"max_length": 1024}, 4712618496, 5198839808),
    ],
)
def test_the_predicted_peak_matches_a_trainer_step_on_a_virtual_gpu(
    model: str, gpu: GpuSpec, batch_size: int, options: dict[str, Any], allocated: int, reserved: int
) -> None:
    """Recorded in benchmarks/truth/rehearsed.csv: Trainer steps with torch 2.11.0+cu130, transformers 5.23.0, on a
    virtual T4 of 15,637,413,888 bytes and an A100 of 42,405,462,016.
    """
    options = dict(options)
    accumulation = options.pop("accumulation", 1)
    trial = Predictor(describe(model, **options).accumulating(accumulation), gpu, torch_version="2.11")(batch_size)
    assert trial.peak is not None
    assert trial.peak.allocated_bytes == pytest.approx(allocated, rel=1e-4)
    assert trial.peak.reserved_bytes == pytest.approx(reserved, rel=1e-3)


# ---- a small model

BERT = BertConfig(vocab_size=1000, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128)
LLAMA = LlamaConfig(
    vocab_size=1000,
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=128,
)


def tiny(**options: Any) -> Workload:
    return Workload(**{"model": "tiny", "config": BERT, "task": "token-classification", "max_length": 64, **options})


def t4_with(total_bytes: int | None, context_bytes: int = 0) -> GpuSpec:
    return dataclasses.replace(T4, total_bytes=total_bytes, context_bytes=context_bytes)


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    return Predictor(tiny(), T4)


def test_used_bytes_of_a_predicted_trial_include_the_context(predictor: Predictor) -> None:
    trial = predictor(8)
    assert (trial.batch_size, trial.outcome, trial.source) == (8, "fits", "predicted")
    assert trial.peak is not None
    assert trial.peak.allocated_bytes <= trial.peak.reserved_bytes
    assert trial.used_bytes == trial.peak.reserved_bytes + T4.context_bytes
    assert T4.context_bytes > 100 * MIB
    assert trial.step_seconds is None


def test_a_step_is_traced_once_for_all_batch_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[Workload] = []
    build = Workload.build
    monkeypatch.setattr(Workload, "build", lambda self: built.append(self) or build(self))
    predictor = Predictor(tiny(), T4)
    assert built == []
    for batch_size in (1, 2, 40, 1000):
        predictor(batch_size)
        predictor.unlimited(batch_size)
    predictor.guess(0.9)
    assert len(built) == 2  # at the two batch sizes that make the timeline


def test_allocated_bytes_never_decrease_with_the_batch_size(predictor: Predictor) -> None:
    peaks = [predictor(batch_size).peak for batch_size in (1, 2, 3, 8, 16, 64, 256, 1024)]
    allocated = [peak.allocated_bytes for peak in peaks if peak is not None]
    assert len(allocated) == 8
    assert allocated == sorted(allocated)


def test_a_size_that_does_not_fit_is_an_oom_and_unlimited_gives_the_bytes_it_needs(predictor: Predictor) -> None:
    reserved = predictor.unlimited(64) - T4.context_bytes
    small = Predictor(tiny(), t4_with(reserved // 2))
    assert small(64).outcome == "oom"
    assert not small(64).fits
    assert small.unlimited(64) == reserved
    assert Predictor(tiny(), t4_with(reserved))(64).fits


def test_the_context_reduces_the_memory_for_tensors(predictor: Predictor) -> None:
    trial = predictor(64)
    assert trial.peak is not None
    exactly = trial.peak.reserved_bytes
    assert Predictor(tiny(), t4_with(exactly + 300 * MIB, 300 * MIB))(64).outcome == "fits"
    # with less memory it fits only if releasing cached segments frees enough
    assert Predictor(tiny(), t4_with(trial.peak.allocated_bytes // 2 + 300 * MIB, 300 * MIB))(64).outcome == "oom"


def test_the_guess_is_near_the_size_that_fills_the_fraction(predictor: Predictor) -> None:
    guess = predictor.guess(0.9)
    used = predictor.unlimited(guess)
    assert T4.total_bytes is not None
    assert used == pytest.approx(0.9 * T4.total_bytes, rel=0.1)


@pytest.mark.parametrize("total_bytes", [None, 16 * MIB])
def test_the_guess_is_at_least_one(total_bytes: int | None) -> None:
    assert Predictor(tiny(), t4_with(total_bytes)).guess(0.9) == 1


def test_total_and_trainable_parameters_are_counted(predictor: Predictor) -> None:
    predictor(1)
    with torch.device("meta"):
        count = sum(p.numel() for p in tiny().build().parameters())
    assert predictor.parameters == (count, count)


def test_packed_4_bit_weights_count_as_individual_parameters() -> None:
    pytest.importorskip("peft")
    pytest.importorskip("bitsandbytes")
    plain = tiny(config=LLAMA, task="causal-lm", precision="bf16", weights_dtype="bfloat16", lora_r=4)
    packed = dataclasses.replace(plain, load_in_4bit=True)
    counts, peaks = [], []
    for workload in (plain, packed):
        predictor = Predictor(workload, A100)
        peaks.append(predictor.timeline.composition(1, A100)["weights"])
        counts.append(predictor.parameters)
    assert counts[0] == counts[1]
    assert 0 < counts[0][1] < counts[0][0] / 10
    assert peaks[1] < peaks[0]


# ---- accumulation


def test_gradients_are_resident_during_the_forward_of_a_second_micro_batch() -> None:
    def live_bytes(accumulation: int) -> int:
        predictor = Predictor(tiny().accumulating(accumulation), T4)
        return predictor.timeline.live_bytes(512, T4)

    with torch.device("meta"):
        gradients = sum(-(-4 * p.numel() // 512) * 512 for p in tiny().build().parameters())
    assert live_bytes(2) - live_bytes(1) > 0.9 * gradients


def test_further_micro_batches_add_only_their_inputs() -> None:
    batch = 3 * 512 * 64 * 8  # ids, mask and labels
    live = [Predictor(tiny().accumulating(n), T4).timeline.live_bytes(512, T4) for n in (2, 4, 7)]
    assert live == [live[0], live[0] + 2 * batch, live[0] + 5 * batch]


def test_only_the_first_and_last_micro_batch_are_run() -> None:
    """A middle micro-batch takes the same memory as the last."""

    class Counting(nn.Linear):
        forwards = 0

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
            Counting.forwards += 1
            return (super().forward(x).mean(),)

    def forwards(accumulation: int) -> int:
        Counting.forwards = 0
        Predictor(ModuleWorkload(Counting(4, 4), {"x": torch.ones(1, 4)}).accumulating(accumulation), T4)(8)
        return Counting.forwards

    assert forwards(2) == forwards(9) == 2 * forwards(1)


# ---- evaluation


def test_evaluation_keeps_the_logits_of_the_previous_batch() -> None:
    """Trainer gathers the logits, so those of the previous batch are still allocated."""

    class Wide(nn.Linear):
        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            logits = super().forward(x)
            return {"loss": logits.mean(), "logits": logits}

    workload = ModuleWorkload(Wide(4, 100_000), {"x": torch.ones(1, 4)}, StepSettings("fp32", "sgd"))
    timeline = Predictor(workload, A100, phase="evaluation").timeline
    per_sequence = (timeline.live_bytes(3000, A100) - timeline.live_bytes(1000, A100)) / 2000
    assert per_sequence == pytest.approx(2 * 4 * 100_000, rel=0.01)


def test_evaluation_has_optimizer_state_and_no_gradients() -> None:
    training, evaluation = Predictor(tiny(), T4), Predictor(tiny(), T4, phase="evaluation")
    parts = evaluation.timeline.composition(2048, T4)
    assert parts["gradients"] == 0
    assert parts["optimizer"] == training.timeline.composition(2048, T4)["optimizer"] > 0
    assert evaluation.timeline.live_bytes(2048, T4) < 0.7 * training.timeline.live_bytes(2048, T4)


def test_expandable_segments_reserve_less_and_allocate_no_more() -> None:
    fixed, growing = Predictor(tiny(), T4), Predictor(tiny(), T4, expandable_segments=True)
    for batch_size in (16, 100, 333):
        one, other = fixed(batch_size).peak, growing(batch_size).peak
        assert one is not None
        assert other is not None
        assert other.allocated_bytes <= one.allocated_bytes
        assert other.reserved_bytes <= one.reserved_bytes


# ---- any module


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.norm, self.head = nn.Linear(256, 512), nn.BatchNorm1d(512), nn.Linear(512, 10)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = self.head(self.norm(self.body(x)).relu())
        return F.cross_entropy(logits, labels), logits


def test_a_module_with_an_example_batch_is_predicted_and_left_unchanged() -> None:
    torch.manual_seed(0)
    module = Classifier()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    example = {"x": torch.randn(4, 256), "labels": torch.zeros(4, dtype=torch.int64)}
    predictor = Predictor(ModuleWorkload(module, example, StepSettings("fp32")), A100)
    small, large = predictor(8).peak, predictor(8192).peak
    assert small is not None
    assert large is not None
    # at least the input, the outputs of the body and batch norm, and the gradient of the latter
    assert large.allocated_bytes - small.allocated_bytes > 4 * 8184 * (256 + 3 * 512)
    assert predictor.parameters[0] == sum(p.numel() for p in module.parameters())
    assert {name: torch.equal(value, before[name]) for name, value in module.state_dict().items()} == dict.fromkeys(
        before, True
    )
    assert all(p.grad is None for p in module.parameters())


@pytest.mark.parametrize("phase", ["training", "evaluation"])
def test_a_prediction_draws_no_random_numbers(phase: Phase) -> None:
    before = torch.get_rng_state()
    Predictor(tiny(), T4, phase=phase)(4)
    assert torch.equal(torch.get_rng_state(), before)
