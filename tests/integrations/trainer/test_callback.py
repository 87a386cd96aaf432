"""BatchSizeCallback: a Trainer with this callback trains with a batch size that fits."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import logging
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from trainers import Pad, Seen, Texts, arguments, classifier, language_model, losses, trainer
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainerCallback

from hf_bsopt import BatchSizeCallback, NothingFitsError, UsageError, find_batch_size
from hf_bsopt.integrations.trainer import callback as callback_module
from hf_bsopt.integrations.trainer.checkpoint_state import CheckpointState
from hf_bsopt.integrations.trainer.sizing import report_of
from hf_bsopt.options import Options

SMALL = {"device": "predict", "memory": "1GiB"}
"""Options for a T4 with this much memory. The size is predicted and nothing is run, so these tests are fast."""
LONG = Texts([8] * 40 + [128] * 24)


def options(**keywords: Any) -> Options:
    return Options.of(keywords, "trainer")


def sized(folder: Path, requested: int = 64, limit: int = 16, **values: Any) -> tuple[Trainer, BatchSizeCallback]:
    """Return a trainer that requests ``requested`` sequences at once, limited to ``limit``, and its callback."""
    callback = BatchSizeCallback(**SMALL, batch_size=limit, **values.pop("options", {}))
    values = {"per_device_train_batch_size": requested, "dataset": LONG, **values}
    return trainer(folder, callbacks=[callback], **values), callback


def test_batch_size_is_set_and_effective_batch_is_kept(tmp_path: Path) -> None:
    model = classifier()
    made, callback = sized(tmp_path, model=model)
    seen = Seen(model)
    made.train()
    assert callback.report is not None
    assert (made.args.per_device_train_batch_size, made.args.gradient_accumulation_steps) == (16, 4)
    assert {size for size, _ in seen.shapes} == {16}
    assert len(seen.shapes) == 3 * 4
    assert made.state.global_step == 3


def test_micro_batch_never_exceeds_the_requested_batch_size(tmp_path: Path) -> None:
    made, _ = sized(tmp_path, requested=4, limit=64)
    made.train()
    assert (made.args.per_device_train_batch_size, made.args.gradient_accumulation_steps) == (4, 1)


def test_no_search_runs_before_train_is_called(tmp_path: Path) -> None:
    made, callback = sized(tmp_path)
    assert len(made.get_train_dataloader()) == 1
    assert callback.report is None
    assert made.args.per_device_train_batch_size == 64


def test_changes_after_construction_are_used_by_the_search(tmp_path: Path) -> None:
    made, callback = sized(tmp_path)
    made.train_dataset = Texts([32] * 64)
    made.args.gradient_accumulation_steps = 2
    made.train()
    assert callback.report is not None
    assert callback.report.workload.length == 32
    assert callback.report.plan.effective_batch == 128


def test_shadowed_dataloader_method_is_removed_after_sizing(tmp_path: Path) -> None:
    made, _ = sized(tmp_path)
    made.train()
    assert "get_train_dataloader" not in vars(made)


def test_copied_trainer_is_sized_separately(tmp_path: Path) -> None:
    made, callback = sized(tmp_path)
    copied = copy.deepcopy(made)
    copied.train()
    assert callback.report is None
    assert (made.args.per_device_train_batch_size, copied.args.per_device_train_batch_size) == (64, 16)
    made.train()
    assert callback.report is not None
    assert made.args.per_device_train_batch_size == 16


def test_overridden_get_train_dataloader_decides_the_workload(tmp_path: Path) -> None:
    class Own(Trainer):
        def get_train_dataloader(self) -> Any:
            data = Texts([16] * 64)
            return torch.utils.data.DataLoader(data, batch_size=self._train_batch_size, collate_fn=Pad())

    made, callback = sized(tmp_path, kind=Own)
    made.train()
    assert callback.report is not None
    assert callback.report.workload.length == 16
    assert made.args.per_device_train_batch_size == 16


def test_seq2seq_trainer_is_sized(tmp_path: Path) -> None:
    callback = BatchSizeCallback(**SMALL, batch_size=8)
    values = arguments(tmp_path, per_device_train_batch_size=32).to_dict()
    args = Seq2SeqTrainingArguments(**{name: values[name] for name in ("output_dir", "use_cpu", "max_steps")})
    args.report_to, args.save_strategy, args.per_device_train_batch_size = [], "no", 32
    made = Seq2SeqTrainer(model=classifier(), args=args, train_dataset=LONG, data_collator=Pad(), callbacks=[callback])
    made.train()
    assert made.args.per_device_train_batch_size == 8


def test_callback_class_is_accepted_in_place_of_an_instance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        callback_module, "report_of", lambda trainer, asked: report_of(trainer, options(**SMALL, batch_size=8))
    )
    made = trainer(tmp_path, dataset=LONG, callbacks=[BatchSizeCallback], per_device_train_batch_size=16)
    made.train()
    assert made.args.per_device_train_batch_size == 8


# ---- losses and gradients


@pytest.mark.parametrize("model", [classifier, language_model], ids=["ignores the label count", "uses it"])
def test_introduced_accumulation_does_not_change_losses(tmp_path: Path, model: Callable[[], Any]) -> None:
    data = Texts([16] * 64, labels_for_tokens=model is language_model)
    made, _ = sized(tmp_path, model=model(), dataset=data, max_steps=4, requested=32, limit=8)
    made.train()
    assert made.args.gradient_accumulation_steps == 4
    plain = trainer(tmp_path, model(), data, max_steps=4, per_device_train_batch_size=32)
    plain.train()
    assert losses(made) == pytest.approx(losses(plain), abs=2e-4)
    norms = [[e["grad_norm"] for e in t.state.log_history if "grad_norm" in e] for t in (made, plain)]
    assert norms[0] == pytest.approx(norms[1], rel=2e-3)


def mean_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(outputs.logits, labels)


def weighted_loss(weight: float, outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    return weight * mean_loss(outputs, labels)


class LossModule(torch.nn.Module):
    def forward(self, outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        return mean_loss(outputs, labels)


class LossObject:
    def __call__(self, outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        return mean_loss(outputs, labels)


@pytest.mark.parametrize(
    "loss",
    [mean_loss, functools.partial(weighted_loss, 1.0), LossModule(), LossObject()],
    ids=["function", "partial", "module", "object"],
)
def test_loss_function_that_ignores_the_label_count_is_averaged(tmp_path: Path, loss: Any) -> None:
    made, _ = sized(tmp_path, model=classifier(), dataset=Texts([16] * 64), max_steps=3, requested=32, limit=8)
    made.compute_loss_func = loss
    made.train()
    assert made.args.gradient_accumulation_steps == 4
    plain = trainer(tmp_path, classifier(), Texts([16] * 64), max_steps=3, per_device_train_batch_size=32)
    plain.compute_loss_func = loss
    plain.train()
    assert losses(made) == pytest.approx(losses(plain), abs=2e-4)


def test_existing_optimizer_keeps_its_learning_rate_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = trainer(tmp_path, dataset=LONG, per_device_train_batch_size=64, learning_rate=1e-3)
    made.create_optimizer()
    with caplog.at_level(logging.WARNING, "hf_bsopt"):
        find_batch_size(made, **SMALL, batch_size=16, effective_batch_size=256)
    assert made.args.learning_rate == 1e-3
    assert "for the effective batch of 256 it would be 0.002 in place of 0.001" in caplog.text


# ---- nothing else of the training changes


def random_states() -> list[Any]:
    return [random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist()]


class OwnLoss(Trainer):
    """A Trainer whose loss ignores the number of labels, which GPT-2's own loss uses."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        outputs = model(**inputs)
        return (outputs.loss, outputs) if return_outputs else outputs.loss


