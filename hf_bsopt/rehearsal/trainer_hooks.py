"""What a rehearsal asks of transformers' Trainer: to stop early, to evaluate a little, to take another batch size."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator
from typing import Any

from .imports import after_import
from .nowhere import Nowhere

NOT_A_NUMBER = float("nan")
KEPT_IN_LOGS = ("epoch", "step", "learning_rate")


class FirstBatches:
    """The first batches of a dataloader, everything else of it unchanged."""

    def __init__(self, dataloader: Any, count: int) -> None:
        self._dataloader = dataloader
        self._count = count

    def __iter__(self) -> Iterator[Any]:
        return itertools.islice(iter(self._dataloader), self._count)

    def __len__(self) -> int:
        return min(self._count, len(self._dataloader))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._dataloader, name)


class TrainerHooks:
    """seen: micro_batch, accumulation, processes and n_gpu of the Trainer that was last made."""

    def __init__(self, steps: int, micro_batch: int, accumulation: int, on_train_begin: Callable[[], None]) -> None:
        self._steps = steps
        self._micro_batch = micro_batch
        self._accumulation = accumulation
        self._on_train_begin = on_train_begin
        self.seen: dict[str, int] | None = None
        self.has_stopped = False

    def install(self, nowhere: Nowhere) -> None:
        after_import(
            {
                "transformers.trainer": lambda module: self._change(module, nowhere),
                "accelerate.utils.operations": _leave_unpadded,
            }
        )

    def _change(self, module: Any, nowhere: Nowhere) -> None:
        trainer_class = module.Trainer
        nowhere.replace(
            trainer_class,
            "save_model",
            "_save_checkpoint",
            "save_state",
            "save_metrics",
            "create_model_card",
            "push_to_hub",
            "_push_from_checkpoint",
            "init_hf_repo",
        )
        trainer_class._load_best_model = lambda trainer: None
        trainer_class._determine_best_metric = lambda trainer, metrics, trial: False
        self._change_init(trainer_class)
        self._change_evaluation(trainer_class)
        _change_results(module)

    def _change_init(self, trainer_class: Any) -> None:
        original = trainer_class.__init__
        signature = inspect.signature(original)

        def init(trainer: Any, *args: Any, **options: Any) -> None:
            self._set_batch(signature.bind_partial(trainer, *args, **options).arguments.get("args"))
            original(trainer, *args, **options)
            for callback in list(trainer.callback_handler.callbacks):
                if type(callback).__module__.startswith("transformers.integrations"):
                    trainer.remove_callback(callback)
            trainer.add_callback(self._stopper())
            self._see(trainer.args)

        trainer_class.__init__ = init

    def _set_batch(self, arguments: Any) -> None:
        if self._micro_batch and arguments is not None:
            arguments.per_device_train_batch_size = self._micro_batch
            arguments.gradient_accumulation_steps = self._accumulation

    def _see(self, arguments: Any) -> None:
        self.seen = {
            "micro_batch": arguments.per_device_train_batch_size,
            "accumulation": arguments.gradient_accumulation_steps,
            "processes": arguments.world_size,
        }

    def _stopper(self) -> Any:
        from transformers import TrainerCallback

        hooks = self

        class StopAfterSteps(TrainerCallback):  # type: ignore[misc]
            def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                self.first = state.global_step
                hooks._on_train_begin()

            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                if state.global_step - self.first >= hooks._steps:
                    hooks.has_stopped = True
                    control.should_training_stop = True
                    control.should_evaluate = args.eval_strategy == "steps"  # at the end of the epoch it does so itself

        return StopAfterSteps()

    def _change_evaluation(self, trainer_class: Any) -> None:
        """A few batches are enough to see whether they fit; the metrics keep their names and lose their values."""
        original = trainer_class.evaluation_loop
        steps = self._steps

        def evaluation_loop(trainer: Any, dataloader: Any, *args: Any, **options: Any) -> Any:
            compute = trainer.compute_metrics
            if compute is not None:
                trainer.compute_metrics = _without_values(compute)
            try:
                output = original(trainer, FirstBatches(dataloader, steps), *args, **options)
                return output._replace(metrics=dict.fromkeys(output.metrics or {}, NOT_A_NUMBER))
            finally:
                trainer.compute_metrics = compute

        trainer_class.evaluation_loop = evaluation_loop


def _without_values(compute: Callable[..., Any]) -> Callable[..., dict[str, float]]:
    def named(*args: Any, **options: Any) -> dict[str, float]:
        try:
            metrics = compute(*args, **options)
        except Exception:  # the predictions are all zero, which a metric may not bear
            return {}
        return dict.fromkeys(metrics or {}, NOT_A_NUMBER)

    return named


def _leave_unpadded(operations: Any) -> None:
    """The lengths in other processes come from the device, where they are zero; alone there is nothing to pad."""
    original = operations.pad_across_processes

    def pad_across_processes(tensor: Any, *args: Any, **options: Any) -> Any:
        alone = operations.PartialState().num_processes == 1
        return tensor if alone else original(tensor, *args, **options)

    operations.pad_across_processes = pad_across_processes


def _change_results(module: Any) -> None:
    """Losses, metrics and speeds keep their names and are no numbers, where a Trainer returns or logs them."""
    log, train, speed_metrics = module.Trainer.log, module.Trainer.train, module.speed_metrics

    def log_nothing(trainer: Any, logs: dict[str, Any], *args: Any, **options: Any) -> None:
        told = {
            name: NOT_A_NUMBER if isinstance(value, float) and name not in KEPT_IN_LOGS else value
            for name, value in logs.items()
        }
        log(trainer, told, *args, **options)

    def train_for_nothing(trainer: Any, *args: Any, **options: Any) -> Any:
        output = train(trainer, *args, **options)
        return output._replace(training_loss=NOT_A_NUMBER, metrics=dict.fromkeys(output.metrics, NOT_A_NUMBER))

    module.Trainer.log = log_nothing
    module.Trainer.train = train_for_nothing
    module.speed_metrics = lambda *args, **options: dict.fromkeys(speed_metrics(*args, **options), NOT_A_NUMBER)
