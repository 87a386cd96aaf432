"""The training step of a Trainer (precision, optimizer, loss, checkpointing), and a copy of its model on ``meta``."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from ...errors import UsageError
from ...workloads.module import copy_on_meta, weights_precision
from ...workloads.optimizers import OPTIMIZER_ALIASES, OPTIMIZERS
from ...workloads.step_settings import Precision
from ...workloads.training_step import loss_of
from .own_step import unwrap_forward

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import Trainer, TrainingArguments

LIBRARIES = ("torch.", "transformers.", "peft.", "accelerate.", "bitsandbytes.")


def clean_copy_on_meta(module: nn.Module) -> Any:
    """Return a copy on ``meta`` without the wrapped forward of an earlier training and without the user's hooks."""
    from accelerate.hooks import remove_hook_from_submodules

    model: Any = copy_on_meta(module)
    unwrap_forward(model)
    remove_hook_from_submodules(model)  # accelerate's, which move tensors to the device of a device_map
    _remove_own_hooks(model)
    return model


def _remove_own_hooks(model: nn.Module) -> None:
    """Remove the user's hooks from a copy, so that they do not observe a search. Hooks that are part of the model, such
    as peft's for the gradients of its inputs, stay.
    """
    for module in model.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks):
            for number, hook in [*hooks.items()]:
                place = getattr(getattr(hook, "func", hook), "__module__", None) or ""
                if not place.startswith(LIBRARIES):
                    del hooks[number]


def precision_of(trainer: Trainer) -> Precision:
    """Return the precision that accelerate uses, which its launcher may set even if the arguments do not."""
    mixed = trainer.accelerator.mixed_precision
    if mixed in ("fp16", "bf16"):
        return cast("Precision", mixed)
    if mixed != "no":
        raise UsageError(f"mixed precision {mixed} is not supported; fp16 and bf16 are")
    return weights_precision(trainer.model)


def optimizer_of(trainer: Trainer) -> tuple[str, Callable[[nn.Module], torch.optim.Optimizer] | None]:
    """Return the optimizer's name, and a factory if it is not one of Trainer's that are predicted by name."""
    name = str(getattr(trainer.args.optim, "value", trainer.args.optim))
    if trainer.optimizer is None and trainer.optimizer_cls_and_kwargs is None:
        if OPTIMIZER_ALIASES.get(name, name) in OPTIMIZERS and not trainer.args.optim_args:
            return OPTIMIZER_ALIASES.get(name, name), None
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


def own_loss_of(trainer: Trainer) -> OwnLoss | None:
    """Return the loss of the trainer if the model does not compute it, else None."""
    if trainer.compute_loss_func is None and trainer.label_smoother is None:
        return None
    return OwnLoss(trainer.compute_loss_func, trainer.label_smoother, trainer._loss_shifts_labels)


@dataclass(frozen=True)
class OwnLoss:
    """The loss as in Trainer.compute_loss when it is not computed by the model."""

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


def checkpoint_kwargs_of(args: TrainingArguments) -> Mapping[str, Any] | None:
    """Return the arguments of activation checkpointing, None if it is off. Transformers 5.23 renamed both options."""
    is_on = getattr(args, "activation_checkpointing", None) or getattr(args, "gradient_checkpointing", None)
    if not is_on:
        return None
    kwargs = getattr(args, "activation_checkpointing_kwargs", None) or getattr(
        args, "gradient_checkpointing_kwargs", None
    )
    return dict(kwargs or {})


def turn_on_checkpointing(model: Any, kwargs: Mapping[str, Any]) -> None:
    """Turn on activation checkpointing as Trainer.train does."""
    enable = getattr(model, "activation_checkpointing_enable", None)
    if enable is not None:
        own = {name: value for name, value in kwargs.items() if name in ("every_n_layers", "offload")}
        passed = {name: value for name, value in kwargs.items() if name not in own}
        enable(activation_checkpointing_kwargs=passed or None, **own)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=dict(kwargs) or None)
