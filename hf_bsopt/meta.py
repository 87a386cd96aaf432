"""Modules on PyTorch's ``meta`` device: shapes and no storage."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

META = torch.device("meta")


def on_meta(module: nn.Module) -> nn.Module:
    """The module if all of it is on ``meta``, else a copy that is, ties kept: weights elsewhere are left alone."""
    return _emptied(module, META)


def with_storage(module: nn.Module, device: str) -> nn.Module:
    """The module if all of it has storage, else a copy on ``device`` with whatever lies in memory there, ties kept."""
    if not any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers())):
        return module
    return _emptied(module, torch.device(device))


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
