"""The training that a Trainer is about to do, as a workload: its own model, optimizer, loss, collator and data."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Self

from ...errors import UsageError
from ...workloads.module import ModuleWorkload, check_module
from ...workloads.step_settings import OwnParts, StepSettings
from .collator_shapes import Shape, is_in_one_row, is_tensor, made, moved, shapes_of, with_own_generators
from .step import (
    checkpoint_kwargs_of,
    clean_copy_on_meta,
    optimizer_of,
    own_loss_of,
    own_methods_of,
    precision_of,
    turn_on_checkpointing,
)
from .worst_case import WorstCase, worst_case

if TYPE_CHECKING:
    from torch import nn
    from transformers import Trainer

WELL_KNOWN = ("transformers.", "peft.")
"""Modules of models whose memory grows as it should; a container of torch's may hold anything."""
KEPT_DATALOADERS = "_eval_dataloaders"
TASKS = {
    "ForSequenceClassification": (),
    "ForMultipleChoice": (),
    "ForQuestionAnswering": None,
}
"""Labels of each example beside its tokens: one, or none by that name. All others have one for each token."""


@dataclass(frozen=True)
class TrainerWorkload(ModuleWorkload):
    """shapes: of what the collator makes. worst: the examples that it makes it of; None where the data can't be looked
    at beforehand, so that every sequence is as long as the model takes. evaluated: the same of an evaluation.
    """

    shapes: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)
    worst: WorstCase | None = field(default=None, repr=False, compare=False)
    evaluated: WorstCase | None = field(default=None, repr=False, compare=False)
    is_data_parallel: bool = False
    checkpoint_kwargs: Mapping[str, Any] | None = field(default=None, repr=False, compare=False)

    @property
    def is_custom(self) -> bool:
        """Sequences that are laid in one row, too: what attends to all of it can grow with its square."""
        return not type(self.module).__module__.startswith(WELL_KNOWN) or is_in_one_row(self.shapes)

    @property
    def evaluation_examples(self) -> int | None:
        return None if self.evaluated is None else self.evaluated.total

    def replicated(self) -> Self:
        """DataParallel replicates the model for each forward pass, without the buckets of DistributedDataParallel."""
        return self if self.is_data_parallel else super().replicated()

    def build(self) -> nn.Module:
        """A copy on ``meta`` that trains as Trainer will train it: without a wrapped forward of an earlier training."""
        model = clean_copy_on_meta(self.module)
        if self.checkpoint_kwargs is not None and not getattr(model, "is_activation_checkpointing", False):
            turn_on_checkpointing(model, self.checkpoint_kwargs)
        trained: nn.Module = model.train()
        return trained

    def batch(self, batch_size: int, device: str, *, padded: bool = True) -> dict[str, Any]:
        """Shapes where nothing is computed, else what the collator makes of the longest examples."""
        if device == "meta" or self.worst is None:
            shaped: dict[str, Any] = made(self.shapes, batch_size, device)
            return shaped
        batch: dict[str, Any] = moved(dict(self.worst.batch(batch_size, padded=padded)), device)
        return batch

    def evaluating(self) -> Self:
        if self.evaluated is None:
            return self
        return replace(self, worst=self.evaluated, shapes=shapes_of(self.evaluated.batch))

    def portable(self) -> Self:
        return replace(self, module=self.build(), example=made(self.shapes, 1, "meta"), evaluated=None)

    def describe(self) -> list[tuple[str, str]]:
        rows = [row for row in super().describe() if row[0] != "batch"]
        shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in self.example.items() if is_tensor(value))
        rows.insert(1, ("batch of 2", shapes))
        if self.checkpoint_kwargs is not None:
            rows.append(("checkpointing", "activations are recomputed in the backward pass"))
        return rows


def trainer_workload(trainer: Trainer, max_length: int | None = None) -> TrainerWorkload:
    """Reads everything from ``trainer``; changes nothing of it. Random numbers are drawn.

    ``max_length``: tokens of a sequence, for a dataset whose lengths can't be known. Raises UsageError for what can't
    be sized.
    """
    args = trainer.args
    check_module(trainer.model)
    notes = own_methods_of(trainer)
    worst, evaluated = None, None
    if _has_length(trainer.train_dataset):
        worst = _worst_of(trainer, trainer.get_train_dataloader)
        notes.append(worst.note)
        if worst.read < worst.total:
            notes.append("an example that is longer than all that were read can run out of memory later")
        evaluated = _worst_evaluation(trainer)
        shapes = shapes_of(worst.batch)
    else:
        _check_takes_tokens(trainer.model)
        length, why = _length(trainer, max_length)
        shapes = _shapes_of_tokens(trainer.model, length)
        notes.append(f"the dataset has no length: sized for sequences of {length} tokens, {why}")
    if args.n_gpu > 1:
        notes.append(
            f"{args.n_gpu} GPUs with DataParallel: the outputs of all are gathered on the first one, which is not "
            f"counted; accelerate launch --num_processes {args.n_gpu} trains faster and evenly"
        )
    optimizer, make_optimizer = optimizer_of(trainer)
    return TrainerWorkload(
        module=trainer.model,
        example=made(shapes, 2, "meta"),
        settings=StepSettings(precision_of(trainer), optimizer, float(args.max_grad_norm or 0)),
        defaults=tuple(notes),
        own=OwnParts(own_loss_of(trainer), make_optimizer),
        shapes=shapes,
        worst=worst,
        evaluated=evaluated,
        is_data_parallel=args.n_gpu > 1,
        checkpoint_kwargs=checkpoint_kwargs_of(args),
    )