def test_compute_loss_that_ignores_the_label_count_is_averaged(tmp_path: Path) -> None:
    data = Texts([16] * 128, labels_for_tokens=True)
    values = {"dataset": data, "kind": OwnLoss, "learning_rate": 1e-2}
    whole = trainer(tmp_path, language_model(), per_device_train_batch_size=64, **values)
    whole.train()
    made, _ = sized(tmp_path, model=language_model(), **values)
    made.train()
    assert made.args.gradient_accumulation_steps == 4
    assert losses(made) == pytest.approx(losses(whole), rel=1e-3)


def test_search_changes_no_state_of_the_training(tmp_path: Path) -> None:
    made = trainer(tmp_path, classifier(0.1), LONG, per_device_train_batch_size=64, eval_dataset=LONG)
    made.create_optimizer()
    made.model.eval()
    callbacks = [*made.callback_handler.callbacks]
    states = random_states()
    weights = [(id(p), p.detach().clone(), p.requires_grad, p.grad) for p in made.model.parameters()]
    buffers = [(id(b), b.detach().clone()) for b in made.model.buffers()]
    optimizer = json.dumps(made.optimizer.state_dict(), default=str)
    history = [*made.state.log_history]
    find_batch_size(made, **SMALL, batch_size=16)
    assert random_states() == states
    for (identity, value, trained, gradient), now in zip(weights, made.model.parameters(), strict=True):
        assert (identity, trained, gradient) == (id(now), now.requires_grad, now.grad)
        assert torch.equal(value, now)
    assert all(i == id(b) and torch.equal(v, b) for (i, v), b in zip(buffers, made.model.buffers(), strict=True))
    assert json.dumps(made.optimizer.state_dict(), default=str) == optimizer
    assert made.callback_handler.callbacks == callbacks
    assert made.state.log_history == history
    assert not made.model.training
    assert made.lr_scheduler is None


