"""Claims about mixtures of experts: `hf_bsopt.memory.rules.experts`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hf_bsopt.data import catalog
from hf_bsopt.memory.predictor import Predictor
from hf_bsopt.memory.rules.experts import grouped_product
from hf_bsopt.workloads.workload import describe

pytest.importorskip("transformers.integrations.moe")

# Recorded by rehearsing Trainer on the virtual GPU, three steps of 4 sequences of 512 tokens with adamw_torch_fused
# (torch 2.11.0+cu130, transformers 5.23.0): gpu, precision, allocated bytes
RECORDED = [
    ("T4", "fp32", 1_528_950_784),
    ("T4", "fp16", 1_482_741_248),
    ("T4", "bf16-weights", 1_024_246_784),
    ("A100-40GB", "fp32", 1_528_950_784),
    ("A100-40GB", "bf16", 1_482_739_712),
    ("A100-40GB", "bf16-weights", 872_588_288),
]


@pytest.mark.parametrize(("gpu", "precision", "allocated"), RECORDED)
def test_a_mixture_of_experts_is_predicted_in_every_precision_and_on_older_gpus(
    gpu: str, precision: str, allocated: int, tmp_path: Path
) -> None:
    from transformers import OlmoeConfig

    OlmoeConfig(
        hidden_size=512,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=8,
        num_experts=16,
        num_experts_per_tok=4,
        vocab_size=5000,
        max_position_embeddings=1024,
        eos_token_id=None,
    ).save_pretrained(tmp_path)
    workload = describe(str(tmp_path), precision=precision, max_length=512)
    peak = Predictor(workload, catalog.gpu(gpu), torch_version="2.11.0")(4).peak
    assert peak is not None
    assert peak.allocated_bytes == pytest.approx(allocated, rel=0.001)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_grouped_product_has_the_shape_of_the_real_one_with_rows_that_start_on_16_bytes(dtype: torch.dtype) -> None:
    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    offs = torch.empty(3, dtype=torch.int32, device="meta")
    alignment = 16 // dtype.itemsize
    rows = grouped_product(empty(10, 8), empty(3, 8, 5), offs)
    assert (tuple(rows.shape), rows.stride(0) % alignment) == ((10, 5), 0)
    assert grouped_product(empty(8, 10), empty(10, 5), offs).shape == (3, 8, 5)
    assert grouped_product(empty(3, 4, 8), empty(3, 8, 5)).shape == (3, 4, 5)
    assert grouped_product(empty(3, 4, 8), empty(8, 5), offs).shape == (4, 5)
    with pytest.raises(RuntimeError, match="one dtype"):
        grouped_product(empty(10, 8), empty(3, 8, 5).double(), offs)
