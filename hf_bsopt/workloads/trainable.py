"""The interface of every workload: what a prediction, a probe or a report needs to know about it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from torch import nn

    from .step_settings import StepOverrides, StepSettings

Phase = Literal["training", "evaluation", "generation"]


class Trainable(Protocol):
    """A model and how it is trained, independent of where they come from.

    overrides: the parts of the training step that replace Trainer's. length: tokens per sequence. accumulation:
    micro-batches per optimizer step. new_tokens: tokens that a generation adds to each sequence, 0 for no generation.
    is_custom: True if the model's code is the user's, so that the growth of its memory with the batch size has to be
    verified. defaults: the choices that were made for the user, each with its reason.
    """

    @property
    def settings(self) -> StepSettings: ...
    @property
    def overrides(self) -> StepOverrides: ...
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

    def build(self) -> nn.Module:
        """Build the model, ready to train."""
        ...

    def batch(self, batch_size: int, device: str, *, padded: bool = True) -> dict[str, Any]:
        """Return a batch of full length. ``padded``: one sequence has a padding token, so that the mask is needed."""
        ...

    def accumulating(self, micro_batches: int) -> Trainable:
        """Return the same workload with this many micro-batches per optimizer step."""
        ...

    def replicated(self) -> Trainable:
        """Return the same workload as each of several processes runs it (DistributedDataParallel)."""
        ...

    def evaluating(self) -> Trainable:
        """Return the same workload with the batches of an evaluation."""
        ...

    def values(self) -> dict[str, Any]:
        """Return everything that determines memory use, as JSON values."""
        ...

    def describe(self) -> list[tuple[str, str]]:
        """Return (name, value) of everything that determines memory use."""
        ...

    def portable(self) -> Trainable:
        """Return the same workload without weights, for another process."""
        ...