def test_first_twenty_losses_equal_those_of_a_run_with_that_size(tmp_path: Path) -> None:
    model = language_model(0.1)
    data = Texts([8, 12, 16, 24] * 40, labels_for_tokens=True)
    made, _ = sized(tmp_path, model=model, dataset=data, max_steps=20, requested=32, limit=8)
    made.train()
    found = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 4}
    fresh = trainer(tmp_path, language_model(0.1), data, max_steps=20, **found)
    fresh.train()
    assert len(losses(made)) == 20
    assert losses(made) == losses(fresh)
    assert all(torch.equal(a, b) for a, b in zip(made.model.parameters(), fresh.model.parameters(), strict=True))


def test_learning_rate_changes_only_with_a_requested_effective_batch(tmp_path: Path) -> None:
    made, _ = sized(tmp_path, learning_rate=1e-3)
    made.train()
    assert made.args.learning_rate == 1e-3
    larger, callback = sized(tmp_path, learning_rate=1e-3, options={"effective_batch_size": 256})
    larger.train()
    assert callback.report is not None
    assert callback.report.plan.effective_batch == 256
    assert larger.args.learning_rate == pytest.approx(2e-3)  # √(256 / 64)
    same, _ = sized(tmp_path, learning_rate=1e-3, options={"effective_batch_size": 256, "lr_scaling": "none"})
    same.train()
    assert same.args.learning_rate == 1e-3


def test_fill_uses_the_largest_size_of_the_device(tmp_path: Path) -> None:
    callback = BatchSizeCallback(**SMALL, fill=True)
    made = trainer(tmp_path, dataset=Texts([128] * 4096), callbacks=[callback], per_device_train_batch_size=2)
    find_batch_size(made, **SMALL, fill=True)
    assert made.args.gradient_accumulation_steps == 1
    assert made.args.per_device_train_batch_size > 100
    with pytest.raises(UsageError, match="target is two fractions"):
        BatchSizeCallback(target=0.9)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="give one of them"):
        BatchSizeCallback(fill=True, effective_batch_size=8)


def test_predicted_evaluation_batch_is_only_ever_reduced(tmp_path: Path) -> None:
    made = trainer(tmp_path, dataset=LONG, eval_dataset=LONG, per_device_eval_batch_size=8)
    find_batch_size(made, **SMALL)
    assert made.args.per_device_eval_batch_size == 8
    made.args.per_device_eval_batch_size = 100_000
    find_batch_size(made, **SMALL)
    assert made.args.per_device_eval_batch_size == len(LONG)


# ---- during the training


