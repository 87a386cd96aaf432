"""Make the ``meta`` device, on which a step is traced, dispatch like CUDA.

:func:`as_device` overrides PyTorch's dispatcher during a trace: autocast, dropout's mask, the attention kernel for the
compute capability. The workspaces of kernels are in ``kernels.py``, values read by the host in ``host_reads.py``.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
import warnings
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from ...records import GpuSpec
from . import triton_kernels
from .autocast import KEY as AUTOCAST_KEY
from .autocast import Autocast
from .device_queries import DeviceQueries
from .experts import can_use_grouped_product, grouped_product
from .host import HOST_OPERATORS, additive

aten = torch.ops.aten
HALF = (torch.float16, torch.bfloat16)
SMALL_SHARED_MEMORY = (86, 89, 120)
"""Compute capabilities of the Ampere, Ada and Blackwell GPUs that are not data center GPUs."""


@contextlib.contextmanager
def as_device(device: GpuSpec, queries: DeviceQueries | None = None) -> Iterator[None]:
    """Treat meta tensors like tensors on ``device`` while the context is open. One thread at a time. ``queries``
    records the decisions that depend on the device.
    """
    queries = queries or DeviceQueries(device)
    autocast = Autocast()
    clear_cache = torch.clear_autocast_cache

    def clear_both_caches() -> None:
        autocast.clear_cache()
        clear_cache()

    with contextlib.ExitStack() as stack:
        for module, name, replacement in _replacements(device, queries):
            is_new = not hasattr(module, name)
            stack.enter_context(mock.patch.object(module, name, replacement, create=is_new))
        stack.enter_context(mock.patch.object(torch, "clear_autocast_cache", clear_both_caches))
        library = torch.library.Library("aten", "IMPL")
        stack.callback(library._destroy)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # overriding existing kernels is intended
            autocast.register(library)
            for operator, kernel in (HOST_OPERATORS if device.kind != "cuda" else _operators(queries)).items():
                library.impl(operator, kernel, "AutogradMeta")
            # torch 2.11 has a Python kernel of its own there
            library.impl("_grouped_mm", grouped_product, "Meta", allow_override=True)
        was_on = torch.is_autocast_enabled("cuda")
        stack.callback(torch.set_autocast_enabled, "cuda", was_on)
        stack.enter_context(torch._C._IncludeDispatchKeyGuard(AUTOCAST_KEY))
        torch.set_autocast_enabled("cuda", False)
        yield


def _operators(queries: DeviceQueries) -> dict[str, Any]:
    return {
        "dropout": _dropout,
        "softmax.int": _softmax(aten._softmax),
        "log_softmax.int": _softmax(aten._log_softmax),
        "scaled_dot_product_attention": _Attention(queries),
    }


def _replacements(device: GpuSpec, queries: DeviceQueries) -> Iterator[tuple[Any, str, Any]]:
    """Yield (module, name, replacement) for the Python functions that check for a CUDA device."""
    devices = ["cuda", "meta", "cpu"]
    for name in ("torch.optim.optimizer", "torch.utils._foreach_utils"):
        module = importlib.import_module(name)
        yield module, "_get_foreach_kernels_supported_devices", lambda: list(devices)
        yield module, "_get_fused_kernels_supported_devices", lambda: list(devices)
    if device.kind == "cuda":
        yield from triton_kernels.replacements()
    # a CPU build of torch turns autocast("cuda") and GradScaler("cuda") off
    yield torch.cuda.amp.common, "amp_definitely_not_available", lambda: False
    yield torch.cuda, "is_bf16_supported", lambda including_emulation=True: True
    yield torch.amp.autocast_mode.autocast, "__init__", _autocast_on_meta
    for name in ("is_autocast_enabled", "get_autocast_dtype"):
        yield torch, name, _of_cuda(getattr(torch, name))
    # activation checkpointing saves and restores the autocast state of this device type
    yield importlib.import_module("torch.utils.checkpoint"), "_infer_device_type", lambda *args: "cuda"
    paging = sys.modules.get("bitsandbytes.functional")
    if paging is not None:
        yield paging, "get_paged", _get_paged
        yield paging, "fill", lambda tensor, value, device=None, prefetch=True: None
    # shape functions assume that a mask selects all elements
    yield importlib.import_module("torch.fx.experimental._config"), "meta_nonzero_assume_all_nonzero", True
    experts = sys.modules.get("transformers.integrations.moe")
    if experts is not None:
        yield experts, "_can_use_grouped_mm", can_use_grouped_product(queries)
    generic = sys.modules.get("transformers.utils.generic")
    if generic is not None:  # maybe_autocast("meta", enabled=False) would leave autocast on
        yield generic, "nullcontext", lambda: torch.autocast("cuda", enabled=False)


def _get_paged(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a paged optimizer's state, not recorded: managed memory is outside the caching allocator."""
    with _disable_current_modes():
        return torch.empty(shape, dtype=dtype, device="meta")


