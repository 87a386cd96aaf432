"""A module that allocates memory on the GPU and then hangs."""

from __future__ import annotations

import signal
from pathlib import Path

import torch
from torch import nn

BYTES = 64 * 2**20


class Hangs(nn.Module):
    """A module whose forward pass writes the allocated bytes to ``report_file`` and then waits forever."""

    def __init__(self, report_file: str) -> None:
        super().__init__()
        self.report_file = report_file
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        if x.is_cuda:
            taken = torch.zeros(BYTES, dtype=torch.uint8, device="cuda")
            Path(self.report_file).write_text(str(taken.numel()))
            signal.pause()
        return {"loss": self.layer(x).sum()}
