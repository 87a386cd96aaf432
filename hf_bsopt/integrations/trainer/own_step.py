"""The training step of a Trainer's subclass, run as it is on a copy of its model: its own ``compute_loss`` and all.

The methods of the subclass are called on a stand-in for the trainer: the same class with the same attributes, whose
model, whose other modules (a teacher, a reference model, a loss with parameters) and whose tensors are copies on the
device of the step. What the methods write (metrics, counters, logs) stays in the stand-in.
"""

from __future__ import annotations

import collections
import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import nn

from ...errors import REHEARSE, BatchSizeError, TraceError
from ...workloads.meta_device import META, fill_randomly, with_empty_tensors
from ...workloads.rebinding import Rebinder
from ...workloads.step_settings import Precision
from ...workloads.training_step import autocast_forward

if TYPE_CHECKING:
    from transformers import Trainer

METHODS = ("compute_loss", "training_step", "_prepare_inputs", "_prepare_input", "compute_loss_context_manager")
"""The methods of a step. A subclass that overrides none of them trains as Trainer does."""
NOT_SENT = (
    "accelerator", "train_dataset", "eval_dataset", "data_collator", "optimizer", "lr_scheduler", "callback_handler",
    "model_init", "compute_metrics", "preprocess_logits_for_metrics", "gather_function", "get_train_dataloader",
    "_memory_tracker", "_eval_dataloaders",
)  # fmt: skip
"""Attributes of Trainer that a step in another process does without."""
MAX_COPIED = 1000
"""A longer list or dict holds data, and is shared with the trainer."""
MAX_DEPTH = 4


@dataclass(frozen=True)
class OwnStep:
    """The step of ``trainer``, a stand-in whose model is ``module``; ``precision`` is that of the training."""

    trainer: Trainer
    module: nn.Module
    precision: Precision

    def __call__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        device_type: str,
    ) -> RunningStep:
        """Begin to train ``model``, a copy of ``module`` on the device of the step. Raises TraceError if it is not."""
        device = next(model.parameters()).device
        trainer, others = self._with(model, device, self.precision, device_type)
        vars(model)["forward"] = _prepared(model, self.precision, device_type)
        model.generate = _Refusal(name_of(trainer))  # type: ignore[assignment]
        trainer.accelerator = _accelerator(trainer, device, scaler)
        trainer.args = copy.copy(trainer.args)
        vars(trainer.args)["_setup_devices"] = device
        trainer.optimizer = optimizer
        return RunningStep(trainer, model, others)

    def portable(self, module: nn.Module) -> Self:
        """Return the same for ``module``, a copy without weights, without what another process has no use for."""
        trainer, _ = self._with(module, META, None, "cuda")
        for name in NOT_SENT:
            if name in vars(trainer):
                vars(trainer)[name] = None
        trainer.args = copy.copy(trainer.args)
        for name in ("distributed_state", "_setup_devices"):
            vars(trainer.args).pop(name, None)
        trainer.args.distributed_state = None
        return type(self)(trainer, module, self.precision)

    def _with(
        self, model: nn.Module, device: torch.device, precision: Precision | None, device_type: str
    ) -> tuple[Trainer, list[nn.Module]]:
        """Return a stand-in with ``model`` and copies of all other modules and tensors, and those modules."""
        copies = _pairs(self.module, model)
        others: list[nn.Module] = []

        def copy_of(value: Any) -> Any:
            if isinstance(value, nn.Module):
                made = with_empty_tensors(value, device, copies)
                if device != META:
                    fill_randomly(tensor for name, tensor in _tensors(made) if id(tensor) not in of_the_model)
                was_wrapped = "_original_forward" in vars(made)
                unwrap_forward(made)
                if was_wrapped and precision is not None:  # Accelerator.prepare_model, for another device perhaps
                    vars(made)["forward"] = _prepared(made, precision, device_type)
                others.append(made)
                return made
            if not value.dim() or value.device == device:
                return value
            with torch.no_grad():
                made = torch.zeros_like(value, device=device) if value.is_meta else value.detach().to(device)
            return made.requires_grad_(value.requires_grad)

        of_the_model = {id(tensor) for _, tensor in _tensors(model)}
        trainer = _isolated(self.trainer)
        rebind = Rebinder(copies, copy_of, {id(self.trainer): trainer})
        for name, value in vars(trainer).items():
            if name not in NOT_SENT and name != "args":
                vars(trainer)[name] = rebind(value)
        trainer.model = trainer.model_wrapped = model
        return trainer, others


