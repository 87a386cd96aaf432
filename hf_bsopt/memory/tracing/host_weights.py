"""Weights on the host in a traced step, where nothing but the copy of the model on ``meta`` should train."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ...errors import REHEARSE, TraceError


def check_on_device(operation: str, args: Any) -> None:
    """Raise TraceError if a weight, or another tensor from which a graph begins, is on the host: what follows from it
    would be computed for real and counted as nothing. Other tensors may be there: counters of an optimizer, labels that
    a model reads, a copy of the logits.
    """
    for value in args:
        if isinstance(value, (tuple, list)):
            check_on_device(operation, value)
        elif isinstance(value, torch.Tensor) and not value.is_meta and _begins_a_graph(value):
            raise TraceError(
                f"the step cannot be traced: {operation} runs on {value.device} with a weight of shape "
                f"{list(value.shape)} that is not in the copy of the model that is traced, so something in the step "
                f"refers to a module outside it. {REHEARSE}"
            )


def _begins_a_graph(tensor: torch.Tensor) -> bool:
    return isinstance(tensor, nn.Parameter) or (tensor.requires_grad and tensor.is_leaf)
