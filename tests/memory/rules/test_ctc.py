"""Claims about CTC's loss: `hf_bsopt.memory.rules.ctc`."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

from hf_bsopt import find_batch_size
from hf_bsopt.data import catalog
from hf_bsopt.memory.tracing.tracer import trace

TIME, CLASSES, LABELS = 200, 40, 30


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))


@pytest.mark.parametrize(("batch_size", "recorded"), [(8, 1_040_896), (64, 11_574_784)])
def test_ctc_needs_what_its_kernels_allocate(batch_size: int, recorded: int) -> None:
    """Recorded on the virtual GPU with torch 2.11.0+cu130: torch.cuda.max_memory_allocated over ctc_loss and its
    backward pass, without the inputs, cuDNN off.
    """

    def step(model: nn.Module, size: int) -> None:
        log_probs = torch.empty(TIME, size, CLASSES, device="meta", requires_grad=True)
        labels = torch.empty(size, LABELS, dtype=torch.int64, device="meta")
        lengths = torch.empty(size, dtype=torch.int64, device="meta")
        loss = torch.nn.functional.ctc_loss(log_probs, labels.masked_select(labels >= 0), lengths, lengths)
        loss.backward()

    timeline = trace(Scale, step, device=catalog.gpu("T4"))
    inputs = batch_size * (TIME * CLASSES * 4 + 2 * LABELS * 8 + LABELS + 8)
    assert timeline.live_bytes(batch_size) - inputs == pytest.approx(recorded, rel=0.005)


def test_a_speech_model_with_ctc_is_predicted() -> None:
    config = transformers.Wav2Vec2Config(
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=128,
        num_conv_pos_embedding_groups=4,
        vocab_size=40,
    )
    with torch.device("meta"):
        model = transformers.Wav2Vec2ForCTC(config)
    example = {"input_values": torch.zeros(2, 16_000), "labels": torch.ones(2, 16, dtype=torch.int64)}
    found = find_batch_size(model, example_batch=example, gpu="T4", device="predict", precision="fp16")
    assert found.batch_size > 8
