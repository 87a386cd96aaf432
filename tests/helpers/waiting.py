"""A module that takes memory on the card and then never answers."""

from __future__ import annotations

import signal
from pathlib import Path

import torch
from torch import nn

BYTES = 64 * 2**20


class Waits(nn.Module):
    """Says in the file ``told`` what it has on the card, once it waits there."""

    def __init__(self, told: str) -> None:
        super().__init__()
        self.told = told
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        if x.is_cuda:
            taken = torch.zeros(BYTES, dtype=torch.uint8, device="cuda")
            Path(self.told).write_text(str(taken.numel()))
            signal.pause()
        return {"loss": self.layer(x).sum()}
