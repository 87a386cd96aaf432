"""Trainers with a step of their own: it is traced as it is, on copies, or refused with the way on."""

from __future__ import annotations

import collections
import functools
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from trainers import Texts, language_model, losses, trainer
from transformers import LlamaConfig, LlamaForCausalLM, Trainer

from hf_bsopt._utils.pickling import pickled, unpickled
from hf_bsopt.data import catalog
from hf_bsopt.errors import TraceError, UsageError
from hf_bsopt.integrations.trainer import BatchSizeCallback, find_batch_size
from hf_bsopt.integrations.trainer.workload import TrainerWorkload, trainer_workload
from hf_bsopt.memory.predictor import Predictor
from hf_bsopt.memory.replay.timeline_by_size import TimelineBySize
from hf_bsopt.workloads.meta_device import initialized
from hf_bsopt.workloads.training_step import TrainingStep

T4 = catalog.gpu("T4")
GIB = 2**30


class TwoPasses(Trainer):
    """R-Drop: two forward passes with different dropout, and the divergence of their outputs."""

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        first, second = model(**inputs), model(**inputs)
        divergence = functional.kl_div(first.logits.log_softmax(-1), second.logits.softmax(-1), reduction="batchmean")
        return (first.loss + second.loss) / 2 + divergence


class Distillation(Trainer):
    """A teacher beside the model, and metrics that are kept."""

    teacher: nn.Module

    def begin(self, teacher: nn.Module) -> Distillation:
        self.teacher = teacher.eval()
        self.metrics: dict[str, list[float]] = collections.defaultdict(list)
        return self

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        outputs = model(**inputs)
        with torch.no_grad():
            aim = self.teacher(**inputs).logits
        loss = functional.mse_loss(outputs.logits, aim)
        self.metrics["distance"].append(self.accelerator.gather_for_metrics(loss.detach()).mean().item())
        self.log({"distance": self.metrics["distance"][-1]})
        return (outputs.loss + loss, outputs) if return_outputs else outputs.loss + loss


def llama() -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=8000,
            hidden_size=256,
            intermediate_size=512,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=512,
        )
    )


def made(folder: Path, kind: type[Trainer], model: nn.Module | None = None, length: int = 8, **values: Any) -> Any:
    return trainer(folder, model or language_model(), Texts([length] * 64, True), kind=kind, **values)


def predicted(workload: TrainerWorkload, size: int = 8) -> float:
    return predicted_by(Predictor(workload, T4), size)


def predicted_by(predictor: Predictor, size: int) -> float:
    peak = predictor(size).peak
    assert peak is not None
    return peak.allocated_bytes / GIB


def test_two_forward_passes_need_what_they_need_on_a_virtual_gpu(tmp_path: Path) -> None:
    """0.7874 GiB: rehearsed on a virtual T4 with torch 2.11 and transformers 5.23, batch 8, 256 tokens, fp32."""
    assert predicted(trainer_workload(made(tmp_path, TwoPasses, llama(), 256))) == pytest.approx(0.7874, rel=0.005)


def test_teacher_beside_the_model_needs_what_it_needs_on_a_virtual_gpu(tmp_path: Path) -> None:
    """0.4835 GiB: rehearsed as above."""
    distillation = made(tmp_path, Distillation, llama(), 256).begin(llama())
    assert predicted(trainer_workload(distillation)) == pytest.approx(0.4835, rel=0.005)


def test_weights_of_the_teacher_are_counted_as_weights(tmp_path: Path) -> None:
    alone = Predictor(trainer_workload(made(tmp_path, TwoPasses)), T4).timeline.composition(1)
    workload = trainer_workload(made(tmp_path, Distillation).begin(language_model()))
    beside = Predictor(workload, T4).timeline.composition(1)
    assert beside["weights"] == 2 * alone["weights"]


def test_trainer_and_teacher_are_left_as_they_are(tmp_path: Path) -> None:
    distillation = made(tmp_path, Distillation).begin(language_model())
    teacher, state = distillation.teacher, distillation.state
    find_batch_size(distillation, device="predict", gpu="T4")
    assert not distillation.metrics
    assert distillation.teacher is teacher
    assert distillation.state is state
    assert not state.log_history
    assert {parameter.device.type for parameter in teacher.parameters()} == {"cpu"}
    assert str(distillation.args.device) == str(distillation.accelerator.device) == "cpu"
    distillation.train()
    assert len(losses(distillation)) == 3
    assert len(distillation.metrics["distance"]) == 3


