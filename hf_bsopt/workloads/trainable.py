"""The interface of every workload: what a prediction, a probe or a report needs to know about it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from torch import nn

    from .step_settings import OwnParts, StepSettings

Phase = Literal["training", "evaluation", "generation"]


class Trainable(Protocol):
    """What a prediction, a probe or a report needs to know of a workload.

    own: the parts of its step that are the user's. accumulation: micro-batches per optimizer step. new_tokens: how many
    a generation adds to each sequence. is_custom: the model's code is the user's, so that its growth with the batch has
    to be verified. defaults: what was chosen for the user, and why.
    """

    @property
    def settings(self) -> StepSettings: ...
    @property
    def own(self) -> OwnParts: ...
    @property
    def length(self) -> int: ...
    @property
    def accumulation(self) -> int: ...
    @property
    def new_tokens(self) -> int: ...
    @property
    def is_custom(self) -> bool: ...
    @property
    def defaults(self) -> tuple[str, ...]: ...
    @property
    def evaluation_examples(self) -> int | None:
        """Number of examples in the evaluation dataset, None if it is not known."""
        ...

    def build(self) -> nn.Module: ...
    def batch(self, batch_size: int, device: str, *, padded: bool = True) -> dict[str, Any]:
        """Return a batch of full length. ``padded``: one sequence has a padding token, so that the mask is needed."""
        ...

    def accumulating(self, micro_batches: int) -> Trainable: ...
    def replicated(self) -> Trainable:
        """Return the same on each of several processes (DistributedDataParallel)."""
        ...

    def evaluating(self) -> Trainable:
        """Return the same with the batches of an evaluation."""
        ...

    def values(self) -> dict[str, Any]:
        """Return everything that decides about memory, as JSON values."""
        ...

    def describe(self) -> list[tuple[str, str]]:
        """Return (name, value) of everything that decides about memory."""
        ...

    def portable(self) -> Trainable:
        """Return the same without weights, for another process."""
        ...
