"""Change transformers' Trainer for a rehearsal: stop early, evaluate a few batches, train with another batch size."""

from __future__ import annotations

import inspect
import itertools
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from .._utils.import_hooks import after_import
from .no_side_effects import NoSideEffects

NOT_A_NUMBER = float("nan")
KEPT_IN_LOGS = ("epoch", "step", "learning_rate")
MAX_PADDED_BYTES = 2**30


class NanMetrics(dict[str, float]):
    """Metrics without values: every name gives NaN."""

    def __missing__(self, name: str) -> float:
        return NOT_A_NUMBER


class FirstBatches:
    """The first batches of a dataloader; everything else about it is unchanged."""

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
    """Hooks on Trainer. has_stopped: a Trainer did its steps and was stopped."""

    def __init__(self, steps: int, micro_batch: int, accumulation: int, on_train_begin: Callable[[], None]) -> None:
        self._steps = steps
        self._micro_batch = micro_batch
        self._accumulation = accumulation
        self._on_train_begin = on_train_begin
        self._trainer: weakref.ref[Any] | None = None
        self._last_batch: dict[str, int] | None = None
        self.has_stopped = False

    def install(self, no_side_effects: NoSideEffects) -> None:
        """Change Trainer as soon as it is imported."""
        after_import({"transformers.trainer": lambda module: self._change(module, no_side_effects)})

    def _change(self, module: Any, no_side_effects: NoSideEffects) -> None:
        trainer_class = module.Trainer
        no_side_effects.replace(
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

    def batch(self) -> dict[str, int] | None:
        """Return the micro_batch (that really ran), accumulation, processes and examples of the Trainer created last;
        None if the script created none.
        """
        trainer = None if self._trainer is None else self._trainer()
        if trainer is not None:
            arguments, data = trainer.args, trainer.train_dataset
            self._last_batch = {
                "micro_batch": trainer._train_batch_size // max(1, arguments.n_gpu),
                "accumulation": arguments.gradient_accumulation_steps,
                "processes": arguments.world_size,
                "examples": len(data) if hasattr(data, "__len__") else 0,
            }
        return self._last_batch

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
                    control.should_evaluate = args.eval_strategy == "steps"  # Trainer itself evaluates by epoch

        return StopAfterSteps()

    def _change_evaluation(self, trainer_class: Any) -> None:
        """Evaluate a few batches, enough to see if they fit; the metrics keep their names and lose their values."""
        original = trainer_class.evaluation_loop
        steps = self._steps

        def evaluation_loop(trainer: Any, dataloader: Any, *args: Any, **options: Any) -> Any:
            compute = trainer.compute_metrics
            if compute is not None:
                trainer.compute_metrics = _nan_compute_metrics(compute)
            try:
                output = original(trainer, FirstBatches(dataloader, steps), *args, **options)
                return output._replace(
                    metrics=NanMetrics(_nan_metrics(output.metrics or {})),
                    predictions=_padded(output.predictions, _examples(dataloader)),
                    label_ids=_padded(output.label_ids, _examples(dataloader)),
                )
            finally:
                trainer.compute_metrics = compute

        trainer_class.evaluation_loop = evaluation_loop


def _examples(dataloader: Any) -> int:
    try:
        return len(dataloader.dataset)
    except (AttributeError, TypeError):
        return 0


def _padded(values: Any, examples: int) -> Any:
    """Pad arrays with zeros to the length of the whole dataset, for scripts that compare them with it."""
    if isinstance(values, (tuple, list)):
        return type(values)(_padded(value, examples) for value in values)
    size = getattr(values, "nbytes", 0)
    if not size or len(values) >= examples or size // len(values) * examples > MAX_PADDED_BYTES:
        return values
    import numpy as np

    return np.zeros((examples, *values.shape[1:]), dtype=values.dtype)


def _nan_metrics(metrics: Iterable[str]) -> dict[str, float]:
    """Return NaN for each metric, but zero for durations and FLOPs, which Trainer formats as integers."""
    return {name: 0.0 if name.endswith(("runtime", "total_flos")) else NOT_A_NUMBER for name in metrics}


def _nan_compute_metrics(compute: Callable[..., Any]) -> Callable[..., dict[str, float]]:
    def compute_names(*args: Any, **options: Any) -> dict[str, float]:
        try:
            metrics = compute(*args, **options)
        except Exception:  # some metrics fail on predictions that are all zero
            return {}
        return dict.fromkeys(metrics or {}, NOT_A_NUMBER)

    return compute_names


def _change_results(module: Any) -> None:
    """Replace losses, metrics and speeds that a Trainer returns or logs by NaN; their names are kept."""
    log, train, speed_metrics = module.Trainer.log, module.Trainer.train, module.speed_metrics

    def log_nan(trainer: Any, logs: dict[str, Any], *args: Any, **options: Any) -> None:
        hidden = {
            name: NOT_A_NUMBER if isinstance(value, float) and name not in KEPT_IN_LOGS else value
            for name, value in logs.items()
        }
        log(trainer, hidden, *args, **options)

    def train_and_return_nan(trainer: Any, *args: Any, **options: Any) -> Any:
        output = train(trainer, *args, **options)
        return output._replace(training_loss=NOT_A_NUMBER, metrics=_nan_metrics(output.metrics))

    module.Trainer.log = log_nan
    module.Trainer.train = train_and_return_nan
    module.speed_metrics = lambda *args, **options: _nan_metrics(speed_metrics(*args, **options))
