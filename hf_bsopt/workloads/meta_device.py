"""Modules on PyTorch's ``meta`` device, which has shapes but no storage, and from there to a real device."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from .rebinding import rebind_attributes

META = torch.device("meta")


def on_meta(module: nn.Module) -> nn.Module:
    """Return the module if all of it is on ``meta``, else a copy that is, with the same tied weights. The module itself
    is not changed.
    """
    if all(tensor.device == META for tensor in (*module.parameters(), *module.buffers())):
        return module
    return with_empty_tensors(module, META, {})


RANDOM_WEIGHTS_STD = 0.02
"""Standard deviation of random weights; the default ``initializer_range`` of transformers' configurations."""


def initialized(module: nn.Module, device: str) -> nn.Module:
    """Return the module if all of it has storage, else a copy on ``device`` that can be trained.

    The copy has small random weights, and zeros in buffers and integer parameters. In both cases the quantization state
    of bitsandbytes' weights is set to zeros.
    """
    if any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers())):
        module = with_empty_tensors(module, torch.device(device), {})
        fill_randomly((*module.parameters(), *module.buffers()))
    for tensor in (*module.parameters(), *module.buffers()):
        for state in _quantization_state(tensor):
            state.zero_()
    return module


def fill_randomly(tensors: Iterable[torch.Tensor]) -> None:
    """Write small random numbers into weights, and zeros into buffers and integers."""
    with torch.no_grad():
        for tensor in tensors:
            if isinstance(tensor, nn.Parameter) and tensor.is_floating_point():
                tensor.normal_(0, RANDOM_WEIGHTS_STD)
            else:
                tensor.zero_()


def tensors_of(model: nn.Module) -> Iterator[torch.Tensor]:
    """Yield parameters, buffers and the quantization state of bitsandbytes' weights."""
    for tensor in (*model.parameters(), *model.buffers()):
        yield tensor
        yield from _quantization_state(tensor)


def _quantization_state(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield the tensors of the ``quant_state`` that bitsandbytes attaches to a quantized weight, nested ones too."""
    states = [getattr(tensor, "quant_state", None)]
    while states:
        state = states.pop()
        for value in vars(state).values() if state is not None else ():
            if isinstance(value, torch.Tensor):
                yield value
            elif type(value) is type(state):
                states.append(value)


def with_empty_tensors(module: nn.Module, device: torch.device, memo: dict[int, Any]) -> nn.Module:
    """Return a copy with uninitialized tensors on ``device``.

    ``memo``: id → copy of the parts that are copied already; the new ones are added.
    """
    for tensor in (*module.parameters(), *module.buffers()):
        if id(tensor) in memo:
            continue
        empty = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=device)
        if isinstance(tensor, nn.Parameter):
            memo[id(tensor)] = nn.Parameter(empty, requires_grad=tensor.requires_grad)
        else:
            memo[id(tensor)] = empty
    return deep_copy(module, memo)


def deep_copy(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """Return a deep copy whose own functions, such as a ``forward`` that was replaced on the instance, run the copy."""
    copied = copy.deepcopy(module, memo)
    rebind_attributes(copied, memo)
    return copied
