"""What PyTorch does in place on a card, and not under a dispatch mode, so that a trace has to do it itself.

Under such a mode every tensor counts as one of a subclass (``isTensorSubclassLike``, ATen/TensorSubclassLikeUtils.h),
so that composite operations take forms that make a new tensor: `linear` adds its bias to a copy where it can't be fused
(ATen/native/Linear.cpp), and the gradients of indexing, sorting and gathering are written into a copy of their zeros
(torch/csrc/autograd/FunctionsManual.cpp). The autograd engine sums two gradients in a third (input_buffer.cpp).
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

INTO_ZEROS = {
    aten.index_put.default: aten.index_put_.default,
    aten.index_add.default: aten.index_add_.default,
    aten.scatter.src: aten.scatter_.src,
    aten.scatter_add.default: aten.scatter_add_.default,
}
"""Of a gradient, in a backward pass, into the zeros that were made for it last."""


class Linears:
    """Whether a call of ``linear`` is under way: the only sum in it is that with the bias."""

    def __init__(self) -> None:
        self.under_way = 0

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """While it lasts. Modules look the function up by its name at each call."""
        original = functional.linear

        def linear(*args: Any, **kwargs: Any) -> torch.Tensor:
            self.under_way += 1
            try:
                return original(*args, **kwargs)
            finally:
                self.under_way -= 1

        functional.linear = linear  # type: ignore[assignment]
        try:
            yield
        finally:
            functional.linear = original  # type: ignore[assignment]


def engine_adds_in_place(args: Any, alone: tuple[int, int]) -> bool:
    """Is this the autograd engine summing two gradients of one tensor?

    It does so in place where nobody else holds the first (input_buffer.cpp, can_accumulate_inplace), but never under a
    dispatch mode, so that it has to be done here. The engine's own reference makes one more than Python code has.
    """
    if len(args) != 2 or torch.is_grad_enabled() or torch._C._current_autograd_node() is None:
        return False
    first, second = args
    return (
        isinstance(second, torch.Tensor)
        and first.is_meta
        and first.shape == second.shape
        and first.dtype == second.dtype
        and (first._use_count(), torch._C._storage_Use_Count(first.untyped_storage()._cdata)) == alone
    )


@functools.cache
def engine_use_counts() -> tuple[int, int]:
    """References to a gradient and its storage, as a dispatch mode sees them, when the engine alone holds it."""
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
