"""Tests of `hf_bsopt.memory.rules.reductions`, compared with the real allocator.

The values were recorded with torch 2.11.0+cu130 on virtual GPUs: a T4 (compute capability 7.5, 40 multiprocessors
of 1,024 threads) and an A100 (8.0, 108 of 2,048).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import nn

from hf_bsopt.data import catalog
from hf_bsopt.memory import Timeline, trace
from hf_bsopt.records import GpuSpec

T4, A100 = catalog.gpu("T4"), catalog.gpu("A100-40GB")
HALF, SINGLE = torch.float16, torch.float32

OPERATIONS: dict[str, Callable[..., torch.Tensor]] = {
    "sum": torch.sum,
    "mean": torch.mean,
    "norm": lambda x, dim=None: torch.linalg.vector_norm(x, 2, dim),
    "amax": lambda x, dim=(): torch.amax(x, dim),
    "max": torch.max,
    "any": lambda x, dim=None: torch.any(x) if dim is None else torch.any(x, dim),
}


def sizes_of(
    operation: Callable[[torch.Tensor], object], shape: list[int], dtype: torch.dtype, gpu: GpuSpec
) -> list[int]:
    """Return the bytes of each allocation of one call: its output first, then its staging buffers."""

    def step(model: nn.Module, batch_size: int) -> None:
        operation(torch.empty(shape, dtype=dtype))

    timeline = trace(nn.Module, step, device=gpu)
    made = zip(timeline.sizes(1, gpu).tolist(), timeline.origins, strict=True)
    sizes = [size for size, origin in made if size and origin != "aten.empty.memory_format"]
    return sizes[: len(sizes) // 3]


RECORDED = [
    # operation, shape, reduced dimension, dtype: output, staging buffer and semaphores on the T4, then on the A100
    ("sum", [4096, 768], 0, HALF, [1536, 21233664, 24], [1536, 25165824, 24]),
    ("sum", [4096, 768], 0, SINGLE, [3072, 21233664, 24], [3072, 25165824, 24]),
    ("sum", [4096, 3072], 0, HALF, [6144, 22020096, 96], [6144, 100663296, 96]),
    ("sum", [2048, 2048], 0, HALF, [4096, 20971520, 64], [4096, 33554432, 64]),
    ("sum", [16384, 30], 0, HALF, [60, 61440, 8], [60, 61440, 8]),
    ("sum", [64, 512, 768], (0, 1), HALF, [1536, 21233664, 24], [1536, 113246208, 24]),
    ("sum", [128, 1024, 30], (0, 1), SINGLE, [120, 153600, 8], [120, 491520, 8]),
    ("sum", [4096, 768], None, SINGLE, [4, 320, 4], [4, 1536, 4]),
    ("sum", [1000000], None, SINGLE, [4, 320, 4], [4, 492, 4]),
    ("sum", [50000, 3], None, SINGLE, [4, 76, 4], [4, 76, 4]),
    ("sum", [4096, 768], -1, SINGLE, [16384], [16384]),
    ("sum", [333, 777], 0, SINGLE, [3108], [3108]),
    ("sum", [7, 13], None, SINGLE, [4], [4]),
    ("mean", [4096, 3072], None, HALF, [2, 384, 4], [2, 1728, 4]),
    ("mean", [64, 512, 768], None, SINGLE, [4, 768, 4], [4, 1728, 4]),
    ("norm", [4096, 768], None, SINGLE, [4, 320, 4], [4, 1536, 4]),
    ("amax", [4096, 768], 0, SINGLE, [3072, 21233664, 24], [3072, 25165824, 24]),
    ("amax", [4096, 768], 0, HALF, [1536, 10616832, 24], [1536, 12582912, 24]),
    ("max", [3, 4, 5, 6000], None, HALF, [2, 88, 4], [2, 88, 4]),
    ("any", [4096, 3072], 0, torch.bool, [3072, 5505024, 96], [3072, 25165824, 96]),
    ("any", [2048, 2048], None, torch.bool, [1, 80, 4], [1, 432, 4]),
]


@pytest.mark.parametrize("gpu", [T4, A100], ids=["T4", "A100"])
@pytest.mark.parametrize(("name", "shape", "dim", "dtype", "on_t4", "on_a100"), RECORDED)
def test_a_reduction_allocates_the_recorded_sizes(
    name: str,
    shape: list[int],
    dim: int | tuple[int, ...] | None,
    dtype: torch.dtype,
    on_t4: list[int],
    on_a100: list[int],
    gpu: GpuSpec,
) -> None:
    operation = OPERATIONS[name]
    sizes = sizes_of((lambda x: operation(x)) if dim is None else (lambda x: operation(x, dim)), shape, dtype, gpu)
    assert sizes == (on_t4 if gpu is T4 else on_a100)


@pytest.mark.parametrize(("dtype", "copied"), [(torch.bool, True), (torch.int32, True), (torch.int64, False)])
def test_integers_are_copied_to_64_bits_before_the_sum(dtype: torch.dtype, copied: bool) -> None:
    # recorded on the T4: 8, 8000000, 640 and 4 bytes for bool and int32
    assert sizes_of(torch.sum, [1_000_000], dtype, T4) == [8, *([8_000_000] if copied else []), 640, 4]


def test_the_staging_buffer_of_a_column_sum_grows_with_the_multiprocessors() -> None:
    """The sum is that of a bias gradient: more multiprocessors run more blocks, which need a larger buffer."""
    sizes = [
        sizes_of(lambda x: x.sum(0), [16384, 768], HALF, dataclasses.replace(A100, multiprocessors=count))[1]
        for count in (20, 40, 108, 132)
    ]
    assert sizes == sorted(sizes)
    assert sizes[0] >= 10 * 2**20


def test_a_staging_buffer_is_exact_at_batch_sizes_that_were_not_traced() -> None:
    """The buffer does not grow linearly: at eight times 512 rows it is that of 4,096 rows."""

    def step(model: nn.Module, batch_size: int) -> None:
        torch.empty(512 * batch_size, 768, dtype=HALF).sum(0)

    timeline: Timeline = trace(nn.Module, step, device=T4)
    blocks = len(timeline.origins) // 3
    sizes = {b: [size for size in timeline.sizes(b, T4).tolist()[:blocks] if size] for b in (1, 8, 64)}
    assert sizes[8] == [2 * 4096 * 768, 1536, 21233664, 24]
    for b in (1, 64):
        alone = sizes_of(lambda x: x.sum(0), [512 * b, 768], HALF, T4)
        assert sizes[b] == [2 * 512 * b * 768, *alone]