def _of_cuda(query: Any) -> Any:
    """Return a query about autocast that answers for CUDA when it is asked about ``meta``."""

    def call(device_type: str = "cuda") -> Any:
        return query("cuda" if device_type == "meta" else device_type)

    return call


_autocast_init = torch.amp.autocast_mode.autocast.__init__


def _autocast_on_meta(self: torch.autocast, device_type: str, *args: Any, **kwargs: Any) -> None:
    _autocast_init(self, "cuda" if device_type == "meta" else device_type, *args, **kwargs)


def _dropout(tensor: Tensor, p: float, train: bool) -> Tensor:
    """Keep a bool mask, as Dropout.cu does; the composite operation keeps one of the input's dtype."""
    if not train or p == 0 or tensor.numel() == 0:
        return tensor
    if p == 1:
        return tensor * torch.zeros((), dtype=tensor.dtype, device=tensor.device)
    return aten.native_dropout(tensor, p, True)[0]


def _softmax(op: Any) -> Any:
    """Return CUDA's softmax: fp16 is cast to fp32 inside the kernel, other casts make a copy first (SoftMax.cpp)."""

    def call(tensor: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
        if tensor.dtype == torch.float16 and dtype == torch.float32:
            return op(tensor, dim, True)
        return op(tensor if dtype is None else tensor.to(dtype), dim, False)

    return call


class _Attention:
    """scaled_dot_product_attention with the kernel that the device would select.

    aten/src/ATen/native/transformers/cuda/sdp_utils.cpp and attention.cpp: flash if the GPU and dtype allow it and
    there is no mask, else memory-efficient, else plain matrix products.
    """

    def __init__(self, queries: DeviceQueries) -> None:
        self._queries = queries

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        tensors = query, key, value
        if all(t.dim() == 4 for t in tensors):
            flash, efficient = torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.mem_efficient_sdp_enabled()
            if flash and attn_mask is None and self._can_run_flash(query, key, value, dropout_p, is_causal):
                return self._flash(query, key, value, dropout_p, is_causal, scale)
            if efficient and self._can_run_efficient(query, key, value):
                return self._efficient(query, key, value, attn_mask, dropout_p, is_causal, scale)
        return aten._scaled_dot_product_attention_math(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )[0]

    def _can_run_flash(self, query: Tensor, key: Tensor, value: Tensor, dropout_p: float, is_causal: bool) -> bool:
        if query.dtype not in HALF:
            return False
        width = query.size(-1)
        if not width == key.size(-1) == value.size(-1) <= 256 or query.size(-3) % key.size(-3):
            return False
        if is_causal and query.size(-2) != key.size(-2):
            return False
        return bool(self._queries(_runs_flash, width, dropout_p > 0, _needs_grad(query, key, value)))

    def _can_run_efficient(self, query: Tensor, key: Tensor, value: Tensor) -> bool:
        if query.dtype not in (*HALF, torch.float32):
            return False
        same_heads = query.size(-3) == key.size(-3) == value.size(-3)  # no grouped-query attention
        return same_heads and bool(self._queries(_runs_efficient, query.dtype, query.size(-1), value.size(-1)))

    def _flash(
        self, query: Tensor, key: Tensor, value: Tensor, dropout_p: float, is_causal: bool, scale: float | None
    ) -> Tensor:
        width = query.size(-1)
        if width % 8:
            query, key, value = (torch.nn.functional.pad(t, (0, 8 - width % 8)) for t in (query, key, value))
            scale = width**-0.5 if scale is None else scale
        out = aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, False, scale=scale)[0]
        return out[..., :width] if width % 8 else out

    def _efficient(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        dropout_p: float,
        is_causal: bool,
        scale: float | None,
    ) -> Tensor:
        if mask is not None:
            mask = additive(mask, query.dtype)
            padding = -mask.size(-1) % 8  # preprocess_mask: rows of the mask start on 8 elements
            if padding:
                mask = torch.nn.functional.pad(mask, (0, padding))[..., : mask.size(-1)]
            mask = mask.expand(query.size(0), query.size(1), query.size(2), key.size(2))
        return aten._scaled_dot_product_efficient_attention(
            query, key, value, mask, _needs_grad(query, key, value), dropout_p, is_causal, scale=scale
        )[0]


def _runs_flash(device: GpuSpec, width: int, has_dropout: bool, needs_grad: bool) -> bool:
    capability = device.compute_capability
    is_wide_for_small_shared_memory = (
        capability in SMALL_SHARED_MEMORY and width > 192 and (width <= 224 or has_dropout)
    )
    return capability >= 80 and not (is_wide_for_small_shared_memory and needs_grad)


def _runs_efficient(device: GpuSpec, dtype: torch.dtype, width: int, value_width: int) -> bool:
    capability = device.compute_capability
    if dtype == torch.bfloat16 and capability < 80:
        return False
    alignment, first_aligned = (8, 70) if dtype in HALF else (4, 80)
    return capability < first_aligned or (width % alignment == 0 and value_width % alignment == 0)


def _needs_grad(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
