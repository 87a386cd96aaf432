"""The workload that is read from a Trainer, and the prediction of its step."""

from __future__ import annotations

import dataclasses
import functools
import random
import threading
import types
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from accelerate import dispatch_model
from torch import nn
from trainers import TINY, Pad, Texts, classifier, language_model, trainer
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForTokenClassification,
    DataCollatorWithFlattening,
    Trainer,
    ViTConfig,
    ViTForImageClassification,
)

from hf_bsopt._utils.pickling import pickled, unpickled
from hf_bsopt.data import catalog
from hf_bsopt.errors import TraceError, UsageError
from hf_bsopt.integrations.trainer.loss_scale import ignores_item_count
from hf_bsopt.integrations.trainer.workload import TrainerWorkload, trainer_workload
from hf_bsopt.memory.predictor import Predictor
from hf_bsopt.memory.replay.timeline_by_size import TimelineBySize

T4 = catalog.gpu("T4")


def shapes(batch: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in batch.items()}


def predicted(workload: TrainerWorkload, size: int = 16) -> int:
    peak = Predictor(workload, T4)(size).peak
    assert peak is not None
    return peak.allocated_bytes


def test_shapes_are_those_of_the_longest_example_at_every_size(tmp_path: Path) -> None:
    workload = trainer_workload(trainer(tmp_path, dataset=Texts([8] * 30 + [40])))
    for size in (1, 2, 3, 17):
        expected = {"input_ids": (size, 40), "attention_mask": (size, 40), "labels": (size,)}
        assert shapes(workload.batch(size, "meta")) == shapes(workload.batch(size, "cpu")) == expected
    assert workload.length == 40


def test_batches_on_a_device_come_from_the_collator(tmp_path: Path) -> None:
    batch = trainer_workload(trainer(tmp_path, dataset=Texts([8] * 30 + [40]))).batch(4, "cpu")
    assert batch["input_ids"][0].tolist() == Texts([8] * 30 + [40])[30]["input_ids"]
    assert batch["attention_mask"].sum(1).tolist() == [40, 40, 40, 8]


@pytest.mark.parametrize(("values", "precision"), [({}, "fp32"), ({"bf16": True}, "bf16")])
def test_precision_comes_from_the_arguments(tmp_path: Path, values: dict[str, Any], precision: str) -> None:
    assert trainer_workload(trainer(tmp_path, **values)).settings.precision == precision


def test_precision_comes_from_the_launcher_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert trainer_workload(trainer(tmp_path)).settings.precision == "bf16"


