"""Tests of `hf_bsopt.memory.rules.attention`, compared with the real allocator.

Unless a test says otherwise, its values come from the allocator's history with torch 2.11.0+cu130 on virtual GPUs of
compute capability 7.5 (T4, 40 multiprocessors), 8.0 (A100, 108) and 9.0 (H100, 132).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hf_bsopt.data import catalog
from hf_bsopt.memory import Timeline, trace
from hf_bsopt.records import GpuSpec

T4, A100, H100 = catalog.gpu("T4"), catalog.gpu("A100-80GB"), catalog.gpu("H100-80GB")
HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32
EFFICIENT = "aten._scaled_dot_product_efficient_attention"
FLASH = "aten._scaled_dot_product_flash_attention"


def traced(step: Callable[[int], object], gpu: GpuSpec = A100) -> Timeline:
    return trace(nn.Module, lambda model, batch_size: step(batch_size), device=gpu)


def sizes_of(timeline: Timeline, origin: str, batch_size: int, gpu: GpuSpec = A100) -> list[int]:
    """Return the bytes of each allocation of the operation in one of the three steps, outputs included, in order."""
    made = zip(timeline.sizes(batch_size, gpu).tolist(), timeline.origins, strict=True)
    sizes = [size for size, name in made if size and name == origin]
    assert sizes[: len(sizes) // 3] * 3 == sizes
    return sizes[: len(sizes) // 3]


def attention(
    gpu: GpuSpec,
    *,
    heads: int,
    queries: int,
    width: int,
    keys: int | None = None,
    shared_heads: int | None = None,
    dtype: torch.dtype = HALF,
    masked: bool = False,
    dropout: float = 0.0,
) -> Timeline:
    keys = keys or queries

    def step(batch_size: int) -> None:
        q = torch.empty(batch_size, heads, queries, width, dtype=dtype, requires_grad=True)
        k, v = (
            torch.empty(batch_size, shared_heads or heads, keys, width, dtype=dtype, requires_grad=True) for _ in "kv"
        )
        mask = torch.empty(batch_size, 1, queries, keys, dtype=dtype) if masked else None
        out = F.scaled_dot_product_attention(
            q, k, v, mask, dropout, is_causal=not masked, enable_gqa=shared_heads is not None
        )
        out.backward(torch.empty_like(out))

    return traced(step, gpu)


@pytest.mark.parametrize(
    ("gpu", "batch", "heads", "queries", "keys", "width", "dtype", "recorded"),
    [
        (T4, 8, 12, 512, 512, 64, HALF, [6291456, 6291456, 6291456, 196608, 12595200]),
        (A100, 8, 12, 512, 512, 64, HALF, [6291456, 6291456, 6291456, 196608, 12595200]),
        (T4, 2, 3, 100, 200, 32, HALF, [38400, 76800, 76800, 2400, 196800]),
        (T4, 2, 3, 100, 200, 96, HALF, [115200, 230400, 230400, 2400, 393408]),
        (A100, 2, 3, 100, 200, 96, HALF, [115200, 230400, 230400, 2400, 393312]),
        (T4, 2, 3, 100, 200, 128, HALF, [153600, 307200, 307200, 2400, 393408]),
        (A100, 2, 3, 100, 200, 128, HALF, [153600, 307200, 307200, 2400, 393312]),
        (A100, 1, 2, 1000, 1000, 128, BRAIN, [512000, 512000, 512000, 8000, 1048832]),
        (T4, 1, 2, 300, 300, 256, HALF, [307200, 307200, 307200, 2400, 2097536]),
        (A100, 1, 1, 777, 333, 200, HALF, [310800, 133200, 133200, 3108, 1704384]),
        (T4, 32, 16, 128, 128, 64, HALF, [8388608, 8388608, 8388608, 262144, 16793600]),
        (T4, 64, 8, 96, 96, 112, HALF, [11010048, 11010048, 11010048, 196608, 33570816]),
        (T4, 3, 5, 65, 129, 72, HALF, [140400, 278640, 278640, 3900, 983520]),
        (A100, 3, 5, 65, 129, 72, HALF, [140400, 278640, 278640, 3900, 983280]),
        (T4, 2, 2, 64, 256, 264, HALF, [135168, 540672, 540672, 1024, 3801408]),
    ],
)
def test_the_memory_efficient_backward_takes_row_sums_and_a_workspace(
    gpu: GpuSpec, batch: int, heads: int, queries: int, keys: int, width: int, dtype: torch.dtype, recorded: list[int]
) -> None:
    """The recorded sizes are those of the three gradients, then the row sums and the workspace."""
    timeline = attention(gpu, heads=heads, queries=queries, keys=keys, width=width, dtype=dtype, masked=True)
    assert sizes_of(timeline, f"{EFFICIENT}_backward.default", batch, gpu) == recorded


@pytest.mark.parametrize(
    ("gpu", "batch", "heads", "queries", "width", "workspace"),
    [
        (T4, 8, 12, 512, 64, 12595200),
        (A100, 2, 3, 300, 128, None),
        pytest.param(
            T4,
            1,
            2,
            300,
            80,
            328000,
        ),
    ],
)
def test_the_memory_efficient_backward_in_single_precision_has_the_recorded_workspace(
    gpu: GpuSpec, batch: int, heads: int, queries: int, width: int, workspace: int | None
) -> None:
    timeline = attention(gpu, heads=heads, queries=queries, width=width, dtype=SINGLE, masked=True)
    *_, last = sizes_of(timeline, f"{EFFICIENT}_backward.default", batch, gpu)
    tiles = math.ceil(queries / 128) * math.ceil(width / 64)
    assert last == (batch * heads * tiles * (4 + 128 * 64) * 4 if workspace is None else workspace)


def test_wide_heads_of_the_memory_efficient_kernel_are_accumulated_in_single_precision() -> None:
    """Recorded on all three GPUs: output, row sums and, while the kernel runs, a float32 copy of the output."""
    timeline = attention(T4, heads=2, queries=200, width=256)
    assert sizes_of(timeline, f"{EFFICIENT}.default", 2, T4) == [409600, 3584, 819200]


@pytest.mark.parametrize(
    ("batch", "heads", "shared_heads", "queries", "width", "recorded"),
    [
        # dQ, dK, dV, then row sums, dQ in float32 and, for shared heads, dK and dV of every query head
        (2, 32, None, 512, 64, [131072, 8388608]),
        (2, 32, 8, 512, 64, [131072, 8388608, 4194304, 4194304]),
        (4, 14, None, 300, 80, [86016, 8257536]),
        (4, 14, 2, 300, 80, [86016, 8257536, 2688000, 2688000]),
        (1, 8, 1, 100, 128, [4096, 524288, 204800, 204800]),
        (1, 4, None, 1000, 128, [16384, 2097152]),
        (2, 2, None, 200, 192, [4096, 786432]),
        (2, 2, None, 200, 40, [4096, 262144]),
    ],
)
def test_the_flash_backward_sums_the_gradient_of_queries_in_single_precision(
    batch: int, heads: int, shared_heads: int | None, queries: int, width: int, recorded: list[int]
) -> None:
    timeline = attention(A100, heads=heads, shared_heads=shared_heads, queries=queries, width=width, dtype=BRAIN)
    outputs = batch * queries * width * 2
    gradients = [outputs * heads, outputs * (shared_heads or heads), outputs * (shared_heads or heads)]
    sizes = sizes_of(timeline, f"{FLASH}_backward.default", batch)
    assert sizes[-3 - len(recorded) :] == [*gradients, *recorded]


def test_a_gradient_in_another_layout_is_copied_for_attention() -> None:
    """The kernels need [batch, sequence, heads, width], the layout after the usual transposition."""

    def step(batch_size: int, transposed: bool) -> None:
        q = torch.empty(batch_size, 32, 2, 64, dtype=HALF, requires_grad=True).transpose(1, 2)
        out = F.scaled_dot_product_attention(q, q, q)
        gradient = torch.empty(batch_size, 32, 2, 64, dtype=HALF).transpose(1, 2)
        out.backward(gradient if transposed else gradient.contiguous())

    for gpu, name in ((T4, EFFICIENT), (A100, FLASH)):
        straight, copied = (
            sizes_of(traced(lambda b, t=transposed: step(b, t), gpu), f"{name}_backward.default", 8, gpu)
            for transposed in (True, False)
        )
        assert copied == [8 * 2 * 32 * 64 * 2, *straight]


@pytest.mark.parametrize(("gpu", "recorded"), [(A100, [48000, 6144000]), (H100, [64000, 8192000])])
def test_flash_without_dropout_splits_the_keys_when_there_are_few_heads(gpu: GpuSpec, recorded: list[int]) -> None:
    """flash_api.cpp, set_params_splitkv: partial sums and outputs of every split, held for the call."""

    def step(batch_size: int) -> None:
        q = torch.empty(batch_size, 4, 1000, 128, dtype=HALF, requires_grad=True)
        F.scaled_dot_product_attention(q, q, q)

    sizes = sizes_of(traced(step, gpu), f"{FLASH}.default", 1, gpu)
    assert [size for size in sizes if size > 100] == [1024000, 16000, *recorded]