class RunningStep:
    """The step of a stand-in; ``modules``: those that are on the device besides the model."""

    def __init__(self, trainer: Trainer, model: nn.Module, modules: Sequence[nn.Module]) -> None:
        self._trainer = trainer
        self._model = model
        self.modules = modules

    def count_items(self, batches: Sequence[Mapping[str, Any]]) -> Any:
        """Return what the trainer counts as labels in an optimizer step."""
        trainer = self._trainer
        return self._run("training", lambda: trainer._get_num_items_in_batch(list(batches), trainer.args.device))

    def forward_backward(self, batch: Mapping[str, Any], items: Any, accumulation: int) -> torch.Tensor:
        """Run the trainer's ``training_step``. Return the loss without its graph."""
        trainer = self._trainer
        trainer.args.gradient_accumulation_steps = trainer.current_gradient_accumulation_steps = accumulation
        loss: torch.Tensor = self._run("training", lambda: trainer.training_step(self._model, dict(batch), items))
        return loss

    def evaluate(self, batch: Mapping[str, Any]) -> Any:
        """Run the trainer's ``prediction_step``. Return what it keeps for the metrics."""
        trainer = self._trainer
        self._model.eval()
        loss_only = trainer.args.prediction_loss_only
        return self._run("evaluation", lambda: trainer.prediction_step(self._model, dict(batch), loss_only, None))

    def _run(self, phase: str, work: Callable[[], Any]) -> Any:
        if self._trainer.args.device != META:
            return work()
        try:
            return work()
        except BatchSizeError:
            raise
        except Exception as error:  # the user's code may raise anything
            way = REHEARSE if phase == "training" else "evaluation=False leaves it out"
            raise TraceError(
                f"the {phase} step of {name_of(self._trainer)} cannot be traced: {type(error).__name__}: {error}. {way}"
            ) from error


