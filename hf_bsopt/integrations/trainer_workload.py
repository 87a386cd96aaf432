"""The training that a Trainer is about to do, as a workload: its own model, optimizer, loss, collator and data."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Self

from ..errors import TraceError, UsageError
from ..meta import on_meta
from ..module_workload import ModuleWorkload
from ..step_settings import ALIASES, OPTIMIZERS, OwnParts, Precision, StepSettings
from ..training_step import loss_of
from .worst_case import WorstCase, worst_case

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import Trainer, TrainingArguments

SIZES = (2, 3)
"""From batches of these the shapes of all others follow."""
VERIFIED_SIZE = 5
LIBRARIES = ("torch.", "transformers.", "peft.", "accelerate.", "bitsandbytes.")
TASKS = {
    "ForSequenceClassification": (),
    "ForMultipleChoice": (),
    "ForQuestionAnswering": None,
}
"""Labels of each example beside its tokens: one, or none by that name. All others have one for each token."""


@dataclass(frozen=True)
class Shape:
    """Of a tensor in a batch of n: ``fixed + each · n`` in every dimension."""

    fixed: tuple[int, ...]
    each: tuple[int, ...]
    dtype: torch.dtype

    def at(self, size: int, device: str) -> torch.Tensor:
        import torch

        sizes = tuple(fixed + each * size for fixed, each in zip(self.fixed, self.each, strict=True))
        return torch.zeros(sizes, dtype=self.dtype, device=device)


@dataclass(frozen=True)
class TrainerWorkload(ModuleWorkload):
    """shapes: of what the collator makes. worst: the examples that it makes it of; None where the data can't be looked
    at beforehand, so that every sequence is as long as the model takes. evaluated: the same of an evaluation.
    """

    shapes: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)
    worst: WorstCase | None = field(default=None, repr=False, compare=False)
    evaluated: WorstCase | None = field(default=None, repr=False, compare=False)
    checkpoint_kwargs: Mapping[str, Any] | None = field(default=None, repr=False, compare=False)

    @property
    def is_custom(self) -> bool:
        """Sequences that are laid in one row, too: what attends to all of it can grow with its square."""
        return not type(self.module).__module__.startswith(LIBRARIES) or _is_in_one_row(self.shapes)

    def build(self) -> nn.Module:
        """A copy on ``meta`` that trains as Trainer will train it: without a wrapped forward of an earlier training."""
        model = copy_on_meta(self.module)
        if self.checkpoint_kwargs is not None and not getattr(model, "is_activation_checkpointing", False):
            _checkpoint(model, self.checkpoint_kwargs)
        trained: nn.Module = model.train()
        return trained

    def batch(self, batch_size: int, device: str, *, padded: bool = True) -> dict[str, Any]:
        """Shapes where nothing is computed, else what the collator makes of the longest examples."""
        if device == "meta" or self.worst is None:
            made: dict[str, Any] = _made(self.shapes, batch_size, device)
            return made
        batch: dict[str, Any] = _moved(dict(self.worst.batch(batch_size, padded=padded)), device)
        return batch

    def evaluating(self) -> Self:
        if self.evaluated is None:
            return self
        return replace(self, worst=self.evaluated, shapes=shapes_of(self.evaluated.batch))

    def portable(self) -> Self:
        return replace(self, module=self.build(), example=_made(self.shapes, 1, "meta"), evaluated=None)

    def describe(self) -> list[tuple[str, str]]:
        rows = [row for row in super().describe() if row[0] != "batch"]
        shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in self.example.items() if _is_tensor(value))
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
    notes = _own_methods(trainer)
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
    optimizer, make_optimizer = _optimizer(trainer)
    return TrainerWorkload(
        module=trainer.model,
        example=_made(shapes, 2, "meta"),
        settings=StepSettings(_precision(trainer), optimizer, float(args.max_grad_norm or 0)),
        defaults=tuple(notes),
        own=OwnParts(_own_loss(trainer), make_optimizer),
        shapes=shapes,
        worst=worst,
        evaluated=evaluated,
        checkpoint_kwargs=_checkpoint_kwargs(args),
    )


# ---- data


def shapes_of(batch_of: Callable[[int], Any]) -> Mapping[str, Any]:
    """What the tensors of a batch of any size look like. Raises TraceError where their sizes are no line in it."""
    smaller, larger = (batch_of(size) for size in SIZES)
    if not isinstance(smaller, Mapping):
        raise UsageError(
            f"the data collator makes a {type(smaller).__name__}: Trainer takes a dict of forward's arguments"
        )
    shapes: Mapping[str, Any] = _line(smaller, larger)
    if _sizes(_made(shapes, VERIFIED_SIZE, "meta")) != _sizes(batch_of(VERIFIED_SIZE)):
        raise TraceError(
            f"what the data collator makes of {VERIFIED_SIZE} examples does not follow from what it makes of "
            f"{SIZES[0]} and {SIZES[1]}: its batches don't grow evenly with the batch size"
        )
    return shapes


def _line(smaller: Any, larger: Any) -> Any:
    if isinstance(smaller, Mapping):
        return {name: _line(smaller[name], larger[name]) for name in smaller}
    if not _is_tensor(smaller):
        return smaller
    each = tuple((b - a) // (SIZES[1] - SIZES[0]) for a, b in zip(smaller.shape, larger.shape, strict=True))
    fixed = tuple(a - e * SIZES[0] for a, e in zip(smaller.shape, each, strict=True))
    return Shape(fixed, each, smaller.dtype)


def _made(shapes: Any, size: int, device: str) -> Any:
    if isinstance(shapes, Mapping):
        return {name: _made(part, size, device) for name, part in shapes.items()}
    return shapes.at(size, device) if isinstance(shapes, Shape) else shapes


def _is_in_one_row(shapes: Any) -> bool:
    """Whether another dimension than the first grows with the batch."""
    if isinstance(shapes, Mapping):
        return any(_is_in_one_row(part) for part in shapes.values())
    return isinstance(shapes, Shape) and any(shapes.each[1:])


def _sizes(batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return {name: _sizes(part) for name, part in batch.items()}
    return tuple(batch.shape) if _is_tensor(batch) else None


def _moved(batch: Any, device: str) -> Any:
    if isinstance(batch, Mapping):
        return {name: _moved(part, device) for name, part in batch.items()}
    return batch.to(device) if _is_tensor(batch) else batch


def _is_tensor(value: object) -> bool:
    import torch

    return isinstance(value, torch.Tensor)


def _has_length(dataset: Any) -> bool:
    from torch.utils.data import IterableDataset

    return not isinstance(dataset, IterableDataset) and hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")


def _worst_of(trainer: Trainer, make_dataloader: Callable[[], Any]) -> WorstCase:
    """By the dataloader that the trainer itself would make, whoever has overridden what of it. It is not kept."""
    dataloaders = trainer.accelerator._dataloaders  # prepare() adds to them; there is no public list
    before = len(dataloaders)
    loader = make_dataloader()
    del dataloaders[before:]
    return worst_case(loader.dataset, loader.collate_fn)


def _worst_evaluation(trainer: Trainer) -> WorstCase | None:
    """Of several datasets, that with the longest examples; None where there is none whose lengths can be known."""
    given = trainer.eval_dataset
    datasets = [*given.values()] if isinstance(given, dict) else [given]
    known = [dataset for dataset in datasets if dataset is not None and _has_length(dataset) and len(dataset)]
    worst = [_worst_of(trainer, functools.partial(trainer.get_eval_dataloader, dataset)) for dataset in known]
    if not worst:
        return None
    return replace(max(worst, key=lambda case: case.length), total=max(case.total for case in worst))


def _check_takes_tokens(model: nn.Module) -> None:
    taken = inspect.signature(model.forward).parameters
    takes_any = "input_ids" in taken or any(one.kind is one.VAR_KEYWORD for one in taken.values())
    if not takes_any or getattr(model, "main_input_name", "input_ids") != "input_ids":
        raise UsageError(
            f"the train_dataset has no length, and {type(model).__name__} is given no input_ids, so that nothing says "
            f"what its batches look like: call find_batch_size with a Trainer on a part of the data that has a length"
        )


def _length(trainer: Trainer, asked: int | None) -> tuple[int, str]:
    from ..configurations import position_limit

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


# ---- the step


def copy_on_meta(module: nn.Module) -> Any:
    """Without the wrapped forward of an earlier training, and without what only looks at one."""
    try:
        model: Any = on_meta(module)
    except TypeError as error:  # pickle's and copy's own, for a lock, a file, a connection
        raise UsageError(
            f"{type(module).__name__} can't be copied: {error}; what the model holds beside its weights has to be left "
            f"out while it is sized"
        ) from error
    if "_original_forward" in vars(model):  # Accelerator.prepare_model
        del model._original_forward, model.forward
    _remove_own_hooks(model)
    return model


def _remove_own_hooks(model: nn.Module) -> None:
    """From a copy: what the user has hung on the modules, to look at a training, is not to see a search. Hooks that are
    a part of the model, such as peft's for the gradients of its inputs, stay.
    """
    for module in model.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks):
            for number, hook in [*hooks.items()]:
                place = getattr(getattr(hook, "func", hook), "__module__", None) or ""
                if not place.startswith(LIBRARIES):
                    del hooks[number]


def _precision(trainer: Trainer) -> Precision:
    import torch

    if trainer.args.fp16:
        return "fp16"
    if trainer.args.bf16:
        return "bf16"
    types = {parameter.dtype for parameter in trainer.model.parameters() if parameter.is_floating_point()}
    halves: dict[torch.dtype, Precision] = {torch.float16: "fp16-weights", torch.bfloat16: "bf16-weights"}
    return halves.get(types.pop(), "fp32") if len(types) == 1 else "fp32"


def _optimizer(trainer: Trainer) -> tuple[str, Callable[[nn.Module], torch.optim.Optimizer] | None]:
    """(name, how to make it where it is none of Trainer's that are known here)."""
    name = str(getattr(trainer.args.optim, "value", trainer.args.optim))
    if trainer.optimizer is None and trainer.optimizer_cls_and_kwargs is None:
        if ALIASES.get(name, name) in OPTIMIZERS and not trainer.args.optim_args:
            return ALIASES.get(name, name), None
        kind, kwargs = type(trainer).get_optimizer_cls_and_kwargs(trainer.args, trainer.model)
    elif trainer.optimizer_cls_and_kwargs is not None:
        kind, kwargs = trainer.optimizer_cls_and_kwargs
    else:
        given = getattr(trainer.optimizer, "optimizer", trainer.optimizer)  # accelerate's wrapper, after a training
        kind, known = type(given), inspect.signature(type(given)).parameters
        kwargs = {name: value for name, value in given.defaults.items() if name in known}
    return kind.__name__, OptimizerLike(kind, dict(kwargs))


@dataclass(frozen=True)
class OptimizerLike:
    """Makes an optimizer of this class, with these arguments, for another model."""

    kind: type[torch.optim.Optimizer]
    arguments: Mapping[str, Any]

    def __call__(self, model: nn.Module) -> torch.optim.Optimizer:
        return self.kind([p for p in model.parameters() if p.requires_grad], **self.arguments)


def _own_methods(trainer: Trainer) -> list[str]:
    """What of the step a subclass does in its own way, as far as it is not followed."""
    from transformers import Trainer as Base

    kind = type(trainer)
    own = [name for name in ("compute_loss", "training_step") if getattr(kind, name) is not getattr(Base, name)]
    if not own:
        return []
    return [
        f"{kind.__name__} has its own {' and '.join(own)}: what that does beside the model's forward and backward pass "
        f"is not counted; BatchSizeCallback(recover=True) survives it"
    ]


def _own_loss(trainer: Trainer) -> OwnLoss | None:
    if trainer.compute_loss_func is None and trainer.label_smoother is None:
        return None
    return OwnLoss(trainer.compute_loss_func, trainer.label_smoother, trainer._loss_shifts_labels)


@dataclass(frozen=True)
class OwnLoss:
    """As Trainer.compute_loss has it, where labels are not the model's affair."""

    function: Callable[..., Any] | None
    smoother: Callable[..., Any] | None
    shifts_labels: bool

    def __call__(self, forward: Callable[..., Any], batch: dict[str, Any], items: Any) -> torch.Tensor:
        labels = batch.pop("labels", None)
        outputs = forward(**batch)
        loss: torch.Tensor
        if self.function is not None:
            loss = self.function(outputs, labels, num_items_in_batch=items)
        elif labels is not None and self.smoother is not None:
            loss = self.smoother(outputs, labels, shift_labels=self.shifts_labels)
        else:
            loss = loss_of(outputs)
        return loss


def _checkpoint_kwargs(args: TrainingArguments) -> Mapping[str, Any] | None:
    """Of activation checkpointing, where it is asked for. Transformers 5.23 gave both arguments new names."""
    asked = getattr(args, "activation_checkpointing", None) or getattr(args, "gradient_checkpointing", None)
    if not asked:
        return None
    kwargs = getattr(args, "activation_checkpointing_kwargs", None) or getattr(
        args, "gradient_checkpointing_kwargs", None
    )
    return dict(kwargs or {})


def _checkpoint(model: Any, kwargs: Mapping[str, Any]) -> None:
    """As Trainer.train does."""
    enable = getattr(model, "activation_checkpointing_enable", None)
    if enable is not None:
        own = {name: value for name, value in kwargs.items() if name in ("every_n_layers", "offload")}
        passed = {name: value for name, value in kwargs.items() if name not in own}
        enable(activation_checkpointing_kwargs=passed or None, **own)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=dict(kwargs) or None)