def test_memory_and_speed_are_logged_with_the_losses(tmp_path: Path) -> None:
    made, _ = sized(tmp_path)
    made.train()
    logged = [entry for entry in made.state.log_history if "memory_used_gib" in entry]
    assert [entry["step"] for entry in logged] == [1, 2, 3]
    assert set(logged[0]) == {
        "memory_used_gib",
        "memory_utilization",
        "alloc_retries",
        "samples_per_second",
        "epoch",
        "step",
    }
    assert logged[-1]["samples_per_second"] > 0
    assert logged[-1]["memory_used_gib"] > 0.1
    silent, _ = sized(tmp_path, options={"log": False})
    silent.train()
    assert not [entry for entry in silent.state.log_history if "memory_used_gib" in entry]


def test_low_and_high_utilization_are_warned_about_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for memory, words in (("1000GiB", "under 70%"), ("64MiB", "over 95%")):
        caplog.clear()
        callback = BatchSizeCallback(memory=memory)
        callback.size = lambda *_: None  # type: ignore[method-assign]  # only logging is tested
        with caplog.at_level(logging.WARNING, "hf_bsopt"):
            trainer(tmp_path, callbacks=[callback]).train()
        assert [words in record.message for record in caplog.records] == [True]


def test_choice_is_printed_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made, _ = sized(tmp_path)
    made.train()
    assert "batch size 16 × accumulation 4 × 1 = effective 64" in capsys.readouterr().err


def test_recover_repeats_a_failed_step_in_smaller_parts(tmp_path: Path) -> None:
    model = classifier()

    def full(module: Any, args: Any, kwargs: Any) -> None:
        if len(kwargs["input_ids"]) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    made, callback = sized(tmp_path, model=model, options={"recover": True})
    model.register_forward_pre_hook(full, with_kwargs=True)
    seen = Seen(model)
    made.train()
    assert callback.recovery is not None
    assert callback.recovery.parts == 4
    assert made.state.global_step == 3
    assert seen.shapes[-1][0] == 4
    assert "training_step" not in vars(made)


# ---- resuming from a checkpoint


def first_part(folder: Path, **values: Any) -> str:
    made, _ = sized(folder, max_steps=2, save_strategy="steps", save_steps=2, **values)
    made.train()
    return str(folder / "checkpoint-2")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the checkpoint of two steps with micro-batches of 16; it is only read."""
    return first_part(tmp_path_factory.mktemp("first_part"))


def resumed(made: Trainer, checkpoint: str, caplog: pytest.LogCaptureFixture) -> str:
    """Train from the checkpoint and return the warnings."""
    with caplog.at_level(logging.WARNING, "hf_bsopt"):
        made.train(resume_from_checkpoint=checkpoint)
    return caplog.text


def test_resuming_on_the_same_device_reuses_the_size_of_the_checkpoint(
    tmp_path: Path, checkpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(callback_module, "report_of", lambda *_: pytest.fail("the search ran again"))
    made, callback = sized(tmp_path, max_steps=3)
    made.train(resume_from_checkpoint=checkpoint)
    assert callback.report is None
    assert (made.args.per_device_train_batch_size, made.args.gradient_accumulation_steps) == (16, 4)
    assert made.state.global_step == 3


def test_resuming_with_other_options_searches_again(
    tmp_path: Path, checkpoint: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A user may lower the limit after an out-of-memory error."""
    made, callback = sized(tmp_path, max_steps=3, limit=4)
    words = resumed(made, checkpoint, caplog)
    assert callback.report is not None
    assert (made.args.per_device_train_batch_size, made.args.gradient_accumulation_steps) == (4, 16)
    assert "it was found with batch_size=16, and this training has batch_size=4" in words


