"""The grouped matrix products of a mixture of experts (transformers 5), as the GPU runs them.

One product multiplies the tokens of every expert by its weights. On a GPU from compute capability 8.0 on it is
``torch._grouped_mm``, which takes every floating type there (aten/src/ATen/native/cuda/GroupedBlas.cpp, pytorch 2.11:
kernels of its own for bf16 on sm90 and sm100, a product per expert otherwise), whereas PyTorch's shape function refuses
all but bf16. On an older GPU it is transformers' own loop (integrations/moe.py, _can_use_grouped_mm).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...records import GpuSpec
from .device_queries import DeviceQueries


def grouped_product(
    left: Tensor,
    right: Tensor,
    offs: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Return an empty output, with rows that start on 16 bytes (create_grouped_gemm_output_tensor, GroupedMMUtils.h).

    left: [rows, in] or [groups, rows, in]; right: [in, out] or [groups, in, out]; offs: the last row of each group.
    Raises RuntimeError for dtypes that differ, as the GPU does.
    """
    if left.dtype != right.dtype:
        raise RuntimeError(f"grouped products need one dtype, and not {left.dtype} and {right.dtype}")
    dtype = out_dtype or left.dtype
    columns = right.size(-1)
    if left.dim() == 2 and right.dim() == 2:
        assert offs is not None
        size = [offs.size(0), left.size(0), columns]
    else:
        size = [left.size(0), columns] if left.dim() == 2 else [left.size(-2), columns]
        if left.dim() == right.dim():
            size = [left.size(0), left.size(1), columns]
    alignment = max(1, 16 // dtype.itemsize)
    padded = -(-columns // alignment) * alignment
    stride = [padded, 1] if len(size) == 2 else [size[1] * padded, padded, 1]
    return torch.empty_strided(size, stride, dtype=dtype, device=left.device)


def can_use_grouped_product(queries: DeviceQueries) -> Callable[..., bool]:
    """Return the replacement of transformers' question whether the GPU has ``torch._grouped_mm``."""

    def can_use(*_: Any) -> bool:
        return bool(queries(_has_grouped_product))

    return can_use


def _has_grouped_product(device: GpuSpec) -> bool:
    return device.kind != "cuda" or device.compute_capability >= 80