def test_step_runs_in_another_process(tmp_path: Path) -> None:
    workload = trainer_workload(made(tmp_path, Distillation, bf16=True).begin(language_model()))
    there = unpickled(pickled(workload.portable()))
    model = initialized(there.build(), "cpu")
    step = TrainingStep(model, there.settings, "cpu", there.overrides)
    (teacher,) = step.other_modules
    assert all(parameter.device.type == "cpu" for parameter in teacher.parameters())
    before = [parameter.clone() for parameter in model.parameters()]
    step.worst_case(there, 2, "cpu")
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert all(parameter.grad is None for parameter in teacher.parameters())


@pytest.mark.slow
def test_size_is_verified_with_the_step_as_it_is(tmp_path: Path) -> None:
    distillation = made(tmp_path, Distillation).begin(language_model())
    report = find_batch_size(distillation, memory="2GiB", batch_size=8)
    assert report.source == "measured"
    assert distillation.args.per_device_train_batch_size == 8


def test_training_step_of_a_subclass_is_traced(tmp_path: Path) -> None:
    class Twice(Trainer):
        """Two backward passes whose graphs are both kept."""

        def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Any:
            losses = [self.compute_loss(model, dict(inputs)) for _ in range(2)]
            for loss in losses:
                self.accelerator.backward(loss / 2)
            return losses[0].detach()

    plain = predicted(trainer_workload(made(tmp_path, Trainer, llama(), 64)))
    assert predicted(trainer_workload(made(tmp_path, Twice, llama(), 64))) > 1.2 * plain


def test_compute_loss_that_was_replaced_on_the_instance_is_traced(tmp_path: Path) -> None:
    plain = made(tmp_path, Trainer, llama(), 64)
    before = predicted(trainer_workload(plain))
    original = plain.compute_loss

    @functools.wraps(original)
    def compute_loss(self: Any, *args: Any, **kwargs: Any) -> Any:
        return original(*args, **kwargs) + original(*args, **kwargs)

    plain.compute_loss = types.MethodType(compute_loss, plain)
    assert predicted(trainer_workload(plain)) > 1.2 * before


def test_loss_module_that_holds_the_model_runs_its_copy(tmp_path: Path) -> None:
    class Loss(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, inputs: Any) -> torch.Tensor:
            return self.model(**inputs).loss  # type: ignore[no-any-return]

    class WithLoss(Trainer):
        def compute_loss(self, model: nn.Module, inputs: Any, **kwargs: Any) -> Any:
            return self.loss(inputs)

    plain = predicted(trainer_workload(made(tmp_path, Trainer)))
    with_loss = made(tmp_path, WithLoss)
    with_loss.loss = Loss(with_loss.model)
    assert predicted(trainer_workload(with_loss)) == pytest.approx(plain, rel=0.02)


def test_step_that_cannot_be_traced_sets_nothing_and_names_the_rehearsal(tmp_path: Path) -> None:
    class Scored(Trainer):
        def compute_loss(self, model: nn.Module, inputs: Any, **kwargs: Any) -> Any:
            return model(**inputs).loss * float(inputs["labels"].numpy().mean())

    scored = made(tmp_path, Scored, per_device_train_batch_size=32)
    with pytest.raises(TraceError, match=r"training step of .*Scored cannot be traced.*hf-bsopt rehearse"):
        find_batch_size(scored, device="predict", gpu="T4", fill=True)
    assert scored.args.per_device_train_batch_size == 32


def test_step_that_generates_is_refused_by_name(tmp_path: Path) -> None:
    class Online(Trainer):
        def compute_loss(self, model: Any, inputs: Any, **kwargs: Any) -> Any:
            model.generate(inputs["input_ids"], max_new_tokens=4)
            return model(**inputs).loss

    with pytest.raises(TraceError, match=r"Online generates in its training step.*hf-bsopt rehearse"):
        predicted(trainer_workload(made(tmp_path, Online)))


