"""An optimizer step of a Trainer that ran out of memory, done again in smaller parts.

BatchSizeCallback(recover=True)

A backward pass that fails has left a part of the gradients behind, so that the whole step is begun again: gradients are
cleared, random numbers set back to where they were, and every micro-batch so far runs once more, in twice as many
parts. The loader goes on handing out what it did: effective batch, data order and ``global_step`` stay, and the smaller
parts are kept for the rest of the training. Parts of a micro-batch are worth what they hold: by labels where there is
one for each token, else by examples; where Trainer divides by the number of labels in the step, that is so already.
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
from ..preserve_state import RandomNumbers
from .loss_scale import divide, is_divided, is_mean_of_micro_batch
from .step import clean_copy_on_meta

if TYPE_CHECKING:
    import torch
    from transformers import Trainer

logger = logging.getLogger(__name__)
IGNORED_LABEL = -100
SHADOWED = ("training_step", "get_batch_samples")
DIVIDING = ("current_gradient_accumulation_steps", "model_accepts_loss_kwargs", "loss_is_scaled_for_ga")
"""What decides by how much Trainer divides a loss."""


class Recovery:
    """Of one training at a time. parts: in which every micro-batch is run now."""

    def __init__(self) -> None:
        self.parts = 1
        self._trainer: Trainer | None = None
        self._before: dict[str, Any] = {}
        self._samples: list[Any] = []
        self._at = 0
        self._begun_with: RandomNumbers | None = None
        self._means: bool | None = None

    def watch(self, trainer: Trainer) -> None:
        """Shadows two methods of this one instance, until :meth:`end`."""
        self.end()
        self._trainer = trainer
        self._before = {name: vars(trainer)[name] for name in SHADOWED if name in vars(trainer)}
        self._step, self._fetch = trainer.training_step, trainer.get_batch_samples
        vars(trainer).update(training_step=self._training_step, get_batch_samples=self._get_batch_samples)

    def end(self) -> None:
        if self._trainer is None:
            return
        for name in SHADOWED:
            vars(self._trainer).pop(name, None)
        vars(self._trainer).update(self._before)
        self._trainer, self._samples, self._begun_with = None, [], None

    def _get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        fetched = self._fetch(*args, **kwargs)
        self._samples, self._at = fetched[0], 0
        return fetched

    def _training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        if self._at == 0:
            self._begun_with = RandomNumbers.now()
        self._at += 1
        begin = self._at - 1  # of the micro-batches, the first that is still to be run
        while True:
            try:
                for batch in self._samples[begin : self._at - 1]:
                    self._in_parts(model, batch, num_items_in_batch)
                return self._in_parts(model, inputs, num_items_in_batch)
            except Exception as error:
                self._check(error, inputs)
            # only here: an error that is being handled holds the tensors of its frames
            begin = 0
            self._begin_again(model, inputs)

    def _check(self, error: Exception, inputs: Any) -> None:
        """Raises what can't be mended."""
        trainer = self._trainer
        assert trainer is not None
        if out_of_memory(error) is None:
            raise error
        if trainer.args.world_size > 1:
            raise RecoveryError(
                f"rank {trainer.args.process_index} ran out of memory in step {trainer.state.global_step + 1}; the "
                f"other ranks wait for it in a collective that it can't join any more, so that it can't be done again. "
                f"{_saved(trainer)} Begin again from there with a smaller per_device_train_batch_size and as much more "
                f"accumulation"
            ) from error
        if not _can_be_split(inputs):
            error.add_note("it can't be done again in parts: its tensors have different first dimensions")
            raise error
        if _batch_size(inputs) <= self.parts:
            error.add_note(
                "not even one sequence at a time fits: a shorter max_length, activation checkpointing or LoRA"
            )
            raise error

    def _begin_again(self, model: Any, inputs: Any) -> None:
        import torch

        trainer = self._trainer
        assert trainer is not None and self._begun_with is not None
        self.parts *= 2
        model.zero_grad()
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        self._begun_with.restore()
        size = _batch_size(inputs)
        logger.warning(
            "out of memory in step %d with %d sequences at once: it is done again with %d, and so are all that follow; "
            "the effective batch is the same",
            trainer.state.global_step + 1,
            -(-size // (self.parts // 2)),
            -(-size // self.parts),
        )

    def _in_parts(self, model: Any, inputs: Any, items: Any) -> torch.Tensor:
        """The loss of the micro-batch, as Trainer counts it."""
        trainer = self._trainer
        assert trainer is not None
        parts = _split(inputs, self.parts)
        if len(parts) == 1:
            loss: torch.Tensor = self._step(model, inputs, items)
            return loss
        shares = _shares(parts)
        steps = trainer.current_gradient_accumulation_steps
        before = {name: vars(trainer)[name] for name in DIVIDING if name in vars(trainer)}
        if not is_divided(trainer, items) and self._is_mean(inputs):
            divide(trainer)  # else it would add up the means of the parts as they are
            steps = 1
        losses = []
        try:
            for part, share in zip(parts, shares, strict=True):
                if not share:  # without a label there is no mean
                    continue
                trainer.current_gradient_accumulation_steps = steps / share
                losses.append(self._step(model, part, items))
        finally:
            for name in DIVIDING:
                vars(trainer).pop(name, None)
            vars(trainer).update(before)
        together: torch.Tensor = sum(losses[1:], start=losses[0])
        return together

    def _is_mean(self, inputs: Any) -> bool:
        """Looked at once, on a copy that has no memory."""
        if self._means is None:
            trainer = self._trainer
            assert trainer is not None
            shapes = {name: value.to("meta") if hasattr(value, "to") else value for name, value in inputs.items()}
            self._means = is_mean_of_micro_batch(trainer, clean_copy_on_meta(trainer.model).train(), shapes)
        return self._means


def _batch_size(inputs: Any) -> int:
    """Sequences in a micro-batch."""
    from accelerate.utils import find_batch_size

    return int(find_batch_size(inputs) or 1)


def _can_be_split(inputs: Any) -> bool:
    """Whether every tensor holds one thing for each sequence, or the same for all."""
    import torch
    from torch.utils._pytree import tree_leaves

    shared = (1, _batch_size(inputs))
    tensors = [leaf for leaf in tree_leaves(dict(inputs)) if isinstance(leaf, torch.Tensor)]
    return all(not tensor.dim() or tensor.size(0) in shared for tensor in tensors)


def _split(inputs: Any, count: int) -> list[Any]:
    """In at most ``count`` parts of nearly the same size."""
    size = _batch_size(inputs)
    count = min(count, size)
    edges = [size * index // count for index in range(count + 1)]
    return [_slice(inputs, size, slice(a, b)) for a, b in itertools.pairwise(edges)]


def _slice(value: Any, size: int, part: slice) -> Any:
    import torch

    if isinstance(value, Mapping):
        made: Callable[[Any], Any] = type(value)
        return made({name: _slice(one, size, part) for name, one in value.items()})
    if isinstance(value, torch.Tensor):
        return value[part] if value.dim() and value.size(0) == size else value
    return value[part] if isinstance(value, (list, tuple)) and len(value) == size else value


def _shares(parts: list[Any]) -> list[float]:
    """Of each part in the mean over them all."""
    import torch

    labels = [part.get("labels") for part in parts]
    if all(isinstance(one, torch.Tensor) and one.dim() > 1 for one in labels):
        counts = [int((one != IGNORED_LABEL).sum()) for one in labels]
    else:
        counts = [_batch_size(part) for part in parts]
    total = sum(counts)
    return [count / total if total else 1 / len(parts) for count in counts]


@contextlib.contextmanager
def _as_first_rank(model: Any) -> Iterator[None]:
    """Transformers 5.23 saves on the first rank alone, whatever it is told."""
    if not hasattr(model, "should_save_on_this_rank"):
        yield
        return
    vars(model)["should_save_on_this_rank"] = lambda is_main_process: True
    try:
        yield
    finally:
        del vars(model)["should_save_on_this_rank"]


def _saved(trainer: Trainer) -> str:
    """A sentence on the checkpoint that this rank has written by itself: every rank has the same weights, of before the
    step, and what Trainer's own saving does together can't be done any more.
    """
    import torch

    folder = Path(trainer.args.output_dir) / f"checkpoint-{trainer.state.global_step}"
    if (folder / "trainer_state.json").exists():
        return f"{folder} has the state of before."
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
    except Exception as error:  # whatever stands in the way of it, the want of memory is what is to be told
        return f"No checkpoint could be written ({error})."
    return f"The state of before is saved in {folder}."
