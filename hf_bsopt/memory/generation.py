"""Trace the last tokens of a generation, without the tokens before them.

The key-value cache grows with each token, so memory peaks at the end. A prompt extended by all but two of the new
tokens reaches the same cache after two steps. Only its first forward pass is longer than that of the real prompt, so
the prediction is exact or an upper bound.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import nn

from ..workloads.trainable import Trainable
from ..workloads.training_step import generation_step

TRACED_TOKENS = 2


def generate_last_tokens(model: nn.Module, workload: Trainable, batch_size: int) -> Any:
    """Generate the last tokens of ``workload``'s generation on traced tensors, and return the output."""
    batch = workload.batch(batch_size, "meta")
    traced = min(TRACED_TOKENS, workload.new_tokens)
    prompt, skipped = batch["input_ids"], workload.new_tokens - traced
    filler = torch.ones((batch_size, skipped), dtype=prompt.dtype, device=prompt.device)
    if model.config.is_encoder_decoder:  # type: ignore[union-attr]
        batch["decoder_input_ids"] = torch.cat([filler, filler.new_ones((batch_size, 1))], dim=1)
    else:
        batch["input_ids"] = torch.cat([prompt, filler], dim=1)
        if "attention_mask" in batch:
            batch["attention_mask"] = torch.cat([batch["attention_mask"], filler], dim=1)
    with _unfinished_for(traced):
        return generation_step(model, workload.settings.precision, batch, traced, "cuda")


@contextlib.contextmanager
def _unfinished_for(tokens: int) -> Iterator[None]:
    """Stop generation after ``tokens`` tokens: a traced tensor has no values that say whether sequences have ended."""
    from transformers.generation.utils import GenerationMixin

    answers = itertools.chain([True] * tokens, itertools.repeat(False))

    def has_unfinished_sequences(*_: Any, **__: Any) -> bool:
        return next(answers)

    with mock.patch.object(GenerationMixin, "_has_unfinished_sequences", has_unfinished_sequences):
        yield
