"""Modules on PyTorch's ``meta`` device: shapes and no storage."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

META = torch.device("meta")


def on_meta(module: nn.Module) -> nn.Module:
    """The module if all of it is on ``meta``, else a copy that is, ties kept: weights elsewhere are left alone."""
    return _emptied(module, META)


SMALL = 0.02
"""Standard deviation of weights that are made up, as transformers' configurations have it (initializer_range)."""


def initialized(module: nn.Module, device: str) -> nn.Module:
    """The module if all of it has storage, else a copy of it on ``device`` that can be trained: small random weights,
    and zeros in what is no weight. What bitsandbytes keeps beside a quantized weight is zeros.
    """
    if any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers())):
        module = _emptied(module, torch.device(device))
        with torch.no_grad():
            for parameter in module.parameters():
                if parameter.is_floating_point():
                    parameter.normal_(0, SMALL)
                else:
                    parameter.zero_()
            for buffer in module.buffers():
                buffer.zero_()
    for tensor in (*module.parameters(), *module.buffers()):
        for part in _quantized_parts(tensor):
            part.zero_()
    return module


def tensors_of(model: nn.Module) -> Iterator[torch.Tensor]:
    """Parameters, buffers and what bitsandbytes keeps beside a quantized weight."""
    for tensor in (*model.parameters(), *model.buffers()):
        yield tensor
        yield from _quantized_parts(tensor)


def _quantized_parts(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    states = [getattr(tensor, "quant_state", None)]
    while states:
        state = states.pop()
        for value in vars(state).values() if state is not None else ():
            if isinstance(value, torch.Tensor):
                yield value
            elif type(value) is type(state):
                states.append(value)


def _emptied(module: nn.Module, device: torch.device) -> nn.Module:
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
    return copy.deepcopy(module, memo)
