"""Tests of `hf_bsopt.memory.rules.kernels`, compared with the real allocator.

Unless a test says otherwise, its values come from the allocator's history with torch 2.11.0+cu130 on virtual GPUs of
compute capability 7.5 (T4, 40 multiprocessors), 8.0 (A100, 108) and 9.0 (H100, 132).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hf_bsopt.data import catalog
from hf_bsopt.memory import Timeline, trace
from hf_bsopt.records import GpuSpec

T4, A100, H100 = catalog.gpu("T4"), catalog.gpu("A100-80GB"), catalog.gpu("H100-80GB")
HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32


def traced(step: Callable[[int], object], gpu: GpuSpec = A100) -> Timeline:
    return trace(nn.Module, lambda model, batch_size: step(batch_size), device=gpu)


def sizes_of(timeline: Timeline, origin: str, batch_size: int, gpu: GpuSpec = A100) -> list[int]:
    """Return the bytes of each allocation of the operation in one of the three steps, outputs included, in order."""
    made = zip(timeline.sizes(batch_size, gpu).tolist(), timeline.origins, strict=True)
    sizes = [size for size, name in made if size and name == origin]
    assert sizes[: len(sizes) // 3] * 3 == sizes
    return sizes[: len(sizes) // 3]


# ---- embeddings


def embedding(rows: int, width: int, gpu: GpuSpec, dtype: torch.dtype = SINGLE) -> Timeline:
    """Trace an embedding with its backward; the batch size is the number of indices."""

    def step(batch_size: int) -> None:
        weight = torch.empty(rows, width, dtype=dtype, requires_grad=True)
        out = F.embedding(torch.empty(batch_size, dtype=torch.int64), weight)
        out.backward(torch.empty_like(out))

    return traced(step, gpu)


BACKWARD = "aten.embedding_dense_backward.default"


@pytest.mark.parametrize("gpu", [T4, A100], ids=["T4", "A100"])
@pytest.mark.parametrize(
    ("indices", "rows", "width", "offsets", "sums"),
    [
        (4096, 28996, 768, 36040, 13839360),
        (3073, 28996, 768, 27040, 10383360),
        (8192, 128256, 2048, 72088, 73818112),
        (131072, 30522, 64, 349032, 11169024),
    ],
)
def test_more_than_3072_indices_are_sorted_and_summed_by_segments(
    gpu: GpuSpec, indices: int, rows: int, width: int, offsets: int, sums: int
) -> None:
    sizes = sizes_of(embedding(rows, width, gpu), BACKWARD, indices, gpu)
    assert sizes.count(4 * rows * width) == 1  # the gradient itself
    assert sizes[-2:] == [offsets, sums]
    assert sizes.count(8 * indices) >= 5


@pytest.mark.parametrize(
    ("gpu", "indices", "temporary"), [(T4, 4096, 84479), (T4, 8192, 151039), (A100, 131072, 2149887)]
)
def test_the_temporary_storage_of_the_sort_is_within_one_percent(gpu: GpuSpec, indices: int, temporary: int) -> None:
    """CUB's own sizes depend on the GPU, so the formula is fitted."""
    sizes = sizes_of(embedding(30522, 64, gpu), BACKWARD, indices, gpu)
    assert sizes[3] == pytest.approx(temporary, rel=0.01)


@pytest.mark.parametrize("length", [700, 1024, 1030])
def test_the_scan_of_indices_is_predicted_at_any_length(length: int) -> None:
    """Without a formula, an embedding of more than 614 tokens per sequence would be refused as not linear."""

    def step(model: nn.Module, batch_size: int) -> None:
        model(torch.zeros(batch_size, length, dtype=torch.int64)).sum().backward()
        model.zero_grad()

    assert trace(lambda: nn.Embedding(5000, 64), step).peak(8).allocated_bytes > 0


def test_up_to_3072_indices_allocate_only_the_gradient() -> None:
    assert sizes_of(embedding(28996, 768, A100), BACKWARD, 3072) == [4 * 28996 * 768]


@pytest.mark.parametrize(
    ("gpu", "indices", "rows", "dtype", "recorded"),
    [(T4, 5000, 2, SINGLE, [4016, 4016]), (H100, 40000, 512, HALF, [36096, 36096, 1572864])],
)
def test_a_table_with_few_rows_has_no_partial_sums(
    gpu: GpuSpec, indices: int, rows: int, dtype: torch.dtype, recorded: list[int]
) -> None:
    """BERT's token types: 2 rows. Observed for rows · ⌈width / 1,024⌉ under 4 · multiprocessors and indices / 32."""
    assert sizes_of(embedding(rows, 768, gpu, dtype), BACKWARD, indices, gpu)[-len(recorded) :] == recorded