@pytest.mark.parametrize("options", [{"effective_batch_size": 32}, {"fill": True}], ids=["named", "filled"])
def test_resuming_with_the_same_requested_effective_batch_reuses_the_size(
    tmp_path: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = first_part(tmp_path, options=options)
    monkeypatch.setattr(callback_module, "report_of", lambda *_: pytest.fail("the search ran again"))
    made, _ = sized(tmp_path, max_steps=3, options=options)
    made.train(resume_from_checkpoint=checkpoint)
    assert made.args.per_device_train_batch_size == 16
    assert made.args.gradient_accumulation_steps == (2 if "fill" not in options else 1)


@pytest.mark.slow
def test_resumed_losses_equal_those_of_an_uninterrupted_run(tmp_path: Path) -> None:
    data = Texts([8, 12, 16, 24] * 64, labels_for_tokens=True)
    checkpoint = first_part(tmp_path / "a", model=language_model(), dataset=data)
    made, _ = sized(tmp_path / "a", model=language_model(), dataset=data, max_steps=4)
    made.train(resume_from_checkpoint=checkpoint)
    whole, _ = sized(tmp_path / "b", model=language_model(), dataset=data, max_steps=4)
    whole.train()
    assert len(losses(made)) == len(losses(whole)) == 4
    assert losses(made)[2:] == pytest.approx(
        losses(whole)[2:], rel=1e-2
    )  # the first part scheduled the learning rate for two steps


def test_resumed_training_averages_over_micro_batches(tmp_path: Path, checkpoint: str) -> None:
    made, _ = sized(tmp_path, max_steps=4)
    made.train(resume_from_checkpoint=checkpoint)
    assert made.args.gradient_accumulation_steps == 4
    assert losses(made) == pytest.approx([0.69] * 4, abs=0.05)


def test_resuming_on_another_device_searches_again_with_the_same_effective_batch(
    tmp_path: Path, checkpoint: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    here = CheckpointState.of
    elsewhere = classmethod(lambda cls, *given: dataclasses.replace(here(*given), device="another GPU"))
    monkeypatch.setattr(CheckpointState, "of", elsewhere)
    made, callback = sized(tmp_path, max_steps=3, limit=8)
    words = resumed(made, checkpoint, caplog)
    assert callback.report is not None
    assert (made.args.per_device_train_batch_size, made.args.gradient_accumulation_steps) == (8, 8)
    assert "it was found on CPU, and this device is another GPU" in words


def test_effective_batch_that_differs_from_the_checkpoint_is_reported(
    tmp_path: Path, checkpoint: str, caplog: pytest.LogCaptureFixture
) -> None:
    made, callback = sized(tmp_path, requested=32, max_steps=3)
    words = resumed(made, checkpoint, caplog)
    assert callback.report is not None
    assert "its effective batch was 64, and 32 is requested now" in words


def test_callback_restored_from_the_checkpoint_continues(tmp_path: Path, checkpoint: str) -> None:
    made, _ = sized(tmp_path, max_steps=3, restore_callback_states_from_checkpoint=True)
    made.train(resume_from_checkpoint=checkpoint)
    assert made.state.global_step == 3
    assert [entry["step"] for entry in made.state.log_history if "memory_used_gib" in entry] == [1, 2, 3]


def test_checkpoint_without_the_callback_triggers_a_search(tmp_path: Path) -> None:
    plain = trainer(tmp_path, dataset=LONG, max_steps=1, save_strategy="steps", save_steps=1)
    plain.train()
    made, callback = sized(tmp_path, requested=8, max_steps=2)
    made.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert callback.report is not None


@pytest.mark.parametrize("restores", [False, True])
def test_checkpoint_of_a_training_without_the_callback_is_resumed_and_saved(tmp_path: Path, restores: bool) -> None:
    """It ran out of memory, so the callback was added: the first save raised KeyError."""
    steps = {"save_strategy": "steps", "save_steps": 1, "restore_callback_states_from_checkpoint": restores}
    plain = trainer(tmp_path, dataset=LONG, max_steps=1, **steps)
    plain.train()
    made, _ = sized(tmp_path, requested=8, max_steps=3, **steps)
    made.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert made.state.global_step == 3
    again, callback = sized(tmp_path, requested=8, max_steps=4, **steps)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert callback.report is None  # the size is in the checkpoint now
    assert again.state.global_step == 4


# ---- the scenarios of transformers' tests of auto_find_batch_size


def test_trainer_with_model_init_is_sized(tmp_path: Path) -> None:
    made = Trainer(
        model_init=lambda: classifier(),
        args=arguments(tmp_path, per_device_train_batch_size=64),
        train_dataset=LONG,
        data_collator=Pad(),
        callbacks=[BatchSizeCallback(**SMALL, batch_size=16)],
    )
    made.train()
    assert (made.args.per_device_train_batch_size, made.args.gradient_accumulation_steps) == (16, 4)
    assert made.state.global_step == 3


def test_training_twice_keeps_the_size_and_the_effective_batch(tmp_path: Path) -> None:
    made, callback = sized(tmp_path)
    for _ in range(2):
        made.train()
        assert (made.args.per_device_train_batch_size, made.args.gradient_accumulation_steps) == (16, 4)
        assert made.state.global_step == 3
    assert callback.report is not None and callback.report.plan.effective_batch == 64


def test_training_resumed_twice_saves_the_size_each_time(tmp_path: Path) -> None:
    first_part(tmp_path)
    for last in (3, 4):
        made, callback = sized(tmp_path, max_steps=last, save_strategy="steps", save_steps=1)
        made.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{last - 1}"))
        assert callback.report is None
        assert made.state.train_batch_size == 16
    state = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())
    kept = state["stateful_callbacks"]["BatchSizeCallback"]["attributes"]["remembered"]
    assert (kept["micro_batch"], kept["accumulation"]) == (16, 4)


def test_options_of_the_probes_are_accepted_and_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def record(trainer: Trainer, asked_for: Options) -> Any:
        asked.append((asked_for.device.probe_timeout, asked_for.device.expandable_segments))
        return report_of(trainer, asked_for)

    monkeypatch.setattr(callback_module, "report_of", record)
    made, callback = sized(tmp_path, options={"probe_timeout": 7.0, "expandable_segments": True})
    made.train()
    assert asked == [(7.0, True)]
    assert callback.report is not None and callback.report.expandable_segments


# ---- trainers that cannot be sized


def test_two_callbacks_on_one_trainer_are_rejected(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="2 BatchSizeCallbacks"):
        trainer(tmp_path, callbacks=[BatchSizeCallback(), BatchSizeCallback()])


def test_auto_find_batch_size_is_rejected_at_construction(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="leave out auto_find_batch_size"):
        trainer(tmp_path, callbacks=[BatchSizeCallback()], auto_find_batch_size=True)


def test_trainer_without_dataset_is_rejected(tmp_path: Path) -> None:
    made = Trainer(model=classifier(), args=arguments(tmp_path), callbacks=[BatchSizeCallback()])
    with pytest.raises(UsageError, match="no train_dataset"):
        made.train()


@pytest.mark.parametrize("name", ["is_deepspeed_enabled", "is_fsdp_enabled"])
def test_sharded_training_is_rejected_with_the_supported_strategies(tmp_path: Path, name: str) -> None:
    made = trainer(tmp_path)
    setattr(made, name, True)
    with pytest.raises(UsageError, match="DataParallel and DistributedDataParallel"):
        find_batch_size(made)


def test_hyperparameter_search_is_rejected(tmp_path: Path) -> None:
    """Each trial sets its own arguments on top of those that the previous sizing changed."""
    made, _ = sized(tmp_path)
    made.hp_search_backend = "optuna"
    with pytest.raises(UsageError, match=r"call find_batch_size\(trainer\) before it"):
        made.train()


def test_model_spread_over_devices_is_rejected(tmp_path: Path) -> None:
    model = classifier()
    made = trainer(tmp_path, model)
    model.hf_device_map = {"bert": 0, "classifier": "cpu"}
    with pytest.raises(UsageError, match="spread over several devices"):
        find_batch_size(made)
    model.hf_device_map = {"": "cpu"}
    assert find_batch_size(made, **SMALL).batch_size


def test_batch_rebalance_sampling_is_rejected(tmp_path: Path) -> None:
    made = trainer(tmp_path)
    made.args.train_sampling_strategy = "batch_rebalance"
    with pytest.raises(UsageError, match="group_by_length"):
        find_batch_size(made)


@pytest.mark.parametrize("name", ["torch_compile", "use_liger_kernel"])
def test_options_that_prevent_tracing_are_rejected(tmp_path: Path, name: str) -> None:
    made = trainer(tmp_path)
    setattr(made.args, name, True)
    with pytest.raises(UsageError, match=f"{name}=True cannot be traced"):
        find_batch_size(made)


def test_callback_added_after_construction_is_rejected(tmp_path: Path) -> None:
    made = trainer(tmp_path)
    made.add_callback(BatchSizeCallback())
    with pytest.raises(UsageError, match=r"give it to Trainer\(callbacks="):
        made.train()


def test_callback_outside_of_a_trainer_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="belongs into Trainer"):
        BatchSizeCallback().on_init_end(arguments(tmp_path), None, None)  # type: ignore[arg-type]


