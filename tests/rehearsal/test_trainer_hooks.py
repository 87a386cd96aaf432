"""Changes to Trainer, tested on a fake Trainer and module."""

from __future__ import annotations

import gc
import itertools
import math
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest

from hf_bsopt._utils.import_hooks import Action
from hf_bsopt.rehearsal import trainer_hooks
from hf_bsopt.rehearsal.no_side_effects import NoSideEffects
from hf_bsopt.rehearsal.trainer_hooks import FirstBatches, TrainerHooks


class Output(NamedTuple):
    metrics: dict[str, Any] | None
    training_loss: float = 1.0
    predictions: Any = None
    label_ids: Any = None


class Callbacks:
    def __init__(self) -> None:
        self.callbacks: list[Any] = []


class Arguments(SimpleNamespace):
    """Has the fields of TrainingArguments that set the batch."""


def arguments(micro_batch: int = 8, accumulation: int = 2, eval_strategy: str = "no") -> Arguments:
    return Arguments(
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=accumulation,
        world_size=2,
        eval_strategy=eval_strategy,
        auto_find_batch_size=True,
        n_gpu=1,
    )


class Tracker:
    """A callback of transformers.integrations."""


Tracker.__module__ = "transformers.integrations.integration_utils"


class Stopper:
    """A callback of the user."""


def fake_module() -> Any:
    """Return a module with a fake Trainer."""

    class Trainer:
        def __init__(self, model: Any = None, args: Any = None, compute_metrics: Any = None) -> None:
            self.args, self.compute_metrics = args or arguments(), compute_metrics
            self._train_batch_size = self.args.per_device_train_batch_size
            self.train_dataset = range(1000)
            self.callback_handler = Callbacks()
            self.callback_handler.callbacks = [Tracker(), Stopper()]
            self.logged: list[dict[str, Any]] = []
            self.seen_batches = 0

        def add_callback(self, callback: Any) -> None:
            self.callback_handler.callbacks.append(callback)

        def remove_callback(self, callback: Any) -> None:
            self.callback_handler.callbacks.remove(callback)

        def log(self, logs: dict[str, Any], start_time: float | None = None) -> None:
            self.logged.append(logs)

        def train(self, resume_from_checkpoint: bool = False) -> Output:
            return Output({"train_loss": 0.5, "train_runtime": 3.0}, 0.5)

        def evaluation_loop(self, dataloader: Any, description: str, metric_key_prefix: str = "eval") -> Output:
            batches = list(dataloader)
            self.seen_batches = len(batches)
            metrics = {"loss": 0.5, **(self.compute_metrics("predictions") if self.compute_metrics else {})}
            named = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
            return Output(named, predictions=np.ones((len(batches), 3)), label_ids=np.ones(len(batches), np.int64))

        def save_model(self, output_dir: str | None = None) -> None:
            raise AssertionError("this would have been saved")

        _save_checkpoint = save_model
        _load_best_model = save_model

    module = ModuleType("transformers.trainer")
    module.__dict__.update(Trainer=Trainer, speed_metrics=lambda split, start: {f"{split}_runtime": 3.0})
    return module


Changed = tuple[Any, TrainerHooks, NoSideEffects]


def changed(monkeypatch: pytest.MonkeyPatch, steps: int = 3, micro_batch: int = 0, accumulation: int = 0) -> Changed:
    actions: dict[str, Action] = {}
    monkeypatch.setattr(trainer_hooks, "after_import", actions.update)
    hooks, no_side_effects, module = (
        TrainerHooks(steps, micro_batch, accumulation, lambda: None),
        NoSideEffects(),
        fake_module(),
    )
    hooks.install(no_side_effects)
    actions["transformers.trainer"](module)
    return module, hooks, no_side_effects


def stopper_of(trainer: Any) -> Any:
    return trainer.callback_handler.callbacks[-1]


