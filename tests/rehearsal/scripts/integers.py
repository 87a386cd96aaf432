"""Print what operations on integers give on the device, also in a forward pass that a checkpoint repeats."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "helpers"))
from integer_operations import OPERATIONS

from hf_bsopt.virtual_gpu import data_dependent_ops

data_dependent_ops.install()


def moved(value: Any) -> torch.Tensor:
    return torch.tensor(value).cuda()


def made(value: Any) -> torch.Tensor:
    return torch.tensor(value, device="cuda")


def read_in_checkpoint(use_reentrant: bool) -> list[list[int]]:
    """Return the sizes that were read in the forward pass and in its repetition."""
    read: list[list[int]] = []
    sizes = moved([1, 3])

    def split(x: torch.Tensor) -> torch.Tensor:
        read.append((sizes * 2).tolist())
        return torch.cat([part * 2 for part in x.split(read[-1])]).exp()

    x = torch.randn(8, 2, device="cuda", requires_grad=True)
    checkpoint(split, x, use_reentrant=use_reentrant).sum().backward()
    return read


facts: dict[str, Any] = {name: [run(moved), run(made)] for name, run in OPERATIONS.items()}
facts |= {f"checkpoint {how}": read_in_checkpoint(how) for how in (False, True)}
counts = moved([1, 2])
counts.random_(4, 9)
facts["changed by another operation"] = counts.tolist()
counts += 1
facts["changed by another operation, then by one that is known"] = counts.tolist()
x = torch.randn(4, 8, device="cuda")
facts["computed"] = x.argmax().item()
facts["selected by a computed mask"] = len(x[x.sum(-1) > 0])
facts["selected by a known mask"] = len(x[moved([0, 1, 1, 0]) > 0])
facts["random"] = torch.randint(5, 9, (2,), device="cuda").tolist()
black = torch.ones(2, 3, 16, 16)
black[1] = 0
facts["pictures"] = ((black.cuda().half() == 0.0).sum(dim=(-1, -2, -3)) != 768).tolist()
host = torch.zeros(2, dtype=torch.int64)
facts["copied into a host tensor"] = host.copy_(moved([3, 4])).tolist()
print("FACTS", json.dumps(facts))
