"""What a rehearsal asks of transformers' Trainer: to stop early, to evaluate a little, to take another batch size."""

from __future__ import annotations

import inspect
import itertools
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from .._utils.import_hooks import after_import
from .no_side_effects import Nowhere

NOT_A_NUMBER = float("nan")
KEPT_IN_LOGS = ("epoch", "step", "learning_rate")


LARGEST_LENGTHENED = 2**30


class Unknown(dict[str, float]):
    """Metrics that nobody knows: whichever is asked for is no number."""

    def __missing__(self, name: str) -> float:
        return NOT_A_NUMBER


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
    """has_stopped: a Trainer did its steps and ended its training."""

    def __init__(self, steps: int, micro_batch: int, accumulation: int, on_train_begin: Callable[[], None]) -> None:
        self._steps = steps
        self._micro_batch = micro_batch
        self._accumulation = accumulation
        self._on_train_begin = on_train_begin
        self._trainer: weakref.ref[Any] | None = None
        self._seen: dict[str, int] | None = None
        self.has_stopped = False

    def install(self, nowhere: Nowhere) -> None:
        after_import({"transformers.trainer": lambda module: self._change(module, nowhere)})

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
            self._trainer = weakref.ref(trainer)

        trainer_class.__init__ = init

    def _set_batch(self, arguments: Any) -> None:
        if self._micro_batch and arguments is not None:
            arguments.per_device_train_batch_size = self._micro_batch
            arguments.gradient_accumulation_steps = self._accumulation
            arguments.auto_find_batch_size = False

    def seen(self) -> dict[str, int] | None:
        """micro_batch (that really ran), accumulation, processes and examples of the Trainer that was last made; None
        where the script made none.
        """
        trainer = None if self._trainer is None else self._trainer()
        if trainer is not None:
            arguments, data = trainer.args, trainer.train_dataset
            self._seen = {
                "micro_batch": trainer._train_batch_size // max(1, arguments.n_gpu),
                "accumulation": arguments.gradient_accumulation_steps,
                "processes": arguments.world_size,
                "examples": len(data) if hasattr(data, "__len__") else 0,
            }
        return self._seen

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
                return output._replace(
                    metrics=Unknown(_without_value(output.metrics or {})),
                    predictions=_lengthened(output.predictions, _examples(dataloader)),
                    label_ids=_lengthened(output.label_ids, _examples(dataloader)),
                )
            finally:
                trainer.compute_metrics = compute

        trainer_class.evaluation_loop = evaluation_loop


def _examples(dataloader: Any) -> int:
    try:
        return len(dataloader.dataset)
    except (AttributeError, TypeError):
        return 0


def _lengthened(values: Any, examples: int) -> Any:
    """Arrays as long as the whole dataset, for scripts that lay them beside it: zero, as what was run is too."""
    if isinstance(values, (tuple, list)):
        return type(values)(_lengthened(value, examples) for value in values)
    size = getattr(values, "nbytes", 0)
    if not size or len(values) >= examples or size // len(values) * examples > LARGEST_LENGTHENED:
        return values
    import numpy as np

    return np.zeros((examples, *values.shape[1:]), dtype=values.dtype)


def _without_value(metrics: Iterable[str]) -> dict[str, float]:
    """No numbers; but zero for what Trainer shows as hours and minutes, or in powers of two."""
    return {name: 0.0 if name.endswith(("runtime", "total_flos")) else NOT_A_NUMBER for name in metrics}


def _without_values(compute: Callable[..., Any]) -> Callable[..., dict[str, float]]:
    def named(*args: Any, **options: Any) -> dict[str, float]:
        try:
            metrics = compute(*args, **options)
        except Exception:  # the predictions are all zero, which a metric may not bear
            return {}
        return dict.fromkeys(metrics or {}, NOT_A_NUMBER)

    return named


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
        return output._replace(training_loss=NOT_A_NUMBER, metrics=_without_value(output.metrics))

    module.Trainer.log = log_nothing
    module.Trainer.train = train_for_nothing
    module.speed_metrics = lambda *args, **options: _without_value(speed_metrics(*args, **options))