def steps_until_the_end(trainer: Any, first: int = 0) -> tuple[int, Any]:
    """Return (steps until the callback stops the training, the control object)."""
    state, control = (
        SimpleNamespace(global_step=first),
        SimpleNamespace(should_training_stop=False, should_evaluate=False),
    )
    stopper_of(trainer).on_train_begin(trainer.args, state, control)
    for done in itertools.count(1):
        state.global_step += 1
        stopper_of(trainer).on_step_end(trainer.args, state, control)
        if control.should_training_stop:
            return done, control
    raise AssertionError


def test_a_trainer_is_stopped_after_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    module, hooks, _ = changed(monkeypatch, steps=3)
    trainer = module.Trainer()
    assert not hooks.has_stopped
    assert steps_until_the_end(trainer)[0] == 3
    assert hooks.has_stopped


def test_a_resumed_trainer_does_the_same_number_of_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    module, _, _ = changed(monkeypatch, steps=2)
    assert steps_until_the_end(module.Trainer(), first=100)[0] == 2


@pytest.mark.parametrize(("strategy", "evaluates"), [("no", False), ("steps", True), ("epoch", False)])
def test_a_trainer_that_evaluates_by_steps_does_so_before_it_stops(
    monkeypatch: pytest.MonkeyPatch, strategy: str, evaluates: bool
) -> None:
    """Stopping ends the epoch, where Trainer itself evaluates by epoch."""
    module, _, _ = changed(monkeypatch)
    assert steps_until_the_end(module.Trainer(args=arguments(eval_strategy=strategy)))[1].should_evaluate is evaluates


def test_the_start_of_a_training_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    module, hooks, _ = changed(monkeypatch)
    begun: list[None] = []
    monkeypatch.setattr(hooks, "_on_train_begin", lambda: begun.append(None))
    steps_until_the_end(module.Trainer())
    assert begun == [None]


def test_the_batch_is_read_and_not_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    module, hooks, _ = changed(monkeypatch)
    assert hooks.batch() is None
    trainer = module.Trainer(args=arguments(8, 2))
    assert hooks.batch() == {"micro_batch": 8, "accumulation": 2, "processes": 2, "examples": 1000}
    assert trainer.args.auto_find_batch_size is True


def test_the_batch_that_really_ran_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """auto_find_batch_size reduces it during training."""
    module, hooks, _ = changed(monkeypatch)
    trainer = module.Trainer(args=arguments(8, 2))
    trainer._train_batch_size = 4
    batch = hooks.batch()
    assert batch is not None
    assert batch["micro_batch"] == 4
    del trainer
    gc.collect()
    assert hooks.batch() == batch


def test_a_stream_has_no_number_of_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    module, hooks, _ = changed(monkeypatch)
    trainer = module.Trainer()
    trainer.train_dataset = itertools.count()
    batch = hooks.batch()
    assert batch is not None
    assert batch["examples"] == 0


@pytest.mark.parametrize("positional", [True, False])
def test_another_batch_is_set_before_the_trainer_reads_it(monkeypatch: pytest.MonkeyPatch, positional: bool) -> None:
    module, hooks, _ = changed(monkeypatch, micro_batch=4, accumulation=4)
    trainer = module.Trainer("model", arguments(8, 2)) if positional else module.Trainer(args=arguments(8, 2))
    assert trainer._train_batch_size == 4
    batch = hooks.batch()
    assert batch is not None
    assert (batch["micro_batch"], batch["accumulation"]) == (4, 4)
    assert trainer.args.auto_find_batch_size is False


def test_a_subclass_is_changed_with_its_trainer(monkeypatch: pytest.MonkeyPatch) -> None:
    module, hooks, _ = changed(monkeypatch, micro_batch=4, accumulation=4)

    class Mine(module.Trainer):  # type: ignore[misc, name-defined]
        def __init__(self, extra: int, **options: Any) -> None:
            super().__init__(**options)
            self.extra = extra

    trainer = Mine(3, model="model", args=arguments(8, 2))
    assert (trainer.extra, trainer._train_batch_size) == (3, 4)
    assert hooks.batch() is not None


def test_trackers_are_removed_and_the_users_callbacks_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    module, _, _ = changed(monkeypatch)
    kinds = [type(callback).__name__ for callback in module.Trainer().callback_handler.callbacks]
    assert kinds == ["Stopper", "StopAfterSteps"]


