"""``torch.autocast("cuda")`` for meta tensors.

PyTorch's kernels of the AutocastCUDA key do not cast tensors outside CUDA devices. The kernels below replace them while
a step is traced, with the same lists, order of casts and cache of half-precision weights (aten/src/ATen/autocast_mode.h
and .cpp, pytorch 2.13). They are registered with the dispatcher because activation checkpointing recomputes inside the
autograd engine, where a TorchFunctionMode is not active.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

aten = torch.ops.aten

LOWER_PRECISION = [
    "_convolution",
    "conv1d",
    "conv2d",
    "conv3d",
    "conv_tbc",
    "conv_transpose1d",
    "conv_transpose2d.input",
    "conv_transpose3d.input",
    "convolution",
    "prelu",
    "addmm",
    "addmv",
    "addr",
    "matmul",
    "einsum",
    "mm",
    "mv",
    "linalg_vecdot",
    "linear",
    "addbmm",
    "baddbmm",
    "bmm",
    "chain_matmul",
    "linalg_multi_dot",
    "lstm_cell",
    "gru_cell",
    "rnn_tanh_cell",
    "rnn_relu_cell",
    "scaled_dot_product_attention",
]
FLOAT32 = [
    "acos",
    "asin",
    "cosh",
    "erfinv",
    "exp",
    "expm1",
    "log",
    "log10",
    "log2",
    "log1p",
    "reciprocal",
    "rsqrt",
    "sinh",
    "tan",
    "pow.Tensor_Scalar",
    "pow.Tensor_Tensor",
    "pow.Scalar",
    "softplus",
    "layer_norm",
    "native_layer_norm",
    "rms_norm",
    "group_norm",
    "cosine_similarity",
    "poisson_nll_loss",
    "cosine_embedding_loss",
    "nll_loss",
    "nll_loss2d",
    "hinge_embedding_loss",
    "kl_div",
    "l1_loss",
    "smooth_l1_loss",
    "huber_loss",
    "mse_loss",
    "margin_ranking_loss",
    "multilabel_margin_loss",
    "soft_margin_loss",
    "triplet_margin_loss",
    "multi_margin_loss",
    "binary_cross_entropy_with_logits",
    "dist",
    "pdist",
    "cdist",
    "renorm",
    "logsumexp",
]
FLOAT32_OUTPUT = [
    "prod",
    "prod.dim_int",
    "softmax.int",
    "log_softmax.int",
    "cumprod",
    "cumsum",
    "linalg_vector_norm",
    "sum",
    "sum.dim_IntList",
]
WIDEST_TYPE = [
    "addcdiv",
    "addcmul",
    "atan2",
    "bilinear",
    "cross",
    "dot",
    "vdot",
    "grid_sampler",
    "index_put",
    "tensordot",
    "scatter_add",
]

KEY = torch._C.DispatchKey.AutocastCUDA
_WITHOUT = torch._C.DispatchKeySet(KEY)


def operator(name: str) -> Any:
    """Return the aten operator with this name, "op" or "op.overload"."""
    packet, _, overload = name.partition(".")
    return getattr(getattr(aten, packet), overload or "default")


def _eligible(value: Any) -> bool:
    return (
        isinstance(value, torch.Tensor) and value.is_meta and value.is_floating_point() and value.dtype != torch.float64
    )


class Autocast:
    """The casting kernels and their cache of cast weights, which is cleared when the outermost autocast ends."""

    def __init__(self) -> None:
        self._weights: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def clear_cache(self) -> None:
        """Drop the cast copies of weights."""
        self._weights.clear()

    def register(self, library: torch.library.Library) -> None:
        """Register the kernels with ``library``."""
        for names, policy in (
            (LOWER_PRECISION, self._lower_precision),
            (FLOAT32, self._float32),
            (FLOAT32_OUTPUT, self._float32_output),
            (WIDEST_TYPE, self._widest_type),
        ):
            for name in names:
                library.impl(name, policy(operator(name)), "AutocastCUDA")

    def _cast(self, value: Any, dtype: torch.dtype) -> Any:
        if isinstance(value, (list, tuple)):
            return type(value)(self._cast(v, dtype) for v in value)
        if not _eligible(value) or value.dtype == dtype:
            return value
        if (
            value.dtype == torch.float32
            and value.requires_grad
            and value.is_leaf
            and not value._is_view()
            and dtype == torch.get_autocast_dtype("cuda")
            and torch.is_autocast_cache_enabled()
        ):
            known = self._weights.get(id(value))
            if known is None:
                with torch.enable_grad():  # even if first used without gradients: later uses need the copy's gradient
                    known = self._weights[id(value)] = value.to(dtype), value
            return known[0]
        return value.to(dtype)

    def _cast_all(self, args: tuple[Any, ...], kwargs: dict[str, Any], dtype: torch.dtype) -> Any:
        """Cast the last argument first, as the compiled C++ does: the order decides the addresses of the copies."""
        kwargs = {name: self._cast(value, dtype) for name, value in kwargs.items()}
        return [self._cast(value, dtype) for value in reversed(args)][::-1], kwargs

    def _lower_precision(self, op: Any) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with torch._C._ExcludeDispatchKeyGuard(_WITHOUT):
                cast, kwargs = self._cast_all(args, kwargs, torch.get_autocast_dtype("cuda"))
                return op(*cast, **kwargs)

        return call

    def _float32(self, op: Any) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with torch._C._ExcludeDispatchKeyGuard(_WITHOUT):
                cast, kwargs = self._cast_all(args, kwargs, torch.float32)
                return op(*cast, **kwargs)

        return call

    def _float32_output(self, op: Any) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with torch._C._ExcludeDispatchKeyGuard(_WITHOUT):
                has_dtype = kwargs.get("dtype") is not None or any(isinstance(a, torch.dtype) for a in args)
                if _eligible(args[0]) and not has_dtype:
                    kwargs = {**kwargs, "dtype": torch.float32}
                return op(*args, **kwargs)

        return call

    def _widest_type(self, op: Any) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with torch._C._ExcludeDispatchKeyGuard(_WITHOUT):
                flat = [v for a in args for v in (a if isinstance(a, (list, tuple)) else (a,)) if _eligible(v)]
                wide = any(v.dtype == torch.float32 for v in flat)
                dtype = torch.float32 if wide else torch.get_autocast_dtype("cuda")
                return op(*(self._cast(a, dtype) for a in args), **kwargs)

        return call
