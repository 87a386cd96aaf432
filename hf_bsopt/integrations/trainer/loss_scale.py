"""Tells whether a model's loss is a mean over its own micro-batch, whatever Trainer passes about the others.

Trainer passes ``num_items_in_batch``, the number of labels in an optimizer step, to every forward that takes keywords,
and then does not divide the loss by the accumulation. Heads that accept the keyword and ignore it (BERT's for sequence
and token classification among them) then get gradients that are too large by the number of micro-batches. Source:
https://github.com/huggingface/transformers/issues/47688. A search that introduces accumulation must not introduce that:
it makes Trainer divide, by ``model_accepts_loss_kwargs = False``.
"""

from __future__ import annotations

import dis
import functools
import inspect
import logging
from collections.abc import Callable, Mapping
from types import CodeType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from ...memory.replay.timeline import A100_LIKE
from ...memory.rules.cuda_dispatch import as_device
from ...memory.tracing.recorder import Recorder
from ...workloads.meta_device import META

if TYPE_CHECKING:
    from transformers import Trainer

logger = logging.getLogger(__name__)
ITEM_COUNT = "num_items_in_batch"


def is_mean_of_micro_batch(trainer: Trainer, model: nn.Module, batch: Mapping[str, Any]) -> bool:
    """Return whether the loss that ``trainer`` computes is a mean over the micro-batch. ``model`` is a copy of its
    model on ``meta``, and ``batch`` is an input for it.
    """
    if never_names_item_count(type(trainer).compute_loss):
        return True
    if trainer.compute_loss_func is not None:
        return never_names_item_count(trainer.compute_loss_func)
    return trainer.label_smoother is None and ignores_item_count(model, batch)


def is_divided(trainer: Trainer, items: Any) -> bool:
    """Return whether Trainer divides the loss of a micro-batch by their number. Source: Trainer.training_step."""
    is_scaled = getattr(trainer, "loss_is_scaled_for_ga", None)
    if is_scaled is not None:
        return not is_scaled
    return not ((trainer.model_accepts_loss_kwargs and items is not None) or trainer.compute_loss_func is not None)


def divide(trainer: Trainer) -> None:
    """Make Trainer divide the loss of a micro-batch by their number from here on."""
    trainer.model_accepts_loss_kwargs = False
    if trainer.compute_loss_func is None:
        return
    if hasattr(type(trainer), "loss_is_scaled_for_ga"):
        trainer.loss_is_scaled_for_ga = False
    else:
        logger.warning(
            "this release of transformers never divides the result of compute_loss_func: divide it there by "
            "num_items_in_batch, or gradients grow with the accumulation"
        )


def ignores_item_count(model: nn.Module, batch: Mapping[str, Any]) -> bool:
    """Run ``model``, which is on ``meta``, and return whether no operation reads the count. Return False if the model
    cannot be run so or does not take the keyword.
    """
    count = torch.ones((), dtype=torch.int64, device=META)
    reads = _ReadDetector(count)
    try:
        with as_device(A100_LIKE), META, reads:
            model(**batch, num_items_in_batch=count)
    except Exception:  # a model that lacks the keyword or cannot run on meta may raise anything
        return False
    return not reads.is_read


def never_names_item_count(function: Callable[..., Any]) -> bool:
    """Return whether the code of a ``compute_loss`` never names the count or the ``**kwargs`` that may hold it. The
    code of a subclass is not run to find out, since it may keep what it is given.
    """
    code = getattr(_python_function(function), "__code__", None)
    if code is None:
        return False
    names = _keywords(code) | {ITEM_COUNT}
    parts = [code]
    for part in parts:
        parts += [constant for constant in part.co_consts if isinstance(constant, CodeType)]
    read = {line.argval for part in parts for line in dis.get_instructions(part) if line.opname.startswith("LOAD_")}
    return not names & {name for entry in read for name in (entry if isinstance(entry, tuple) else (entry,))}


def _python_function(function: Any) -> Any:
    """Return the Python function behind a partial, a wrapper or a callable object."""
    while isinstance(function, functools.partial):
        function = function.func
    function = inspect.unwrap(function)
    if inspect.isroutine(function) or inspect.isclass(function):
        return function
    kind = type(function)
    return inspect.unwrap(kind.forward if isinstance(function, nn.Module) else kind.__call__)


def _keywords(code: CodeType) -> set[str]:
    """Return the name of ``**kwargs``, if there is one."""
    if not code.co_flags & inspect.CO_VARKEYWORDS:
        return set()
    index = code.co_argcount + code.co_kwonlyargcount + bool(code.co_flags & inspect.CO_VARARGS)
    return {code.co_varnames[index]}


class _ReadDetector(Recorder):
    """Follows a step like a prediction and records whether any operation reads ``tensor``."""

    def __init__(self, tensor: torch.Tensor) -> None:
        super().__init__(A100_LIKE)
        self._storage = tensor.untyped_storage()._cdata
        self.is_read = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for value in tree_leaves((args, kwargs or {})):
            if isinstance(value, torch.Tensor) and value.untyped_storage()._cdata == self._storage:
                self.is_read = True
        return super().__torch_dispatch__(func, types, args, kwargs)
