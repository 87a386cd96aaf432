"""Values that the host reads from the traced device.

Integers that came from the host are known (:mod:`hf_bsopt._utils.known_values`). Nothing else was computed: numbers are
0 and conditions are false, as on the virtual GPU, and selections return all elements, which takes the most memory.
"""

from __future__ import annotations

from typing import Any

import torch

from ..._utils.known_values import KnownValues

aten = torch.ops.aten


def _read_scalar(values: KnownValues, func: Any, args: Any, kwargs: Any) -> Any:
    if not args[0].is_meta:
        return NotImplemented
    known = values.of(args[0])
    if known is None:
        values.note_unknown_read(func)
        return torch.zeros((), dtype=args[0].dtype).item()
    return known.item()


def _copy_to_host(values: KnownValues, func: Any, args: Any, kwargs: Any) -> Any:
    device = kwargs.get("device")
    if device is None or torch.device(device).type != "cpu" or not args[0].is_meta:
        return NotImplemented
    dtype = kwargs.get("dtype") or args[0].dtype
    known = values.of(args[0])
    if known is None:
        values.note_unknown_read(func)
        return torch.zeros(args[0].shape, dtype=dtype)
    return known.to(dtype, copy=True)


def _copy_into_host(values: KnownValues, func: Any, args: Any, kwargs: Any) -> Any:
    target, source = args[:2]
    if not source.is_meta or target.is_meta:
        return NotImplemented
    known = values.of(source)
    if known is None:
        values.note_unknown_read(func)
        return target.zero_()
    return target.copy_(known)


def _select(values: KnownValues, func: Any, args: Any, kwargs: Any) -> Any:
    tensor = args[0]
    if not tensor.is_meta:
        return NotImplemented
    known = values.of(tensor)
    count = tensor.numel() if known is None else int(known.count_nonzero())
    return torch.empty((count, tensor.dim()), dtype=torch.int64, device=tensor.device)


def _compute(values: KnownValues, func: Any, args: Any, kwargs: Any) -> Any:
    """Compute an operation whose sizes depend on values, if all of its arguments are known."""
    if not args[0].is_meta:
        return NotImplemented
    results = values.computed(func, args, kwargs)
    if results is NotImplemented:
        return results
    if isinstance(results, torch.Tensor):
        return torch.empty_like(results, device=args[0].device)
    if isinstance(results, (tuple, list)):
        return type(results)([torch.empty_like(one, device=args[0].device) for one in results])
    return results


HOST_READS: dict[Any, Any] = {
    aten._local_scalar_dense.default: _read_scalar,
    aten._to_copy.default: _copy_to_host,
    aten.copy_.default: _copy_into_host,
    aten.nonzero.default: _select,
    aten.repeat_interleave.Tensor: _compute,
    aten._unique2.default: _compute,
    aten.unique_consecutive.default: _compute,
    aten.unique_dim.default: _compute,
    aten.bincount.default: _compute,
    aten.equal.default: _compute,
}
"""Operators whose result has values or sizes that the host reads; NotImplemented leaves them to the shape functions."""
