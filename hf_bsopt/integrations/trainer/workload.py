"""The training of a Trainer as a workload: its own model, optimizer, loss, collator and data."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Self

from ...errors import UsageError
from ...workloads.example_batch import forget_values, has_images
from ...workloads.module import ModuleWorkload, check_module
from ...workloads.step_settings import StepOverrides, StepSettings
from .collator_shapes import (
    TensorShape,
    build_batch,
    infer_shapes,
    is_in_one_row,
    is_tensor,
    move_batch,
    with_own_generators,
)
from .own_step import OwnStep, name_of, own_methods_of, own_step_of
from .step import (
    checkpoint_kwargs_of,
    clean_copy_on_meta,
    optimizer_of,
    own_loss_of,
    precision_of,
    turn_on_checkpointing,
)
from .worst_case import WorstCase, worst_case
from .yielded_examples import worst_of_batches, worst_of_stream

if TYPE_CHECKING:
    from torch import nn
    from transformers import Trainer

WELL_KNOWN = ("transformers.", "peft.")
"""Packages of models whose memory grows linearly; a torch container may hold anything."""
EVAL_DATALOADERS = "_eval_dataloaders"
TASKS = {
    "ForSequenceClassification": (),
    "ForMultipleChoice": (),
    "ForQuestionAnswering": None,
}
"""Labels per example: () is one, None is none by that name. All other tasks have one per token."""


@dataclass(frozen=True)
class TrainerWorkload(ModuleWorkload):
    """The training step of a Trainer.

    shapes: of the collator's batches. worst: the longest examples, from which batches are made; None if the dataset
    cannot be read in advance, so that every sequence is as long as the model accepts. evaluated: the same for the
    evaluation.
    """

    shapes: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)
    worst: WorstCase | None = field(default=None, repr=False, compare=False)
    evaluated: WorstCase | None = field(default=None, repr=False, compare=False)
    is_data_parallel: bool = False
    checkpoint_kwargs: Mapping[str, Any] | None = field(default=None, repr=False, compare=False)

    @property
    def is_custom(self) -> bool:
        """True if memory may not grow linearly. Batches with all sequences in one row count: attention over the whole
        row can grow with its square. So does a step of the trainer's own.
        """
        is_well_known = type(self.module).__module__.startswith(WELL_KNOWN)
        return self.overrides.begin_own_step is not None or not is_well_known or is_in_one_row(self.shapes)

    @property
    def evaluation_examples(self) -> int | None:
        return None if self.evaluated is None else self.evaluated.total

    def replicated(self) -> Self:
        """Return the workload unchanged for DataParallel, which has no buckets as DistributedDataParallel has."""
        return self if self.is_data_parallel else super().replicated()

    def build(self) -> nn.Module:
        """Return a copy on ``meta`` that trains as Trainer will train it, without the wrapped forward of an earlier
        training.
        """
        model = clean_copy_on_meta(self.module)
        if self.checkpoint_kwargs is not None and not getattr(model, "is_activation_checkpointing", False):
            turn_on_checkpointing(model, self.checkpoint_kwargs)
        trained: nn.Module = model.train()
        return trained

    def batch(self, batch_size: int, device: str, *, padded: bool = True) -> dict[str, Any]:
        """Return tensors of the right shapes on ``meta``, else the collated longest examples. These are needed on
        ``meta`` too by a model of images, which reads their number and sizes from the batch.
        """
        if self.worst is None or (device == "meta" and not has_images(self.shapes)):
            batch: dict[str, Any] = build_batch(self.shapes, batch_size, device)
        else:
            batch = move_batch(dict(self.worst.batch(batch_size, padded=padded)), device)
        forget_values(batch)
        return batch

    def evaluating(self) -> Self:
        if self.evaluated is None:
            return self
        return replace(self, worst=self.evaluated, shapes=infer_shapes(self.evaluated.batch))

    def portable(self) -> Self:
        module, own = self.build(), self.overrides.begin_own_step
        step = own.portable(module) if isinstance(own, OwnStep) else own
        overrides = replace(self.overrides, begin_own_step=step)
        example = build_batch(self.shapes, 1, "meta")
        return replace(self, module=module, example=example, evaluated=None, overrides=overrides)

    def describe(self) -> list[tuple[str, str]]:
        rows = [row for row in super().describe() if row[0] != "batch"]
        shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in self.example.items() if is_tensor(value))
        rows.insert(1, ("batch of 2", shapes))
        if self.checkpoint_kwargs is not None:
            rows.append(("checkpointing", "activations are recomputed in the backward pass"))
        return rows


def trainer_workload(trainer: Trainer, max_length: int | None = None) -> TrainerWorkload:
    """Read the workload from ``trainer``, which is not changed. Random numbers are drawn.

    ``max_length``: tokens per sequence, for a dataset whose lengths are unknown. Raises UsageError for a trainer that
    cannot be sized.
    """
    args = trainer.args
    check_module(trainer.model)
    notes = []
    own = own_methods_of(trainer)
    if own:
        are = "is traced as it is" if len(own) == 1 else "are traced as they are"
        notes.append(f"{' and '.join(own)} of {type(trainer).__name__} {are}")
    worst, evaluated = None, None
    if _has_length(trainer.train_dataset) or not _takes_tokens(trainer.model):
        worst = _worst_of(trainer, trainer.get_train_dataloader, trainer._train_batch_size)
        notes.append(worst.note)
        if worst.total is None or worst.read < worst.total:
            notes.append("an example longer than all that were read may run out of memory later")
        evaluated = _worst_evaluation(trainer)
        shapes = infer_shapes(worst.batch, name_of(trainer))
    else:
        length, source = _length(trainer, max_length)
        shapes = _shapes_of_tokens(trainer.model, length)
        notes.append(f"the dataset has no length: sized for sequences of {length} tokens, {source}")
    if args.n_gpu > 1:
        notes.append(
            f"{args.n_gpu} GPUs with DataParallel: the outputs of all are gathered on the first one, which is not "
            f"counted; accelerate launch --num_processes {args.n_gpu} trains faster and evenly"
        )
    optimizer, make_optimizer = optimizer_of(trainer)
    precision = precision_of(trainer)
    step = own_step_of(trainer, precision)
    return TrainerWorkload(
        module=trainer.model,
        example=build_batch(shapes, 2, "meta"),
        settings=StepSettings(precision, optimizer, float(args.max_grad_norm or 0)),
        defaults=tuple(notes),
        overrides=StepOverrides(own_loss_of(trainer) if step is None else None, make_optimizer, step),
        shapes=shapes,
        worst=worst,
        evaluated=evaluated,
        is_data_parallel=args.n_gpu > 1,
        checkpoint_kwargs=checkpoint_kwargs_of(args),
    )


def _has_length(dataset: Any) -> bool:
    from torch.utils.data import IterableDataset

    return not isinstance(dataset, IterableDataset) and hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")


def _worst_of(trainer: Trainer, make_dataloader: Callable[[], Any], batch_size: int | None = None) -> WorstCase:
    """Return the worst case of the dataloader that the trainer itself would make, overridden methods included. The
    dataloader is not kept. ``batch_size``: what a dataloader without a dataset has to yield.
    """
    dataloaders = trainer.accelerator._dataloaders  # prepare() appends to it; there is no public list
    before = len(dataloaders)
    loader = make_dataloader()
    del dataloaders[before:]
    dataset, collate = getattr(loader, "dataset", None), getattr(loader, "collate_fn", None)
    if dataset is None or collate is None:
        return worst_of_batches(make_dataloader, batch_size)
    return (worst_case if _has_length(dataset) else worst_of_stream)(dataset, with_own_generators(collate))


def _worst_evaluation(trainer: Trainer) -> WorstCase | None:
    """Return the worst case of the evaluation dataset with the longest examples, None if no lengths are known."""
    given = trainer.eval_dataset
    datasets = [*given.values()] if isinstance(given, dict) else [given]
    known = [dataset for dataset in datasets if dataset is not None and _has_length(dataset) and len(dataset)]
    worst = []
    for dataset in known:
        with _without_saved_dataloaders(trainer):
            worst.append(_worst_of(trainer, functools.partial(trainer.get_eval_dataloader, dataset)))
    if not worst:
        return None
    return replace(max(worst, key=lambda case: case.length), total=max(case.total or 0 for case in worst) or None)


@contextlib.contextmanager
def _without_saved_dataloaders(trainer: Trainer) -> Iterator[None]:
    """Hide the evaluation dataloaders that Trainer keeps with persistent workers, under a name that several datasets
    share.
    """
    saved = vars(trainer).pop(EVAL_DATALOADERS, None)
    try:
        yield
    finally:
        vars(trainer).pop(EVAL_DATALOADERS, None)
        if saved is not None:
            vars(trainer)[EVAL_DATALOADERS] = saved


def _takes_tokens(model: nn.Module) -> bool:
    """Return whether batches for the model can be made from a number of tokens alone."""
    taken = inspect.signature(model.forward).parameters
    takes_any = "input_ids" in taken or any(one.kind is one.VAR_KEYWORD for one in taken.values())
    return takes_any and getattr(model, "main_input_name", "input_ids") == "input_ids"


def _length(trainer: Trainer, requested: int | None) -> tuple[int, str]:
    from ...workloads.positions import position_limit

    if requested is not None:
        return requested, "from max_length"
    limit = getattr(trainer.processing_class, "model_max_length", None)
    if isinstance(limit, int) and limit < 1 << 30:  # transformers has 10^30 for "no limit"
        return limit, "the tokenizer's limit"
    config = getattr(trainer.model, "config", None)
    limit = position_limit(config) if config is not None else None
    if limit is None:
        raise UsageError(
            "the train_dataset has no length, and neither the tokenizer nor the model limits the sequence length: "
            "pass max_length"
        )
    return limit, "the model's limit; max_length=… changes it"


def _shapes_of_tokens(model: Any, length: int) -> Mapping[str, Any]:
    import torch

    tokens = TensorShape((0, length), (1, 0), torch.int64)
    batch = {"input_ids": tokens, "attention_mask": tokens}
    task = next((task for task in TASKS if type(model).__name__.endswith(task)), "")
    if TASKS.get(task, "tokens") is None:
        batch |= dict.fromkeys(("start_positions", "end_positions"), TensorShape((0,), (1,), torch.int64))
    else:
        batch["labels"] = tokens if not task else TensorShape((0,), (1,), torch.int64)
    taken = inspect.signature(model.forward).parameters
    if any(one.kind is one.VAR_KEYWORD for one in taken.values()):
        return batch
    return {name: shape for name, shape in batch.items() if name in taken}
