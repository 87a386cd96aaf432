"""A generation as its last token finds it, without tracing all the tokens before it.

The cache of keys and values grows with each token, so that most is held at the end. A prompt that already has all but
two of the tokens ends in the same place after two; only its first forward pass is longer than that of the real prompt,
so that the prediction is exact or an upper bound.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import nn

from ..workloads.training_step import generation_step
from ..workloads.workload import Trainable

TRACED_TOKENS = 2


def generation_at_its_end(model: nn.Module, workload: Trainable, batch_size: int) -> Any:
    """The last tokens of ``workload``'s generation, on traced tensors."""
    batch = workload.batch(batch_size, "meta")
    traced = min(TRACED_TOKENS, workload.new_tokens)
    tokens, said = batch["input_ids"], workload.new_tokens - traced
    more = torch.ones((batch_size, said), dtype=tokens.dtype, device=tokens.device)
    if model.config.is_encoder_decoder:  # type: ignore[union-attr]
        batch["decoder_input_ids"] = torch.cat([more, more.new_ones((batch_size, 1))], dim=1)
    else:
        batch["input_ids"] = torch.cat([tokens, more], dim=1)
        if "attention_mask" in batch:
            batch["attention_mask"] = torch.cat([batch["attention_mask"], more], dim=1)
    with _going_on_for(traced):
        return generation_step(model, workload.settings.precision, batch, traced, "cuda")


@contextlib.contextmanager
def _going_on_for(tokens: int) -> Iterator[None]:
    """Whether all sequences have ended can't be read from a traced tensor: it is said in advance."""
    from transformers.generation.utils import GenerationMixin

    answers = itertools.chain([True] * tokens, itertools.repeat(False))

    def has_unfinished_sequences(*_: Any, **__: Any) -> bool:
        return next(answers)

    with mock.patch.object(GenerationMixin, "_has_unfinished_sequences", has_unfinished_sequences):
        yield