def test_indices_that_are_not_contiguous_are_copied() -> None:
    def step(batch_size: int) -> None:
        positions = torch.arange(512).expand(batch_size, -1)
        F.embedding(positions, torch.empty(512, 8))

    assert sizes_of(traced(step), "aten.embedding.default", 6) == [6 * 512 * 8, 6 * 512 * 8 * 4]


# ---- norms, indexing, softmax


def test_foreach_norm_has_a_partial_result_for_each_chunk_of_the_largest_tensor() -> None:
    """BERT-base with 28,996 tokens: 199 tensors, the largest of 28,996 × 768."""

    def step(batch_size: int) -> None:
        torch._foreach_norm([torch.empty(28996 * 768), *(torch.empty(768) for _ in range(198))], 2)

    assert sizes_of(traced(step), "aten._foreach_norm.Scalar", 1) == [270640, *[4] * 199]


def test_foreach_norm_rounds_the_number_of_chunks_up() -> None:
    def step(batch_size: int) -> None:
        torch._foreach_norm([torch.empty(n, dtype=HALF) for n in (65536, 65537, 10)], 2)

    assert sizes_of(traced(step), "aten._foreach_norm.Scalar", 1) == [24, 2, 2, 2]


def test_index_tensors_with_different_strides_are_made_contiguous() -> None:
    def step(batch_size: int) -> None:
        x, columns = torch.empty(4, 500, 8), torch.empty(4, 250, dtype=torch.int64)
        x[torch.empty(4, 1, dtype=torch.int64), columns]

    assert sizes_of(traced(step), "aten.index.Tensor", 1) == [8000, 32000]


@pytest.mark.parametrize(("dtype", "recorded"), [(SINGLE, [256000, 256000]), (HALF, [128000, 256000])])
def test_the_backward_of_softmax_holds_the_product_of_gradient_and_output(
    dtype: torch.dtype, recorded: list[int]
) -> None:
    def step(batch_size: int) -> None:
        x = torch.empty(batch_size, 1000, dtype=dtype, requires_grad=True)
        out = x.softmax(-1, dtype=SINGLE)
        out.backward(torch.empty_like(out))

    assert sizes_of(traced(step), "aten._softmax_backward_data.default", 64) == recorded


# ---- 4-bit weights


def test_a_product_with_a_4_bit_weight_dequantizes_it_for_the_call() -> None:
    pytest.importorskip("bitsandbytes")
    from transformers import LlamaConfig, LlamaForCausalLM

    from hf_bsopt.workloads.bnb_4bit import quantized

    def build() -> Any:
        config = LlamaConfig(
            hidden_size=256, intermediate_size=1024, num_hidden_layers=1, num_attention_heads=4, vocab_size=64
        )
        model = quantized(LlamaForCausalLM(config).to(BRAIN), BRAIN, is_prepared=False)
        return model.model.layers[0].mlp.up_proj

    def step(layer: nn.Module, batch_size: int) -> None:
        layer(torch.empty(batch_size, 256, dtype=BRAIN, requires_grad=True))

    timeline = trace(build, step)
    weight = 256 * 1024
    weight_sizes = [
        size for size, name in zip(timeline.sizes(4).tolist(), timeline.categories, strict=True) if name == "weights"
    ]
    # packed half bytes, a byte per 64 weights, 4 bytes per 256 of those, two code books and an offset
    assert sorted(weight_sizes) == sorted([weight // 2, weight // 64, 4 * weight // 64 // 256, 4 * 256, 4 * 16, 4])
    workspaces = [
        size for size, name in zip(timeline.sizes(4).tolist(), timeline.categories, strict=True) if name == "workspace"
    ]
    assert workspaces.count(2 * weight) == 3  # once per step
    assert workspaces.count(4 * weight // 64) == 6


# ---- losses


@pytest.mark.parametrize(
    ("loss", "kept", "peak"),
    [(F.mse_loss, 1, 2), (F.smooth_l1_loss, 1, 2), (F.soft_margin_loss, 1, 1), (F.binary_cross_entropy, 1, 1)],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_scalar_of_a_loss_keeps_the_storage_of_its_elements(loss: Any, kept: int, peak: int) -> None:
    """In tensors of the input's size, from torch.cuda.memory_allocated and max_memory_allocated on a virtual T4."""

    def step(batch_size: int) -> None:
        scores, aims = torch.empty(batch_size, 1 << 20), torch.empty(batch_size, 1 << 20)
        value = loss(scores, aims)
        del scores, aims
        torch.empty(batch_size, 3 << 20)
        del value

    timeline = traced(step, T4)
    tensor = 4 << 20
    assert timeline.live_bytes(4, T4) == pytest.approx(4 * tensor * max(2 + peak, kept + 3), rel=0.001)


def test_loss_per_element_keeps_nothing_else() -> None:
    timeline = traced(lambda size: F.mse_loss(torch.empty(size, 1 << 20), torch.empty(size, 1 << 20), reduction="none"))
    assert timeline.live_bytes(4) == 3 * 4 * (4 << 20)
