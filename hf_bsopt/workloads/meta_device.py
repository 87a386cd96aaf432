"""Modules on PyTorch's ``meta`` device, which has shapes but no storage, and from there to a real device."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from .rebinding import rebind_attributes

META = torch.device("meta")


def on_meta(module: nn.Module) -> nn.Module:
    """Return the module if all of it is on ``meta``, else a copy that is, with the same tied weights. The module itself
    is not changed.
    """
    return _with_empty_tensors(module, META)


RANDOM_WEIGHTS_STD = 0.02
"""Standard deviation of random weights; the default ``initializer_range`` of transformers' configurations."""


def initialized(module: nn.Module, device: str) -> nn.Module:
    """Return the module if all of it has storage, else a copy on ``device`` that can be trained.

    The copy has small random weights, and zeros in buffers and integer parameters. In both cases the quantization state
    of bitsandbytes' weights is set to zeros.
    """
    if any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers())):
        module = _with_empty_tensors(module, torch.device(device))
        with torch.no_grad():
            for parameter in module.parameters():
                if parameter.is_floating_point():
                    parameter.normal_(0, RANDOM_WEIGHTS_STD)
                else:
                    parameter.zero_()
            for buffer in module.buffers():
                buffer.zero_()
    for tensor in (*module.parameters(), *module.buffers()):
        for state in _quantization_state(tensor):
            state.zero_()
    return module


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


def _with_empty_tensors(module: nn.Module, device: torch.device) -> nn.Module:
    """Return the module if all of it is on ``device``, else a copy with uninitialized tensors there."""
    tensors = [*module.parameters(), *module.buffers()]
    if all(tensor.device == device for tensor in tensors):
        return module
    memo: dict[int, Any] = {}
    for tensor in tensors:
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