def test_a_trainer_saves_and_loads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    module, _, no_side_effects = changed(monkeypatch)
    trainer = module.Trainer()
    trainer.save_model("folder")
    trainer._save_checkpoint("model", trial=None)
    trainer._load_best_model()
    assert trainer._determine_best_metric({"eval_loss": 1.0}, trial=None) is False
    assert no_side_effects.skipped == {"Trainer.save_model": 1, "Trainer._save_checkpoint": 1}


def test_logs_keep_their_names_and_their_position_in_training(monkeypatch: pytest.MonkeyPatch) -> None:
    module, _, _ = changed(monkeypatch)
    trainer = module.Trainer()
    logs = {"loss": 0.5, "grad_norm": 0.1, "learning_rate": 5e-5, "epoch": 0.25, "step": 3}
    trainer.log(logs, 0.0)
    (logged,) = trainer.logged
    assert list(logged) == list(logs)
    assert math.isnan(logged["loss"])
    assert math.isnan(logged["grad_norm"])
    assert (logged["learning_rate"], logged["epoch"], logged["step"]) == (5e-5, 0.25, 3)
    assert logs["loss"] == 0.5


def test_training_returns_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    module, _, _ = changed(monkeypatch)
    output = module.Trainer().train(resume_from_checkpoint=True)
    assert math.isnan(output.training_loss)
    assert list(output.metrics) == ["train_loss", "train_runtime"]
    assert math.isnan(output.metrics["train_loss"])
    assert output.metrics["train_runtime"] == module.speed_metrics("eval", 0.0)["eval_runtime"] == 0.0


def test_evaluation_runs_a_few_batches_and_keeps_the_names_of_its_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    module, _, _ = changed(monkeypatch, steps=3)
    trainer = module.Trainer(compute_metrics=lambda _: {"accuracy": 0.9})
    output = trainer.evaluation_loop(list(range(100)), "Evaluation", metric_key_prefix="test")
    assert trainer.seen_batches == 3
    assert list(output.metrics) == ["test_loss", "test_accuracy"]
    assert all(math.isnan(value) for value in output.metrics.values())
    assert math.isnan(output.metrics["test_whatever_a_script_asks_for"])
    assert trainer.compute_metrics("predictions") == {"accuracy": 0.9}


def test_predictions_are_padded_with_zeros_to_the_number_of_examples(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Loader(list[int]):
        dataset = range(100)

    module, _, _ = changed(monkeypatch, steps=3)
    output = module.Trainer().evaluation_loop(Loader([1, 2, 3, 4]), "Evaluation")
    assert output.predictions.shape == (100, 3)
    assert output.label_ids.shape == (100,)
    assert output.label_ids.dtype == np.int64
    assert not output.predictions.any()


def test_complete_predictions_are_not_padded(monkeypatch: pytest.MonkeyPatch) -> None:
    module, _, _ = changed(monkeypatch, steps=3)
    assert module.Trainer().evaluation_loop([1, 2], "Evaluation").predictions.shape == (2, 3)


def test_metrics_that_fail_on_zeros_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    module, _, _ = changed(monkeypatch)
    output = module.Trainer(compute_metrics=lambda _: {"accuracy": 1 / 0}).evaluation_loop([1], "Evaluation")
    assert list(output.metrics) == ["eval_loss"]


def test_first_batches_limits_the_batches_and_nothing_else() -> None:
    class Loader:
        batch_size = 8

        def __iter__(self) -> Iterator[int]:
            return iter(range(10))

        def __len__(self) -> int:
            return 10

    assert list(FirstBatches(Loader(), 3)) == [0, 1, 2]
    assert (len(FirstBatches(Loader(), 3)), len(FirstBatches(Loader(), 30))) == (3, 10)
    assert FirstBatches(Loader(), 3).batch_size == 8


def test_first_batches_of_a_stream_needs_no_length() -> None:
    stream = itertools.count()
    assert list(FirstBatches(stream, 3)) == [0, 1, 2]
    assert next(stream) == 3
    with pytest.raises(TypeError):
        len(FirstBatches(stream, 3))
