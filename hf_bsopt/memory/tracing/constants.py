"""Values of the tensors that ``torch.tensor`` makes on the traced device, which no dispatch mode sees."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from ..._utils.known_values import FOLLOWED, KnownValues


@contextlib.contextmanager
def follow_constants(values: KnownValues) -> Iterator[None]:
    """Remember the integers that ``torch.tensor`` copies to the traced device while the context is open.

    Numbers in its data that are traced tensors themselves are read as by ``item``.
    """
    original = torch.tensor

    def tensor(data: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        data = _read(data)
        made = original(data, *args, **kwargs)
        if made.is_meta and made.dtype in FOLLOWED and not isinstance(data, torch.Tensor):
            values.remember(made, original(data, dtype=made.dtype, device="cpu"))
        return made

    torch.tensor = tensor
    try:
        yield
    finally:
        torch.tensor = original


def _read(data: Any) -> Any:
    if isinstance(data, (list, tuple)):
        return type(data)([_read(part) for part in data]) if type(data) in (list, tuple) else data
    return data.item() if isinstance(data, torch.Tensor) and data.is_meta and data.numel() == 1 else data
