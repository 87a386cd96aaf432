"""A copy of a module runs itself, whatever refers to the original."""

from __future__ import annotations

import functools
import types
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from hf_bsopt.workloads.module import copy_on_meta
from hf_bsopt.workloads.rebinding import Rebinder

GLOBAL: Any = None


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.inner(hidden)  # type: ignore[no-any-return]


class Patcher:
    def __init__(self, model: Layer) -> None:
        self.model = model
        self.calls = 0

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.model.inner(hidden)  # type: ignore[no-any-return]


def by_closure(model: Layer) -> Callable[..., Any]:
    before = model.forward

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        return before(hidden)

    return forward


def by_wrapped_method(model: Layer) -> Callable[..., Any]:
    """trl's fused head: a method on the instance, made to look like the class's, over the one that was there."""
    before = model.forward

    @functools.wraps(Layer.forward)
    def forward(self: Layer, hidden: torch.Tensor) -> torch.Tensor:
        return before(hidden)

    return types.MethodType(forward, model)


def by_default(model: Layer) -> Callable[..., Any]:
    def forward(hidden: torch.Tensor, *, layers: tuple[nn.Module, ...] = (model.inner,)) -> torch.Tensor:
        return layers[0](hidden)  # type: ignore[no-any-return]

    return forward


def by_partial(model: Layer) -> Callable[..., Any]:
    return functools.partial(lambda part, hidden: part.inner(hidden), model)


def by_object(model: Layer) -> Callable[..., Any]:
    return Patcher(model).forward


def by_object_in_a_closure(model: Layer) -> Callable[..., Any]:
    patcher = Patcher(model)
    return lambda hidden: patcher.forward(hidden)


def by_weak_reference(model: Layer) -> Callable[..., Any]:
    reference = weakref.ref(model)
    return lambda hidden: reference().inner(hidden)  # type: ignore[union-attr]


def by_global(model: Layer) -> Callable[..., Any]:
    globals()["GLOBAL"] = model.forward
    return lambda hidden: GLOBAL(hidden)


def by_function_that_calls_itself(model: Layer) -> Callable[..., Any]:
    def forward(hidden: torch.Tensor, times: int = 2) -> torch.Tensor:
        return forward(hidden, times - 1) if times else model.inner(hidden)

    return forward


def by_weight(model: Layer) -> Callable[..., Any]:
    weight = model.inner.weight
    return lambda hidden: hidden @ weight


WAYS = (
    by_closure,
    by_wrapped_method,
    by_default,
    by_partial,
    by_object,
    by_object_in_a_closure,
    by_weak_reference,
    by_global,
    by_function_that_calls_itself,
    by_weight,
)


@pytest.mark.parametrize("replace", WAYS, ids=lambda way: way.__name__)
def test_replaced_forward_of_a_copy_runs_the_copy(replace: Callable[[Layer], Any]) -> None:
    model = nn.Sequential(Layer(), Layer())
    model[1].forward = replace(model[1])  # type: ignore[arg-type]
    kept = model[1].forward
    for copied in (copy_on_meta(model), copy_on_meta(copy_on_meta(model))):
        output = copied(torch.empty(3, 4, device="meta"))
        assert output.is_meta
        output.sum().backward()
        assert copied[1].inner.weight.grad is not None  # type: ignore[index]
    assert model[1].forward is kept
    assert model(torch.zeros(3, 4)).device.type == "cpu"
    assert model[1].inner.weight.grad is None


def test_hook_of_a_copy_refers_to_the_copy() -> None:
    model = Layer()
    model.register_forward_hook(lambda module, args, output: output @ model.inner.weight)
    assert copy_on_meta(model)(torch.empty(3, 4, device="meta")).is_meta


def test_object_of_a_patch_is_not_changed_by_its_copy() -> None:
    model = Layer()
    patcher = Patcher(model)
    model.forward = lambda hidden: patcher.forward(hidden)  # type: ignore[method-assign]
    copy_on_meta(model)(torch.empty(3, 4, device="meta"))
    assert patcher.calls == 0
    assert patcher.model is model


def test_functions_that_refer_to_no_module_stay_the_same() -> None:
    numbers = [1, 2]

    def count() -> int:
        return len(numbers)

    assert Rebinder({id(nn.Linear(1, 1)): nn.Linear(1, 1)})(count) is count
