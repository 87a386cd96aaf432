"""Weighs the micro-batches of an optimizer step by what they hold, where the search introduced the accumulation.

The last step of an epoch is smaller: 6 examples are micro-batches of 4 and 2. Trainer averages the two losses evenly:
each of the last two examples counts twice. A step that was one batch before had the mean over its 6 examples.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .loss_scale import is_divided

if TYPE_CHECKING:
    import torch
    from transformers import Trainer

IGNORED_LABEL = -100
SHADOWED = ("training_step", "get_batch_samples")


class UnevenSteps:
    """Shadows two methods of one Trainer, from :meth:`begin` to :meth:`end`. Steps of even micro-batches, and losses
    that Trainer does not divide by the number of micro-batches, stay as they are.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._its = weakref.ref(trainer)
        self._before: dict[str, Any] = {}
        self._samples: Sequence[Any] = ()

    @classmethod
    def of(cls, trainer: Trainer) -> UnevenSteps | None:
        """Return the one that shadows the methods of this trainer now."""
        found = getattr(vars(trainer).get("training_step"), "__self__", None)
        return found if isinstance(found, UnevenSteps) else None

    def begin(self) -> None:
        own = vars(self._trainer)
        if UnevenSteps.of(self._trainer) is not None:
            return
        self._before = {name: own[name] for name in SHADOWED if name in own}
        own.update(training_step=self.training_step, get_batch_samples=self.get_batch_samples)

    def end(self) -> None:
        own = vars(self._trainer)
        for name in SHADOWED:
            if getattr(own.get(name), "__self__", None) is self:
                del own[name]
                own.update({name: self._before[name]} if name in self._before else {})
        self._samples = ()

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        fetched = self._original("get_batch_samples")(*args, **kwargs)
        self._samples = fetched[0]
        return fetched

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        trainer = self._trainer
        whole = getattr(trainer, "current_gradient_accumulation_steps", 1)
        weight = weight_in_step(self._samples, inputs)
        if weight is not None and is_divided(trainer, num_items_in_batch):
            trainer.current_gradient_accumulation_steps = 1 / weight
        try:
            loss: torch.Tensor = self._original("training_step")(model, inputs, num_items_in_batch)
        finally:
            trainer.current_gradient_accumulation_steps = whole
        return loss

    @property
    def _trainer(self) -> Trainer:
        trainer = self._its()
        assert trainer is not None  # it is the one whose attribute was called
        return trainer

    def _original(self, name: str) -> Any:
        return self._before.get(name) or getattr(type(self._trainer), name).__get__(self._trainer)

    def __deepcopy__(self, memo: dict[int, Any]) -> UnevenSteps:
        """Serve the copy of a trainer, which is in ``memo`` by now."""
        copied = UnevenSteps(memo.get(id(self._its()), self._its()))
        copied._before = self._before
        return copied


def weight_in_step(samples: Sequence[Any], inputs: Any) -> float | None:
    """Return the weight of a micro-batch in the mean over its step; None if all have the same, if it has none, or if it
    is not one of ``samples``.
    """
    index = next((index for index, sample in enumerate(samples) if sample is inputs), None)
    if index is None or len(samples) < 2:
        return None
    weights = weights_by_content(samples)
    return None if len(set(weights)) == 1 or not weights[index] else weights[index]


def weights_by_content(parts: Sequence[Any]) -> list[float]:
    """Return the weight of each part in the mean over all of them: its labels if there is one per token, else its
    examples.
    """
    import torch

    labels = [part.get("labels") if hasattr(part, "get") else None for part in parts]
    if all(isinstance(one, torch.Tensor) and one.dim() > 1 for one in labels):
        counts = [int((one != IGNORED_LABEL).sum()) for one in labels if one is not None]
    else:
        counts = [sequences(part) for part in parts]
    total = sum(counts)
    return [count / total if total else 1 / len(parts) for count in counts]


def sequences(inputs: Any) -> int:
    """Return the number of sequences in a micro-batch."""
    from accelerate.utils import find_batch_size

    return int(find_batch_size(inputs) or 1)
