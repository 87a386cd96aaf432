"""What CUDA does otherwise than the ``meta`` device that a step is traced on.

:func:`as_device` puts CUDA's choices in PyTorch's dispatcher for the length of a trace: autocast, dropout's mask, the
attention kernel that this compute capability would run, what the host reads back. What kernels take for themselves
stands in ``cuda_kernels``.
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
from .autocast import KEY as AUTOCAST_KEY
from .autocast import Autocast
from .device_queries import Asked
from .host import HOST_OPERATORS, additive

aten = torch.ops.aten
HALF = (torch.float16, torch.bfloat16)
SMALL_SHARED_MEMORY = (86, 89, 120)
"""Compute capabilities of the Ampere, Ada and Blackwell cards that are not data center cards."""


@contextlib.contextmanager
def as_device(device: GpuSpec, asked: Asked | None = None) -> Iterator[None]:
    """Within it, meta tensors are treated as tensors on ``device`` would be. One thread at a time. ``asked`` notes what
    hung on the device.
    """
    asked = asked or Asked(device)
    autocast = Autocast()
    clear_cache = torch.clear_autocast_cache

    def clear_both_caches() -> None:
        autocast.clear_cache()
        clear_cache()

    with contextlib.ExitStack() as stack:
        for module, name, stand_in in _stand_ins():
            stack.enter_context(mock.patch.object(module, name, stand_in))
        stack.enter_context(mock.patch.object(torch, "clear_autocast_cache", clear_both_caches))
        library = torch.library.Library("aten", "IMPL")
        stack.callback(library._destroy)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that these operators have kernels already is the point
            autocast.register(library)
            for operator, kernel in (HOST_OPERATORS if device.kind != "cuda" else _operators(asked)).items():
                library.impl(operator, kernel, "AutogradMeta")
        was_on = torch.is_autocast_enabled("cuda")
        stack.callback(torch.set_autocast_enabled, "cuda", was_on)
        stack.enter_context(torch._C._IncludeDispatchKeyGuard(AUTOCAST_KEY))
        torch.set_autocast_enabled("cuda", False)
        yield


def _operators(asked: Asked) -> dict[str, Any]:
    return {
        "dropout": _dropout,
        "softmax.int": _softmax(aten._softmax),
        "log_softmax.int": _softmax(aten._log_softmax),
        "scaled_dot_product_attention": _Attention(asked),
    }


def _stand_ins() -> Iterator[tuple[Any, str, Any]]:
    """Where PyTorch's and transformers' Python asks for a CUDA device by name."""
    devices = ["cuda", "meta", "cpu"]
    for name in ("torch.optim.optimizer", "torch.utils._foreach_utils"):
        module = importlib.import_module(name)
        yield module, "_get_foreach_kernels_supported_devices", lambda: list(devices)
        yield module, "_get_fused_kernels_supported_devices", lambda: list(devices)
    # a CPU build of torch turns autocast("cuda") and GradScaler("cuda") off
    yield torch.cuda.amp.common, "amp_definitely_not_available", lambda: False
    yield torch.cuda, "is_bf16_supported", lambda including_emulation=True: True
    yield torch.amp.autocast_mode.autocast, "__init__", _autocast_on_meta
    # activation checkpointing saves and restores the autocast state of this device type
    yield importlib.import_module("torch.utils.checkpoint"), "_infer_device_type", lambda *args: "cuda"
    paging = sys.modules.get("bitsandbytes.functional")
    if paging is not None:
        yield paging, "get_paged", _managed_memory
        yield paging, "fill", lambda tensor, value, device=None, prefetch=True: None
    # shape functions that ask how many elements a mask chooses are told: all
    yield importlib.import_module("torch.fx.experimental._config"), "meta_nonzero_assume_all_nonzero", True
    generic = sys.modules.get("transformers.utils.generic")
    if generic is not None:  # maybe_autocast("meta", enabled=False) would leave autocast on
        yield generic, "nullcontext", lambda: torch.autocast("cuda", enabled=False)


def _managed_memory(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Pages of a paged optimizer's state: the driver moves them between host and device, outside the allocator."""
    with _disable_current_modes():
        return torch.empty(shape, dtype=dtype, device="meta")


_autocast_init = torch.amp.autocast_mode.autocast.__init__