def test_options_that_the_trainer_decides_are_rejected(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="precision is an option for"):
        find_batch_size(trainer(tmp_path), precision="fp16")


@pytest.mark.parametrize("name", ["batch_size", "effective_batch_size", "max_length"])
def test_zero_is_rejected_at_construction(name: str) -> None:
    with pytest.raises(UsageError, match=f"{name} is at least 1, not 0"):
        BatchSizeCallback(**{name: 0})


def test_failed_search_runs_again_at_the_next_train(tmp_path: Path) -> None:
    made, callback = sized(tmp_path)
    whole = callback.options
    callback.options = dataclasses.replace(whole, device=dataclasses.replace(whole.device, memory="450MiB"))
    for _ in range(2):
        with pytest.raises(NothingFitsError):
            made.train()
    callback.options = whole
    made.train()
    assert made.args.per_device_train_batch_size == 16
    assert "get_train_dataloader" not in vars(made)


@pytest.mark.slow
def test_callback_shared_by_two_trainers_follows_the_one_that_trains(tmp_path: Path) -> None:
    callback = BatchSizeCallback(**SMALL, batch_size=16, recover=True)
    model = classifier()
    model.register_forward_pre_hook(_more_than_8, with_kwargs=True)
    first, second = (
        trainer(tmp_path, each, LONG, [callback], per_device_train_batch_size=64, max_steps=2)
        for each in (model, classifier())
    )
    first.train()
    assert callback.recovery is not None
    assert (first.state.global_step, callback.recovery.parts) == (2, 2)
    assert any("memory_used_gib" in entry for entry in first.state.log_history)
    assert not second.state.log_history
    second.train()
    assert any("memory_used_gib" in entry for entry in second.state.log_history)


