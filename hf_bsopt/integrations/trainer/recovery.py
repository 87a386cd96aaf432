"""Repeats an optimizer step of a Trainer that ran out of memory, in smaller parts.

BatchSizeCallback(recover=True)

A failed backward pass leaves some of the gradients behind, so the whole step is repeated: gradients are cleared, random
generators reset to the start of the step, and every micro-batch so far runs again, in twice as many parts. The
dataloader continues as it was: effective batch size, data order and ``global_step`` stay the same, and the smaller
parts are kept for the rest of the training. The loss of each part is weighted by its labels if there is one per token,
else by its examples; if Trainer divides by the number of labels in the step, the weights are right already.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import RecoveryError
from ...probing.oom import out_of_memory
from ..preserve_state import RandomState
from .loss_scale import divide, is_divided, is_mean_of_micro_batch
from .step import clean_copy_on_meta
from .uneven_steps import SHADOWED, UnevenSteps, sequences, weight_in_step, weights_by_content

if TYPE_CHECKING:
    import torch
    from transformers import Trainer

logger = logging.getLogger(__name__)
LOSS_DIVISORS = ("current_gradient_accumulation_steps", "model_accepts_loss_kwargs", "loss_is_scaled_for_ga")
"""Attributes that decide by how much Trainer divides a loss."""


class Recovery:
    """Recovers one training at a time. parts: the number of parts that every micro-batch is run in now."""

    def __init__(self) -> None:
        self.parts = 1
        self._trainer: Trainer | None = None
        self._before: dict[str, Any] = {}
        self._samples: list[Any] = []
        self._at = 0
        self._random_state: RandomState | None = None
        self._loss_is_mean: bool | None = None

    def watch(self, trainer: Trainer) -> None:
        """Shadow two methods of this one instance, until :meth:`end`."""
        self.end()
        self._trainer = trainer
        self._before = {name: vars(trainer)[name] for name in SHADOWED if name in vars(trainer)}
        self._step, self._fetch = trainer.training_step, trainer.get_batch_samples
        self._weighs_uneven_steps = UnevenSteps.of(trainer) is not None
        vars(trainer).update(training_step=self._training_step, get_batch_samples=self._get_batch_samples)

    def end(self) -> None:
        if self._trainer is None:
            return
        for name in SHADOWED:
            vars(self._trainer).pop(name, None)
        vars(self._trainer).update(self._before)
        self._trainer, self._samples, self._random_state = None, [], None

    def _get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        fetched = self._fetch(*args, **kwargs)
        self._samples, self._at = fetched[0], 0
        return fetched

    def _training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        if self._at == 0:
            self._random_state = RandomState.capture()
        self._at += 1
        begin = self._at - 1  # index of the first micro-batch that is still to be run
        while True:
            try:
                for batch in self._samples[begin : self._at - 1]:
                    self._run_in_parts(model, batch, num_items_in_batch)
                return self._run_in_parts(model, inputs, num_items_in_batch)
            except Exception as error:
                self._raise_unless_repeatable(error, inputs)
            # not in the except block: there the error still holds the tensors of its frames
            begin = 0
            self._restart_step(model, inputs)

    def _raise_unless_repeatable(self, error: Exception, inputs: Any) -> None:
        """Raise if the step cannot be repeated."""
        trainer = self._trainer
        assert trainer is not None
        if out_of_memory(error) is None:
            raise error
        if trainer.args.world_size > 1:
            raise RecoveryError(
                f"rank {trainer.args.process_index} ran out of memory in step {trainer.state.global_step + 1}; the "
                f"other ranks wait in a collective that it can no longer join, so the step cannot be repeated. "
                f"{_save_checkpoint(trainer)} Resume from there with a smaller per_device_train_batch_size and more "
                f"gradient_accumulation_steps to match"
            ) from error
        if not _can_be_split(inputs):
            error.add_note("the batch cannot be split into parts: its tensors have different first dimensions")
            raise error
        if sequences(inputs) <= self.parts:
            error.add_note(
                "not even one sequence at a time fits: use a shorter max_length, activation checkpointing or LoRA"
            )
            raise error

    def _restart_step(self, model: Any, inputs: Any) -> None:
        import torch

        trainer = self._trainer
        assert trainer is not None and self._random_state is not None
        self.parts *= 2
        model.zero_grad()
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        self._random_state.restore()
        size = sequences(inputs)
        logger.warning(
            "out of memory in step %d with micro-batches of %d sequences: repeating it and continuing with %d; "
            "the effective batch size is unchanged",
            trainer.state.global_step + 1,
            -(-size // (self.parts // 2)),
            -(-size // self.parts),
        )

    def _run_in_parts(self, model: Any, inputs: Any, items: Any) -> torch.Tensor:
        """Return the loss of the micro-batch, as Trainer counts it."""
        trainer = self._trainer
        assert trainer is not None
        parts = _split(inputs, self.parts)
        if len(parts) == 1:
            loss: torch.Tensor = self._step(model, inputs, items)
            return loss
        weights = weights_by_content(parts)
        steps = trainer.current_gradient_accumulation_steps
        weight_of_all = weight_in_step(self._samples, inputs) if self._weighs_uneven_steps else None
        if weight_of_all is not None:
            steps = 1 / weight_of_all
        before = {name: vars(trainer)[name] for name in LOSS_DIVISORS if name in vars(trainer)}
        if not is_divided(trainer, items) and self._is_mean(inputs):
            divide(trainer)  # else Trainer would add up the means of the parts
            steps = 1
        losses = []
        try:
            for part, weight in zip(parts, weights, strict=True):
                if not weight:  # a part without labels has no mean
                    continue
                trainer.current_gradient_accumulation_steps = steps / weight
                losses.append(self._step(model, part, items))
        finally:
            for name in LOSS_DIVISORS:
                vars(trainer).pop(name, None)
            vars(trainer).update(before)
        total: torch.Tensor = sum(losses[1:], start=losses[0])
        return total

    def _is_mean(self, inputs: Any) -> bool:
        """Return whether the loss is a mean over the micro-batch; determined once, on a copy on meta."""
        if self._loss_is_mean is None:
            trainer = self._trainer
            assert trainer is not None
            shapes = {name: value.to("meta") if hasattr(value, "to") else value for name, value in inputs.items()}
            self._loss_is_mean = is_mean_of_micro_batch(trainer, clean_copy_on_meta(trainer.model).train(), shapes)
        return self._loss_is_mean


def _can_be_split(inputs: Any) -> bool:
    """Return whether every tensor holds one entry per sequence, or one for all."""
    import torch
    from torch.utils._pytree import tree_leaves

    shared = (1, sequences(inputs))
    tensors = [leaf for leaf in tree_leaves(dict(inputs)) if isinstance(leaf, torch.Tensor)]
    return all(not tensor.dim() or tensor.size(0) in shared for tensor in tensors)


def _split(inputs: Any, count: int) -> list[Any]:
    """Split into at most ``count`` parts of nearly the same size."""
    size = sequences(inputs)
    count = min(count, size)
    edges = [size * index // count for index in range(count + 1)]
    return [_slice(inputs, size, slice(a, b)) for a, b in itertools.pairwise(edges)]


def _slice(value: Any, size: int, part: slice) -> Any:
    import torch

    if isinstance(value, Mapping):
        made: Callable[[Any], Any] = type(value)
        return made({name: _slice(item, size, part) for name, item in value.items()})
    if isinstance(value, torch.Tensor):
        return value[part] if value.dim() and value.size(0) == size else value
    return value[part] if isinstance(value, (list, tuple)) and len(value) == size else value


@contextlib.contextmanager
def _as_first_rank(model: Any) -> Iterator[None]:
    """Make the model save on this rank; transformers 5.23 saves only on the first rank, whatever its arguments say."""
    if not hasattr(model, "should_save_on_this_rank"):
        yield
        return
    vars(model)["should_save_on_this_rank"] = lambda is_main_process: True
    try:
        yield
    finally:
        del vars(model)["should_save_on_this_rank"]


def _save_checkpoint(trainer: Trainer) -> str:
    """Save a checkpoint from this rank alone and return a sentence that names it. Every rank has the same weights,
    those before the step, and Trainer's own saving needs collectives that no longer work.
    """
    import torch

    folder = Path(trainer.args.output_dir) / f"checkpoint-{trainer.state.global_step}"
    if (folder / "trainer_state.json").exists():
        return f"{folder} has the state before the step."
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _as_first_rank(trainer.model):
            if hasattr(trainer.model, "save_pretrained"):
                trainer.model.save_pretrained(folder)
            else:
                torch.save(trainer.model.state_dict(), folder / "pytorch_model.bin")
        torch.save(trainer.optimizer.state_dict(), folder / "optimizer.pt")
        torch.save(trainer.lr_scheduler.state_dict(), folder / "scheduler.pt")
        trainer._save_rng_state(str(folder))
        trainer.state.save_to_json(str(folder / "trainer_state.json"))
    except Exception as error:  # whatever prevented it, the out-of-memory error is the one to report
        return f"No checkpoint could be written ({error})."
    return f"The state before the step is saved in {folder}."