def _autocast_on_meta(self: torch.autocast, device_type: str, *args: Any, **kwargs: Any) -> None:
    _autocast_init(self, "cuda" if device_type == "meta" else device_type, *args, **kwargs)


def _dropout(tensor: Tensor, p: float, train: bool) -> Tensor:
    """Dropout.cu keeps a mask of bool; the composite keeps one of the input's dtype."""
    if not train or p == 0 or tensor.numel() == 0:
        return tensor
    if p == 1:
        return tensor * torch.zeros((), dtype=tensor.dtype, device=tensor.device)
    return aten.native_dropout(tensor, p, True)[0]


def _softmax(op: Any) -> Any:
    """SoftMax.cpp: on CUDA fp16 becomes fp32 inside the kernel; every other cast makes a copy first."""

    def call(tensor: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
        if tensor.dtype == torch.float16 and dtype == torch.float32:
            return op(tensor, dim, True)
        return op(tensor if dtype is None else tensor.to(dtype), dim, False)

    return call


class _Attention:
    """scaled_dot_product_attention, with the kernel that the device would choose.

    aten/src/ATen/native/transformers/cuda/sdp_utils.cpp and attention.cpp: flash where the card, the dtype and the
    absence of a mask allow it, else memory-efficient, else plain matrix products.
    """

    def __init__(self, asked: Asked) -> None:
        self._asked = asked

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
            if flash and attn_mask is None and self._can_flash(query, key, value, dropout_p, is_causal):
                return self._flash(query, key, value, dropout_p, is_causal, scale)
            if efficient and self._can_be_efficient(query, key, value):
                return self._efficient(query, key, value, attn_mask, dropout_p, is_causal, scale)
        return aten._scaled_dot_product_attention_math(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )[0]

    def _can_flash(self, query: Tensor, key: Tensor, value: Tensor, dropout_p: float, is_causal: bool) -> bool:
        if query.dtype not in HALF:
            return False
        width = query.size(-1)
        if not width == key.size(-1) == value.size(-1) <= 256 or query.size(-3) % key.size(-3):
            return False
        if is_causal and query.size(-2) != key.size(-2):
            return False
        return bool(self._asked(_runs_flash, width, dropout_p > 0, _needs_grad(query, key, value)))

    def _can_be_efficient(self, query: Tensor, key: Tensor, value: Tensor) -> bool:
        if query.dtype not in (*HALF, torch.float32):
            return False
        same_heads = query.size(-3) == key.size(-3) == value.size(-3)  # it knows no grouped-query attention
        return same_heads and bool(self._asked(_runs_efficient, query.dtype, query.size(-1), value.size(-1)))

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
    wide_on_small_card = capability in SMALL_SHARED_MEMORY and width > 192 and (width <= 224 or has_dropout)
    return capability >= 80 and not (wide_on_small_card and needs_grad)


def _runs_efficient(device: GpuSpec, dtype: torch.dtype, width: int, value_width: int) -> bool:
    capability = device.compute_capability
    if dtype == torch.bfloat16 and capability < 80:
        return False
    unit, since = (8, 70) if dtype in HALF else (4, 80)
    return capability < since or (width % unit == 0 and value_width % unit == 0)


def _needs_grad(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


# What the host reads from the device: nothing was computed, so numbers are 0 and conditions are false, as on the
# virtual device of hf_bsopt.rehearsal. What asks how many elements are chosen is told: all of them, the most memory.


def _number(func: Any, args: Any, kwargs: Any) -> Any:
    return torch.zeros((), dtype=args[0].dtype).item() if args[0].is_meta else NotImplemented


def _copy_to_host(func: Any, args: Any, kwargs: Any) -> Any:
    device = kwargs.get("device")
    if device is None or torch.device(device).type != "cpu" or not args[0].is_meta:
        return NotImplemented
    return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)


def _all_chosen(func: Any, args: Any, kwargs: Any) -> Any:
    tensor = args[0]
    if not tensor.is_meta:
        return NotImplemented
    return torch.empty((tensor.numel(), tensor.dim()), dtype=torch.int64, device=tensor.device)


HOST_READS: dict[Any, Any] = {
    aten._local_scalar_dense.default: _number,
    aten._to_copy.default: _copy_to_host,
    aten.nonzero.default: _all_chosen,
}
