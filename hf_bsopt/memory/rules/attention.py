"""Workspaces of CUDA's attention kernels: aten/src/ATen/native/transformers/cuda (pytorch 2.11)."""

from __future__ import annotations

import contextlib
import math
from typing import Any

from torch import Tensor

from ...records import GpuSpec
from ..replay.recording import Formula
from .cuda_dispatch import SMALL_SHARED_MEMORY
from .kernel_workspace import Run, Workspace, div_up, nbytes, round_up

# Memory-efficient attention: aten/src/ATen/native/transformers/cuda/mem_eff_attention/kernel_backward.h (Params::
# workspace_size); the kernels of kernels/cutlassB.h in the order in which attention_backward.cu tries them.


def _backward_tile(capability: int, widest: int, half: bool) -> tuple[int, int, int]:
    """Return (queries, keys, maximum head dimension) of the first kernel that supports these heads."""
    if widest <= 64:
        return 64, 64, 32 if widest <= 32 else 64
    limit = 128 if widest <= 128 else 65536
    if capability < 70 or (capability < 80 and not half):
        return 64, 64, limit
    if half and widest <= 128 and capability >= 80:
        if capability not in SMALL_SHARED_MEMORY:
            return 128, 128, limit
        return (128, 64, 96) if widest <= 96 else (64, 64, 128)
    return 128, 64, limit


def efficient_backward_bytes(
    device: GpuSpec, batch: int, heads: int, queries: int, keys: int, width: int, value_width: int, half: int
) -> int:
    """Return the workspace of the memory-efficient backward kernel, in bytes."""
    capability = device.compute_capability
    tile_queries, tile_keys, limit = _backward_tile(capability, max(width, value_width), bool(half))
    splits_keys = capability >= 70
    accumulates_keys = bool(half) and limit > tile_queries
    splits = div_up(keys, tile_keys)
    if batch * heads >= 256 and keys <= 2 * tile_keys:
        splits = 1
    if accumulates_keys:
        splits = min(splits, 200 // (batch * heads))
    splits = max(splits, 1) if splits_keys else 1
    floats = 0
    if splits_keys or half:
        floats = div_up(queries, tile_queries) * div_up(width, tile_keys) * (4 + tile_queries * tile_keys)
    if accumulates_keys:
        floats += splits * tile_keys * (round_up(width, tile_queries) + round_up(value_width, tile_queries))
    return batch * heads * round_up(floats, 4) * 4


def efficient_backward(
    workspace: Workspace, run: Run, grad: Tensor, query: Tensor, key: Tensor, value: Tensor, bias: Any, out: Tensor,
    lse: Tensor, *_: Any, **__: Any,
) -> Any:  # fmt: skip
    """Hold the row sums (delta) and the workspace of the backward kernel, and a contiguous copy of the gradient."""
    batch, heads, queries, width = query.shape
    half = int(query.element_size() == 2)
    copied = 0 if grad.transpose(1, 2).is_contiguous() else nbytes(grad)
    delta = batch * heads * queries * 4
    kernel_bytes = Formula(efficient_backward_bytes, (batch, heads, queries, key.size(2), width, value.size(3), half))
    with workspace(copied):
        output = run()
        if half:
            with workspace(delta, kernel_bytes, freed_in_order=True):
                return output
        # in single precision the row sums of gradient times output are separate operations
        with contextlib.ExitStack() as held:
            with workspace(nbytes(grad), delta):
                held.enter_context(workspace(delta))
            with workspace(kernel_bytes):
                return output


def efficient(workspace: Workspace, run: Run, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Any:
    """Hold the fp32 accumulator of wide heads in half precision (kernel_forward.h, kNeedsOutputAccumulatorBuffer)."""
    output = run()
    wide = query.element_size() == 2 and value.size(-1) > 128
    with workspace(query.numel() // query.size(-1) * value.size(-1) * 4 if wide else 0):
        return output


def _key_splits(device: GpuSpec, batch: int, heads: int, queries: int, keys: int, width: int) -> int:
    """Return how many splits of the keys run in parallel: with few heads, splitting the keys fills idle multiprocessors
    (flash_api.cpp, set_params_splitkv and num_splits_heuristic).
    """
    blocks = div_up(keys, 256 if width <= 64 else 128 if width <= 128 else 64)
    work = batch * heads * div_up(queries, 64)
    slots = 2 * device.multiprocessors
    if work >= 0.8 * slots:
        return 1
    eligible = [
        splits
        for splits in range(1, min(128, slots, blocks) + 1)
        if splits == 1 or div_up(blocks, splits) != div_up(blocks, splits - 1)
    ]
    efficiency = {splits: work * splits / slots / math.ceil(work * splits / slots) for splits in eligible}
    best = max(efficiency.values())
    return next(splits for splits in eligible if efficiency[splits] >= 0.85 * best)


def split_bytes(device: GpuSpec, batch: int, heads: int, queries: int, keys: int, width: int, columns: int) -> int:
    """Return the bytes of fp32 partial results, 0 if the keys are not split."""
    splits = _key_splits(device, batch, heads, queries, keys, width)
    return splits * batch * heads * queries * columns * 4 if splits > 1 else 0


def _flash_columns(width: int) -> int:
    return round_up(width, 32 if width <= 128 else 64)


def flash(
    workspace: Workspace,
    run: Run,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    *_: Any,
    **__: Any,
) -> Any:
    """Hold the partial sums and outputs of the key splits, which are only used without dropout."""
    output = run()
    batch, heads, queries, width = query.shape
    shape = batch, heads, queries, key.size(2), width
    if dropout_p:
        return output
    with workspace(Formula(split_bytes, (*shape, 1)), Formula(split_bytes, (*shape, _flash_columns(width)))):
        return output


def flash_backward(
    workspace: Workspace, run: Run, grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor,
    *_: Any, **__: Any,
) -> Any:  # fmt: skip
    """Hold the fp32 gradient of the queries and, for grouped-query attention, the gradients of keys and values for
    every query head (aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp, mha_bwd).
    """
    batch, heads, queries, width = query.shape
    copies = [0 if t.transpose(1, 2).is_contiguous() else nbytes(t) for t in (grad, out)]
    rows = round_up(queries, 128)
    columns = _flash_columns(width)
    expanded = [nbytes(query) // queries * key.size(2)] * 2 if key.size(1) != heads else []
    with workspace(*copies):
        output = run()
        with workspace(batch * heads * rows * 4, batch * rows * heads * columns * 4, *expanded):
            return output