class _Refusal:
    """Takes the place of ``generate`` in a step that is traced: how long its answers are can't be known."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise TraceError(f"{self._name} generates in its training step, which cannot be traced. {REHEARSE}")


def own_methods_of(trainer: Trainer) -> list[str]:
    """Return the names of the methods of the step that are not those of Trainer."""
    from transformers import Trainer as Base

    kind = type(trainer)
    return [name for name in METHODS if name in vars(trainer) or getattr(kind, name) is not getattr(Base, name)]


def own_step_of(trainer: Trainer, precision: Precision) -> OwnStep | None:
    """Return the step of a trainer that has methods of its own for it, else None."""
    if not own_methods_of(trainer):
        return None
    return OwnStep(_isolated(trainer), trainer.model, precision)


def unwrap_forward(model: nn.Module) -> None:
    """Undo what Accelerator.prepare_model did to ``forward``."""
    original = vars(model).pop("_original_forward", None)
    if original is None:
        return
    del model.forward
    if getattr(original, "__func__", None) is not type(model).forward:  # replaced on the instance before it
        model.forward = original


def _prepared(model: nn.Module, precision: Precision, device_type: str) -> Any:
    """Return the forward as Accelerator.prepare_model puts it on the instance."""
    forward: Any = autocast_forward(model, precision, device_type)
    return model.forward if forward is model else forward


def _pairs(original: nn.Module, copied: nn.Module) -> dict[int, Any]:
    """Return what corresponds in a copy to each module and tensor of the original, by id."""
    before, after = [*original.modules()], [*copied.modules()]
    tensors = [*zip(_tensors(original), _tensors(copied), strict=False)]
    if [*map(type, before)] != [*map(type, after)] or any(a[0] != b[0] for a, b in tensors):
        raise TraceError(
            f"the training step of a Trainer's subclass is known for its own model only, not for another "
            f"{type(copied).__name__}"
        )
    pairs: dict[int, Any] = {id(a): b for a, b in zip(before, after, strict=True)}
    return pairs | {id(a): b for (_, a), (_, b) in tensors}


def _tensors(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [*module.named_parameters(), *module.named_buffers()]


def _isolated(trainer: Trainer) -> Trainer:
    """Return a trainer with the same attributes, whose containers and plain objects may be changed."""
    from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback

    made = object.__new__(type(trainer))
    copies: dict[int, Any] = {id(trainer): made}
    vars(made).update({name: _own_copy(value, copies, MAX_DEPTH) for name, value in vars(trainer).items()})
    vars(made).pop("get_train_dataloader", None)
    made.callback_handler = CallbackHandler([DefaultFlowCallback()], None, None, None, None)
    return made


def _own_copy(value: Any, copies: dict[int, Any], depth: int) -> Any:
    """Copy containers and objects of the trainer's own code; modules, tensors and data sets are shared."""
    if id(value) in copies:
        return copies[id(value)]
    kind = type(value)
    is_container = isinstance(value, (dict, list, set, collections.deque))
    package = kind.__module__.partition(".")[0]
    is_state = kind.__module__ == "transformers.trainer_callback"  # TrainerState, TrainerControl
    is_plain = (
        hasattr(value, "__dict__") and not isinstance(value, (nn.Module, torch.Tensor, type)) and not callable(value)
    )
    if not depth or not (is_container or (is_plain and (is_state or package not in SHARED))):
        return value
    if is_container and len(value) > MAX_COPIED:
        return value
    try:
        made = copies[id(value)] = copy.copy(value)
    except Exception:  # its own __copy__ may raise anything
        return value
    if isinstance(value, dict):
        for name, part in value.items():
            made[name] = _own_copy(part, copies, depth - 1)
    elif isinstance(value, list):
        made[:] = [_own_copy(part, copies, depth - 1) for part in value]
    elif is_plain and not is_container:
        for name, part in vars(value).items():
            vars(made)[name] = _own_copy(part, copies, depth - 1)
    return made


SHARED = frozenset({"builtins", "torch", "transformers", "accelerate", "datasets", "tokenizers", "numpy", "peft"})
"""Packages whose objects a step reads and does not write."""


def _accelerator(trainer: Trainer, device: torch.device, scaler: torch.amp.GradScaler) -> Any:
    """Return an accelerator that needs no other process: what it gathers is as large as what all ranks gather."""
    from accelerate import Accelerator

    given = trainer.accelerator or Accelerator(cpu=device.type == "cpu")

    def gathered(tensor: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(tensor, torch.Tensor):
            return torch.cat([tensor.reshape(1) if not tensor.dim() else tensor] * count) if count > 1 else tensor
        if isinstance(tensor, Mapping):
            return type(tensor)({name: gathered(part) for name, part in tensor.items()})  # type: ignore[call-arg]
        return type(tensor)(map(gathered, tensor)) if isinstance(tensor, (tuple, list)) else tensor

    def backward(self: Any, loss: torch.Tensor, **kwargs: Any) -> None:
        scaler.scale(loss).backward()

    def same(self: Any, tensor: Any, *args: Any, **kwargs: Any) -> Any:
        return tensor

    count = int(given.num_processes)
    methods = {
        "device": property(lambda self: device),
        "backward": backward,
        "gather": lambda self, tensor: gathered(tensor),
        "gather_for_metrics": lambda self, tensor, *args, **kwargs: gathered(tensor),
        "reduce": same,
        "pad_across_processes": same,
        "wait_for_everyone": lambda self: None,
    }
    kind = type(type(given).__name__, (type(given),), methods)
    made: Any = object.__new__(kind)
    vars(made).update(vars(given))
    return made


def name_of(trainer: Trainer) -> str:
    """Return the name of a trainer's class, with that of its package."""
    kind = type(trainer)
    package = kind.__module__.partition(".")[0]
    return kind.__name__ if package in ("__main__", "transformers") else f"{package}'s {kind.__name__}"