def test_evaluation_that_cannot_be_traced_can_be_left_out(tmp_path: Path) -> None:
    values = {"eval_dataset": Texts([8] * 8, True), "per_device_train_batch_size": 8}
    two_passes = made(tmp_path, TwoPasses, **values)  # it returns no outputs where they are asked for
    with pytest.raises(TraceError, match=r"evaluation step of .*TwoPasses cannot be traced.*evaluation=False"):
        find_batch_size(two_passes, device="predict", gpu="T4")
    assert find_batch_size(two_passes, device="predict", gpu="T4", evaluation=False).batch_size == 8


def test_evaluation_of_the_subclass_counts_its_teacher(tmp_path: Path) -> None:
    distillation = made(tmp_path, Distillation, eval_dataset=Texts([8] * 8, True)).begin(language_model())
    report = find_batch_size(distillation, device="predict", gpu="T4")
    assert report.evaluation is not None


def test_loss_in_chunks_is_traced_at_the_size_that_is_chosen(tmp_path: Path) -> None:
    """The same operations as long as one chunk holds all tokens: what is traced at 2, 3 and 5 says nothing of 64."""

    class Chunked(Trainer):
        def compute_loss(self, model: Any, inputs: Any, **kwargs: Any) -> Any:
            hidden = model.model(inputs["input_ids"]).last_hidden_state.flatten(0, 1)
            with torch.no_grad():
                for part in hidden.split(1024):
                    model.lm_head(part).exp().sum()
            return hidden.sum()

    workload = trainer_workload(made(tmp_path, Chunked, llama(), 64))
    predictor = Predictor(workload, T4)
    assert not isinstance(predictor.timeline, TimelineBySize)
    assert predictor.confirm(16)
    extrapolated = predicted_by(predictor, 64)
    assert not predictor.confirm(64)
    assert isinstance(predictor.timeline, TimelineBySize)
    assert predicted_by(predictor, 64) < 0.8 * extrapolated
    assert predictor.confirm(64)


class Contrastive(Trainer):
    """The other examples of a batch are the negatives, as in CLIP and MultipleNegativesRankingLoss."""

    def compute_loss(self, model: Any, inputs: Any, **kwargs: Any) -> Any:
        first = model.transformer(inputs["input_ids"]).last_hidden_state.mean(1)
        second = model.transformer(inputs["labels"]).last_hidden_state.mean(1)
        return functional.cross_entropy(first @ second.T, torch.arange(len(first), device=first.device))


@pytest.mark.slow
def test_accumulation_of_a_loss_over_pairs_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made_for = made(tmp_path, Contrastive, per_device_train_batch_size=64)
    report = find_batch_size(made_for, device="predict", gpu="T4", batch_size=16)
    assert (report.plan.micro_batch, report.plan.accumulation) == (16, 4)
    assert "loss is over the pairs in a micro-batch" in caplog.text
    assert any("15 others for each instead of 63" in sentence for sentence in report.plan.advice)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "limit"), [(Contrastive, 64), (TwoPasses, 16), (Trainer, 16)])
def test_other_losses_and_whole_batches_are_not_warned_of(
    tmp_path: Path, kind: type[Trainer], limit: int, caplog: pytest.LogCaptureFixture
) -> None:
    find_batch_size(made(tmp_path, kind, per_device_train_batch_size=64), device="predict", gpu="T4", batch_size=limit)
    assert "pairs" not in caplog.text


def test_trainer_is_asked_whether_a_size_fits(tmp_path: Path) -> None:
    report = find_batch_size(made(tmp_path, Trainer), device="predict", gpu="T4", check=8)
    assert report.checked is not None
    assert report.checked.batch_size == 8
    assert report.checked.fits


def test_empty_dataset_is_refused_in_one_sentence(tmp_path: Path) -> None:
    empty = trainer(tmp_path, dataset=Texts([8]))
    empty.train_dataset = Texts([])
    with pytest.raises(UsageError, match="the train_dataset has no examples: its longest ones decide"):
        find_batch_size(empty, device="predict", gpu="T4")


@pytest.mark.parametrize("target", [("a", "b"), (0.9, 0.1), 5, (2, 3), None, "0.8", (0.5,), (float("nan"), 0.9)])
def test_bad_target_is_refused_when_the_callback_is_made(target: Any) -> None:
    with pytest.raises(UsageError, match="target"):
        BatchSizeCallback(target=target)