def _has_length(dataset: Any) -> bool:
    from torch.utils.data import IterableDataset

    return not isinstance(dataset, IterableDataset) and hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")


def _worst_of(trainer: Trainer, make_dataloader: Callable[[], Any]) -> WorstCase:
    """By the dataloader that the trainer itself would make, whoever has overridden what of it. It is not kept."""
    dataloaders = trainer.accelerator._dataloaders  # prepare() adds to them; there is no public list
    before = len(dataloaders)
    loader = make_dataloader()
    del dataloaders[before:]
    return worst_case(loader.dataset, with_own_generators(loader.collate_fn))


def _worst_evaluation(trainer: Trainer) -> WorstCase | None:
    """Of several datasets, that with the longest examples; None where there is none whose lengths can be known."""
    given = trainer.eval_dataset
    datasets = [*given.values()] if isinstance(given, dict) else [given]
    known = [dataset for dataset in datasets if dataset is not None and _has_length(dataset) and len(dataset)]
    worst = []
    for dataset in known:
        with _without_kept_dataloaders(trainer):
            worst.append(_worst_of(trainer, functools.partial(trainer.get_eval_dataloader, dataset)))
    if not worst:
        return None
    return replace(max(worst, key=lambda case: case.length), total=max(case.total for case in worst))


@contextlib.contextmanager
def _without_kept_dataloaders(trainer: Trainer) -> Iterator[None]:
    """With persistent workers Trainer keeps those of evaluations, by a name that several datasets share."""
    kept = vars(trainer).pop(KEPT_DATALOADERS, None)
    try:
        yield
    finally:
        vars(trainer).pop(KEPT_DATALOADERS, None)
        if kept is not None:
            vars(trainer)[KEPT_DATALOADERS] = kept


def _check_takes_tokens(model: nn.Module) -> None:
    taken = inspect.signature(model.forward).parameters
    takes_any = "input_ids" in taken or any(one.kind is one.VAR_KEYWORD for one in taken.values())
    if not takes_any or getattr(model, "main_input_name", "input_ids") != "input_ids":
        raise UsageError(
            f"the train_dataset has no length, and {type(model).__name__} is given no input_ids, so that nothing says "
            f"what its batches look like: call find_batch_size with a Trainer on a part of the data that has a length"
        )


def _length(trainer: Trainer, asked: int | None) -> tuple[int, str]:
    from ...workloads.model_config import position_limit

    if asked is not None:
        return asked, "as max_length says"
    limit = getattr(trainer.processing_class, "model_max_length", None)
    if isinstance(limit, int) and limit < 1 << 30:  # transformers has 10^30 for "no limit"
        return limit, "the tokenizer's limit"
    config = getattr(trainer.model, "config", None)
    limit = position_limit(config) if config is not None else None
    if limit is None:
        raise UsageError(
            "the train_dataset has no length, and neither the tokenizer nor the model says how long a sequence can be: "
            "give max_length"
        )
    return limit, "the model's limit; max_length=… says otherwise"


def _shapes_of_tokens(model: Any, length: int) -> Mapping[str, Any]:
    import torch

    tokens = Shape((0, length), (1, 0), torch.int64)
    batch = {"input_ids": tokens, "attention_mask": tokens}
    task = next((task for task in TASKS if type(model).__name__.endswith(task)), "")
    if TASKS.get(task, "tokens") is None:
        batch |= dict.fromkeys(("start_positions", "end_positions"), Shape((0,), (1,), torch.int64))
    else:
        batch["labels"] = tokens if not task else Shape((0,), (1,), torch.int64)
    taken = inspect.signature(model.forward).parameters
    if any(one.kind is one.VAR_KEYWORD for one in taken.values()):
        return batch
    return {name: shape for name, shape in batch.items() if name in taken}
