"""Operations that PyTorch runs in place on a GPU but not under a dispatch mode, so the trace makes them in place.

Under a dispatch mode every tensor counts as a tensor subclass (``isTensorSubclassLike``,
ATen/TensorSubclassLikeUtils.h), and composite operations take the variant that makes a new tensor: ``linear`` adds its
bias out of place when it cannot be fused (ATen/native/Linear.cpp), and gradients of indexing, sorting and gathering are
written into a copy of their zeros (torch/csrc/autograd/FunctionsManual.cpp). The autograd engine sums two gradients
into a third (input_buffer.cpp).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from ...workloads.meta_device import META

aten = torch.ops.aten

IN_PLACE_VARIANT = {
    aten.index_put.default: aten.index_put_.default,
    aten.index_add.default: aten.index_add_.default,
    aten.scatter.src: aten.scatter_.src,
    aten.scatter_add.default: aten.scatter_add_.default,
}
"""The in-place variant used in a backward pass, when a gradient is written into zeros that were just allocated."""


class LinearCalls:
    """Count of running calls of ``linear``: the only addition inside one is that of the bias."""

    def __init__(self) -> None:
        self.active = 0

    @contextlib.contextmanager
    def track(self) -> Iterator[None]:
        """Count calls while the context is open. Modules look ``functional.linear`` up at each call, so it can be
        replaced.
        """
        original = functional.linear

        def linear(*args: Any, **kwargs: Any) -> torch.Tensor:
            self.active += 1
            try:
                return original(*args, **kwargs)
            finally:
                self.active -= 1

        functional.linear = linear  # type: ignore[assignment]
        try:
            yield
        finally:
            functional.linear = original  # type: ignore[assignment]


def is_in_place_gradient_sum(args: Any, sole_owner: tuple[int, int]) -> bool:
    """Return whether this addition is the autograd engine summing two gradients of one tensor in place.

    The engine sums in place if nothing else references the first gradient (input_buffer.cpp, can_accumulate_inplace),
    but never under a dispatch mode. ``sole_owner`` is :func:`sole_owner_use_counts`: the engine's own reference adds
    one.
    """
    if len(args) != 2 or torch.is_grad_enabled() or torch._C._current_autograd_node() is None:
        return False
    first, second = args
    return (
        isinstance(second, torch.Tensor)
        and first.is_meta
        and first.shape == second.shape
        and first.dtype == second.dtype
        and (first._use_count(), torch._C._storage_Use_Count(first.untyped_storage()._cdata)) == sole_owner
    )


@functools.cache
def sole_owner_use_counts() -> tuple[int, int]:
    """Return the use counts of a gradient and its storage, seen by a dispatch mode, when only the engine holds it."""
    counts: list[tuple[int, int]] = []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is aten.add.Tensor:
                counts.append((args[0]._use_count(), torch._C._storage_Use_Count(args[0].untyped_storage()._cdata)))
            return func(*args, **(kwargs or {}))

    tensor = torch.empty(2, device=META, requires_grad=True)
    with torch.enable_grad(), Count():
        product = tensor * 2
        torch.autograd.grad((product.exp() * product.sin()).sum(), tensor)
    return counts[-1]
