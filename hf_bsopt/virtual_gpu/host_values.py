"""Keep on the virtual GPU the integers that the host put there (:mod:`hf_bsopt._utils.known_values`).

Operations on them are observed at a dispatch key above autograd, one operator at a time: everything else runs as if
nothing observed it. A dispatch mode would not do, since PyTorch takes other variants of operations under one. In
backward passes nothing is observed, except where a checkpoint repeats a forward pass: the autograd engine sums
gradients in place only if no Python object refers to them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor

from .._utils.known_values import KnownValues

aten = torch.ops.aten

KEY_NAME = "TESTING_ONLY_GenericMode"
"""A dispatch key above autograd that nothing else uses."""
KEY = torch._C._dispatch_key_parse(KEY_NAME)

ELEMENTWISE = """add sub rsub mul div floor_divide remainder fmod neg abs sign pow sqrt floor ceil round trunc where
clamp clamp_min clamp_max maximum minimum eq ne lt le gt ge logical_and logical_or logical_xor logical_not bitwise_and
bitwise_or bitwise_xor bitwise_not bitwise_left_shift bitwise_right_shift masked_fill isin"""
REDUCTIONS = "sum mean prod cumsum cumprod max min amax amin argmax argmin any all count_nonzero cummax cummin"
ARRANGEMENTS = """cat stack flip roll index index_select gather scatter scatter_add index_put index_fill take tril triu
sort topk searchsorted bucketize repeat_interleave bincount clone arange eye tril_indices triu_indices repeat"""
IN_PLACE = "copy_ fill_ zero_ cumsum_ scatter_ scatter_add_ index_put_ index_fill_ tril_ triu_"
OBSERVED = [
    *f"{ELEMENTWISE} {REDUCTIONS} {ARRANGEMENTS} {IN_PLACE}".split(),
    *(f"{name}_" for name in ELEMENTWISE.split() if f"{name}_" in dir(Tensor)),
]
"""Operators on integers. A result of any other operator is unknown, as is a tensor that another operator changed."""
UNIQUE = ("_unique2", "unique_consecutive", "unique_dim")

_installed: list[Any] = []
"""Kernel registrations are undone when their Library is garbage collected."""
_values = KnownValues("cuda", checks_versions=True)


def install() -> None:
    """Observe operations in this thread from now on."""
    if _installed:
        return
    everything = torch.library.Library("_", "IMPL")
    everything.fallback(torch.library.fallthrough_kernel, KEY_NAME)
    library = torch.library.Library("aten", "IMPL")
    _installed.extend((everything, library))
    for name in (*OBSERVED, *UNIQUE, "_local_scalar_dense"):
        for overload in _overloads(name):
            library.impl(overload._name, _kernel(name, overload), KEY_NAME, with_keyset=True)
    _pause_in_backward_passes()
    torch._C._dispatch_tls_set_dispatch_key_included(KEY, True)


def positions(mask: Tensor) -> Tensor:
    """Return nonzero of a tensor on the virtual GPU: of all elements, unless its values are known."""
    known = _values.of(mask)
    count = mask.numel() if known is None else int(known.count_nonzero())
    found = torch.zeros((count, mask.dim()), dtype=torch.int64, device=mask.device)
    _values.observe(aten.nonzero.default, (mask,), {}, found)
    return found


def _overloads(name: str) -> Iterator[Any]:
    packet = getattr(aten, name)
    for overload in packet.overloads():
        func = getattr(packet, overload)
        if not torch._C._dispatch_has_kernel(func.name()):  # of TorchScript alone
            continue
        writes_out = any(argument.is_out for argument in func._schema.arguments)
        is_composite = torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")
        if not writes_out and not is_composite:  # the parts of a composite operation are observed
            yield func


def _kernel(name: str, func: Any) -> Callable[..., Any]:
    if name == "_local_scalar_dense":
        return functools.partial(_read_scalar, func)
    if name in UNIQUE:
        return functools.partial(_compute, func)
    return functools.partial(_copy if name == "copy_" else _observe, func)


def _below(func: Any, args: Any, kwargs: Any) -> Any:
    torch._C._dispatch_tls_set_dispatch_key_excluded(KEY, True)
    try:
        return func(*args, **kwargs)
    finally:
        torch._C._dispatch_tls_set_dispatch_key_excluded(KEY, False)


def _observe(func: Any, keyset: Any, *args: Any, **kwargs: Any) -> Any:
    if func is aten.repeat_interleave.Tensor or func is aten.bincount.default:
        after = torch._C._dispatch_keyset_full_after(KEY)
        output = func.redispatch(keyset & after, *args, **kwargs)  # its own operations are observed: it reads a size
    else:
        output = _below(func, args, kwargs)
    _below(_values.observe, (func, args, kwargs, output), {})
    return output


def _copy(func: Any, keyset: Any, *args: Any, **kwargs: Any) -> Any:
    output = _observe(func, keyset, *args, **kwargs)
    target, source = args[:2]
    if source.is_cuda and not target.is_cuda:
        known = _below(_values.of, (source,), {})
        if known is not None:
            with torch.no_grad():
                _below(aten.copy_.default, (target, known), {})
    return output


def _read_scalar(func: Any, keyset: Any, tensor: Tensor) -> Any:
    known = _below(_values.of, (tensor,), {}) if tensor.is_cuda else None
    return _below(func, (tensor,), {}) if known is None else known.item()


def _compute(func: Any, keyset: Any, *args: Any, **kwargs: Any) -> Any:
    results = _below(_values.computed, (func, args, kwargs), {}) if args[0].is_cuda else NotImplemented
    if results is NotImplemented:
        return _below(func, args, kwargs)
    return tuple(one.to(args[0].device) for one in results)


def _pause_in_backward_passes() -> None:
    graph: Any = torch.autograd.graph
    checkpoint: Any = torch.utils.checkpoint
    run_backward = graph._engine_run_backward

    @functools.wraps(run_backward)
    def unobserved(*args: Any, **kwargs: Any) -> Any:
        with _Observing(False):
            return run_backward(*args, **kwargs)

    graph._engine_run_backward = torch.autograd._engine_run_backward = unobserved  # type: ignore[attr-defined]
    generator = checkpoint._checkpoint_without_reentrant_generator
    forward = checkpoint.CheckpointFunction.forward

    def with_observed(function: Callable[..., Any]) -> Callable[..., Any]:
        def observed(*args: Any, **kwargs: Any) -> Any:
            with _Observing(True):
                return function(*args, **kwargs)

        return observed

    @functools.wraps(generator)
    def without_reentrant(fn: Any, *args: Any, **kwargs: Any) -> Any:
        return generator(with_observed(fn), *args, **kwargs)

    @functools.wraps(forward)
    def reentrant(ctx: Any, run_function: Any, *args: Any) -> Any:
        return forward(ctx, with_observed(run_function), *args)

    checkpoint._checkpoint_without_reentrant_generator = without_reentrant
    checkpoint.CheckpointFunction.forward = staticmethod(reentrant)


class _Observing:
    """Turns observation on or off in this thread, for operations inside the context."""

    def __init__(self, on: bool) -> None:
        self._on = on
        self._was_excluded = False

    def __enter__(self) -> None:
        self._was_excluded = torch._C._dispatch_tls_is_dispatch_key_excluded(KEY)
        torch._C._dispatch_tls_set_dispatch_key_excluded(KEY, not self._on)

    def __exit__(self, *_: object) -> None:
        torch._C._dispatch_tls_set_dispatch_key_excluded(KEY, self._was_excluded)