@pytest.mark.parametrize("mixed", ["fp16", "fp8"])
def test_precision_comes_from_the_accelerator(tmp_path: Path, mixed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = trainer(tmp_path)
    monkeypatch.setattr(type(made.accelerator), "mixed_precision", mixed)  # fp16 on a CPU is refused
    if mixed == "fp16":
        assert trainer_workload(made).settings.precision == "fp16"
    else:
        with pytest.raises(UsageError, match="mixed precision fp8 is not supported"):
            trainer_workload(made)


def test_half_precision_weights_are_trained_as_such(tmp_path: Path) -> None:
    assert trainer_workload(trainer(tmp_path, classifier().to(torch.bfloat16))).settings.precision == "bf16-weights"


def test_clipping_and_optimizer_come_from_the_arguments(tmp_path: Path) -> None:
    settings = trainer_workload(trainer(tmp_path, max_grad_norm=0.0, optim="adafactor")).settings
    assert (settings.max_grad_norm, settings.optimizer) == (0.0, "adafactor")


def test_given_optimizer_is_recreated_for_the_copy(tmp_path: Path) -> None:
    model = classifier()
    given = torch.optim.NAdam(model.parameters(), lr=0.25, betas=(0.5, 0.6))
    made = Trainer(model=model, args=trainer(tmp_path).args, train_dataset=Texts([8] * 4), optimizers=(given, None))
    workload = trainer_workload(made)
    assert workload.settings.optimizer == "NAdam"
    assert workload.overrides.make_optimizer is not None
    copied = workload.overrides.make_optimizer(nn.Linear(2, 2))
    assert type(copied) is torch.optim.NAdam
    assert (copied.defaults["lr"], copied.defaults["betas"]) == (0.25, (0.5, 0.6))
    with_adam = trainer_workload(trainer(tmp_path, classifier()))
    assert predicted(workload) == pytest.approx(predicted(with_adam), rel=0.1)


def test_optimizer_without_state_needs_less_memory(tmp_path: Path) -> None:
    big = {"num_hidden_layers": 8, "hidden_size": 256, "intermediate_size": 1024}
    sgd = predicted(trainer_workload(trainer(tmp_path, classifier(**big), optim="sgd")), 1)
    adam = predicted(trainer_workload(trainer(tmp_path, classifier(**big))), 1)
    weights = sum(parameter.nbytes for parameter in classifier(**big).parameters())
    assert adam - sgd > 1.5 * weights


def test_checkpointing_is_turned_on_only_in_the_copy(tmp_path: Path) -> None:
    big = {"num_hidden_layers": 6}
    made = trainer(tmp_path, classifier(**big), gradient_checkpointing=True, dataset=Texts([64] * 4))
    workload = trainer_workload(made)
    plain = trainer_workload(trainer(tmp_path, classifier(**big), dataset=Texts([64] * 4)))
    assert predicted(workload, 64) < 0.7 * predicted(plain, 64)
    assert not made.model.is_gradient_checkpointing
    assert ("checkpointing", "activations are recomputed in the backward pass") in workload.describe()


def test_custom_loss_function_is_part_of_the_step(tmp_path: Path) -> None:
    kept: list[Any] = []

    def expensive(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        kept.append(labels)
        big = outputs.logits.repeat(1, 1 << 12)
        return big.exp().sum() * 1e-9

    made = trainer(tmp_path)
    plain = predicted(trainer_workload(made))
    made.compute_loss_func = expensive
    assert predicted(trainer_workload(made)) > plain + 16 * 2 * (1 << 12) * 4
    assert kept


def test_label_smoothing_changes_the_prediction(tmp_path: Path) -> None:
    made = trainer(tmp_path, language_model(), Texts([32] * 8, True), label_smoothing_factor=0.1)
    plain = trainer(tmp_path, language_model(), Texts([32] * 8, True))
    assert predicted(trainer_workload(made)) != predicted(trainer_workload(plain))


def test_overridden_compute_loss_is_traced_and_the_report_says_so(tmp_path: Path) -> None:
    class Own(Trainer):
        def compute_loss(self, model: Any, inputs: Any, **kwargs: Any) -> Any:
            return super().compute_loss(model, inputs, **kwargs)

    plain, own = trainer_workload(trainer(tmp_path)), trainer_workload(trainer(tmp_path, kind=Own))
    assert "compute_loss of Own is traced as it is" in own.defaults
    assert predicted(own) == predicted(plain)


def test_iterable_dataset_is_sized_for_the_limit_of_the_model(tmp_path: Path) -> None:
    class Stream(torch.utils.data.IterableDataset[dict[str, Any]]):
        def __iter__(self) -> Any:
            raise AssertionError("a stream must not be read before the training")

    workload = trainer_workload(trainer(tmp_path, dataset=Stream()))
    assert shapes(workload.batch(2, "cpu")) == {"input_ids": (2, 128), "attention_mask": (2, 128), "labels": (2,)}
    assert "sequences of 128 tokens, the model's limit" in workload.defaults[0]
    assert trainer_workload(trainer(tmp_path, dataset=Stream()), max_length=50).length == 50


@pytest.mark.parametrize(
    ("kind", "labels"),
    [
        (BertForTokenClassification, {"labels": (2, 128)}),
        (BertForQuestionAnswering, {"start_positions": (2,), "end_positions": (2,)}),
    ],
)
def test_iterable_dataset_gets_the_labels_of_the_task(tmp_path: Path, kind: Any, labels: dict[str, Any]) -> None:
    class Stream(torch.utils.data.IterableDataset[dict[str, Any]]):
        def __iter__(self) -> Any:
            return iter(())

    batch = trainer_workload(trainer(tmp_path, kind_of(kind), dataset=Stream())).batch(2, "meta")
    assert {
        name: shape for name, shape in shapes(batch).items() if name not in ("input_ids", "attention_mask")
    } == labels


class Stream(torch.utils.data.IterableDataset[dict[str, Any]]):
    def __iter__(self) -> Any:
        return iter(())


class Bag(nn.Module):
    """A model whose forward accepts exactly the arguments that it names."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(100, 2)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": nn.functional.cross_entropy(self.table(input_ids).flatten(0, 1), labels.flatten())}


def test_iterable_dataset_for_a_module_gets_the_arguments_of_forward(tmp_path: Path) -> None:
    workload = trainer_workload(trainer(tmp_path, Bag(), dataset=Stream()), max_length=6)
    assert shapes(workload.batch(2, "meta")) == {"input_ids": (2, 6), "labels": (2, 6)}


def test_iterable_dataset_without_examples_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="the train_dataset yields no example"):
        trainer_workload(trainer(tmp_path, pictures_model(), dataset=Stream()), max_length=6)


def pictures_model() -> ViTForImageClassification:
    return ViTForImageClassification(
        ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=32)
    )


def kind_of(kind: Any) -> nn.Module:
    model: nn.Module = kind(BertConfig(**TINY))
    return model


def test_batches_that_do_not_grow_linearly_are_rejected(tmp_path: Path) -> None:
    def uneven(examples: list[Any]) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.ones(len(examples), len(examples) ** 2, dtype=torch.int64)}

    with pytest.raises(TraceError, match="its batches do not grow linearly with the batch size"):
        trainer_workload(trainer(tmp_path, collator=uneven))


def test_model_that_cannot_be_copied_is_rejected(tmp_path: Path) -> None:
    made = trainer(tmp_path)
    made.model.held = threading.Lock()
    with pytest.raises(UsageError, match=r"BertForSequenceClassification cannot be copied: .*lock"):
        trainer_workload(made).build()


@pytest.mark.parametrize("lengths", [[16] * 8, [8, 16] * 4])
def test_flattened_sequences_with_quadratic_attention_are_traced_at_each_size(
    tmp_path: Path, lengths: list[int]
) -> None:
    flat = DataCollatorWithFlattening()
    workload = trainer_workload(
        trainer(tmp_path, language_model(), Texts(lengths, labels_for_tokens=True), collator=flat)
    )
    predictor = Predictor(workload, T4)
    assert isinstance(predictor.timeline, TimelineBySize)
    small, medium, large = (predictor.timeline.live_bytes(size) for size in (32, 64, 96))
    assert large - medium > 1.2 * (medium - small)


def test_collator_that_returns_no_dict_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"the data collator of this Trainer returns a list.*hf-bsopt rehearse"):
        trainer_workload(trainer(tmp_path, collator=lambda examples: examples))


def test_evaluation_uses_the_longest_examples_of_its_dataset(tmp_path: Path) -> None:
    workload = trainer_workload(trainer(tmp_path, dataset=Texts([8] * 4), eval_dataset=Texts([30] * 4)))
    assert shapes(workload.batch(2, "meta"))["input_ids"] == (2, 8)
    assert shapes(workload.evaluating().batch(2, "meta"))["input_ids"] == (2, 30)


@pytest.mark.parametrize("lengths", [(5, 30), (30, 5)])
def test_evaluation_dataset_with_the_longest_examples_decides(tmp_path: Path, lengths: tuple[int, int]) -> None:
    several = {str(length): Texts([length] * (4 + place)) for place, length in enumerate(lengths)}
    workload = trainer_workload(trainer(tmp_path, dataset=Texts([8] * 4), eval_dataset=several))
    assert shapes(workload.evaluating().batch(2, "meta"))["input_ids"] == (2, 30)
    assert workload.evaluated is not None
    assert workload.evaluated.total == 5


def test_portable_workload_has_no_weights(tmp_path: Path) -> None:
    made = trainer(tmp_path, dataset=Texts([8] * 30 + [40]))
    there = unpickled(pickled(trainer_workload(made).portable()))
    assert all(parameter.is_meta for parameter in there.build().parameters())
    assert torch.equal(there.batch(3, "cpu")["input_ids"], trainer_workload(made).batch(3, "cpu")["input_ids"])


def test_user_hooks_do_not_observe_the_search(tmp_path: Path) -> None:
    seen: list[object] = []
    made = trainer(tmp_path)
    made.model.bert.register_forward_hook(lambda *_: seen.append(1))
    predicted(trainer_workload(made))
    assert not seen


def test_wrapped_forward_of_an_earlier_training_is_removed(tmp_path: Path) -> None:
    made = trainer(tmp_path, bf16=True, max_steps=1)
    before = predicted(trainer_workload(made))
    made.train()
    assert "_original_forward" in vars(made.model)
    assert predicted(trainer_workload(made)) == before


def test_forward_that_was_replaced_on_the_instance_is_predicted_as_the_class_is(tmp_path: Path) -> None:
    """trl's SFTTrainer was sized 94 % too low: its fused head is such a method, and the copy ran the real model."""
    plain = predicted(trainer_workload(trainer(tmp_path)))
    made = trainer(tmp_path, max_steps=1)
    before = made.model.forward

    @functools.wraps(type(made.model).forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return before(*args, **kwargs)

    made.model.forward = types.MethodType(forward, made.model)
    assert predicted(trainer_workload(made)) == plain
    made.train()  # accelerate wraps it once more
    workload = trainer_workload(made)
    assert predicted(workload) == plain
    assert vars(workload.build())["forward"].__func__.__code__ is forward.__code__


def test_dataloader_of_the_search_is_not_kept(tmp_path: Path) -> None:
    made = trainer(tmp_path, eval_dataset=Texts([8] * 4))
    trainer_workload(made)
    assert made.accelerator._dataloaders == []


def test_persistent_evaluation_dataloaders_are_not_replaced(tmp_path: Path) -> None:
    """With persistent workers, Trainer keeps a dataloader as "eval", which the next dataset would get as well."""
    values = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}
    several = {"short": Texts([5] * 6), "long": Texts([30] * 4)}
    made = trainer(tmp_path, dataset=Texts([8] * 4), eval_dataset=several, **values)
    workload = trainer_workload(made)
    assert shapes(workload.evaluating().batch(2, "meta"))["input_ids"] == (2, 30)
    assert len(made.get_eval_dataloader(Texts([8] * 9)).dataset) == 9
    kept = dict(made._eval_dataloaders)
    trainer_workload(made)
    assert made._eval_dataloaders == kept


class Draws(Pad):
    """A collator that masks with generators of its own, created at the first call as transformers' are."""

    def __init__(self) -> None:
        self.generator: torch.Generator | None = None
        self.numbers = random.Random(7)
        self.arrays = numpy.random.default_rng(7)

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        self.generator = self.generator or torch.Generator().manual_seed(7)
        self.drawn = torch.rand(1, generator=self.generator).item(), self.numbers.random(), self.arrays.random()
        return super().__call__(examples)


def test_generators_of_the_collator_are_not_advanced(tmp_path: Path) -> None:
    collator = Draws()
    trainer_workload(trainer(tmp_path, collator=collator))
    assert collator.generator is None  # each worker creates its own
    for _ in range(2):
        collator([Texts([8])[0]])
    again = Draws()
    again([Texts([8])[0]])
    trainer_workload(trainer(tmp_path, collator=again))
    again([Texts([8])[0]])
    assert again.drawn == collator.drawn


def test_hooks_of_dispatch_model_are_removed_from_the_copy(tmp_path: Path) -> None:
    before = predicted(trainer_workload(trainer(tmp_path)))
    placed = dispatch_model(classifier(), {"": "cpu"}, force_hooks=True)
    assert predicted(trainer_workload(trainer(tmp_path, placed))) == before
    assert hasattr(placed, "_hf_hook")


@pytest.mark.parametrize(
    ("model", "ignores"),
    [(classifier, True), (lambda: kind_of(BertForTokenClassification), True), (language_model, False)],
    ids=["sequences", "tokens", "language model"],
)
def test_heads_that_ignore_the_label_count_are_detected(tmp_path: Path, model: Any, ignores: bool) -> None:
    of_tokens = model is not classifier
    made = trainer(tmp_path, model(), Texts([8] * 4, of_tokens))
    workload = trainer_workload(made)
    assert ignores_item_count(workload.build(), workload.batch(2, "meta")) is ignores


def test_torch_container_counts_as_custom_code(tmp_path: Path) -> None:
    workload = trainer_workload(trainer(tmp_path))
    assert not workload.is_custom
    assert dataclasses.replace(workload, module=nn.Sequential(nn.Linear(2, 2))).is_custom
