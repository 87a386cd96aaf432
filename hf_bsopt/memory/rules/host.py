"""Operators that run differently on a CPU or an Apple GPU than on the ``meta`` device.

There are few: both run PyTorch's operators as written, without CUDA's fused kernels and without a caching allocator
that rounds and splits. The trace is a first estimate, which real steps correct.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Run flash attention if there is no dropout and no trainable mask (ATen/native/transformers/sdp_utils_cpp.cpp)."""
    same_heads = query.size(-3) == key.size(-3) == value.size(-3)
    if query.dim() == 4 and dropout_p == 0 and same_heads and not (attn_mask is not None and attn_mask.requires_grad):
        mask = None if attn_mask is None else additive(attn_mask, query.dtype)
        return aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, dropout_p, is_causal, attn_mask=mask, scale=scale
        )[0]
    return aten._scaled_dot_product_attention_math(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )[0]


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert a bool mask to an additive one (attention.cpp, convert_boolean_attn_mask)."""
    if mask.dtype != torch.bool:
        return mask
    zero = torch.zeros((), dtype=dtype, device=mask.device)
    return torch.where(mask, zero, torch.full((), float("-inf"), dtype=dtype, device=mask.device))


HOST_OPERATORS: dict[str, Any] = {"scaled_dot_product_attention": _attention}