def _more_than_8(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
    if len(kwargs["input_ids"]) > 8:
        raise torch.OutOfMemoryError("CUDA out of memory.")


def test_removed_callback_does_not_size_the_trainer(tmp_path: Path) -> None:
    made, callback = sized(tmp_path, max_steps=1)
    made.remove_callback(BatchSizeCallback)
    made.train()
    assert callback.report is None
    assert made.args.per_device_train_batch_size == 64


def test_nothing_is_set_if_nothing_fits(tmp_path: Path) -> None:
    made = trainer(tmp_path, dataset=LONG, per_device_train_batch_size=64)
    with pytest.raises(Exception, match="not even one sequence"):
        find_batch_size(made, device="predict", memory="450MiB")
    assert (made.args.per_device_train_batch_size, made._train_batch_size) == (64, 64)


def test_user_callback_sees_the_new_size_at_train_begin(tmp_path: Path) -> None:
    seen: list[int] = []

    class RecordsSize(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.append(state.train_batch_size)

    made = trainer(
        tmp_path,
        dataset=LONG,
        callbacks=[RecordsSize(), BatchSizeCallback(**SMALL, batch_size=8)],
        per_device_train_batch_size=16,
    )
    made.train()
    assert seen == [8]


@pytest.mark.slow
def test_long_tail_of_lengths_reduces_the_size(tmp_path: Path) -> None:
    """The first 64 examples alone would all fit at once."""
    data = Texts([8] * 64 + [128] * 8)
    wide = {"hidden_size": 128, "num_hidden_layers": 4, "intermediate_size": 512}
    memory = "560MiB"
    whole = report_of(
        trainer(tmp_path, classifier(**wide), data, per_device_train_batch_size=64),
        options(device="predict", memory=memory, multiple_of=1),
    )
    first = report_of(
        trainer(tmp_path, classifier(**wide), Texts(data.lengths[:64]), per_device_train_batch_size=64),
        options(device="predict", memory=memory, multiple_of=1),
    )
    assert first.plan.micro_batch == 64
    assert whole.plan.micro_batch < 64
