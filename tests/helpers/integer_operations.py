"""Operations on small integers, whose results are the same on a device that computes nothing as on the host."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Operation = Callable[[Callable[[Any], torch.Tensor]], Any]


def _written_in_place(put: Callable[[Any], torch.Tensor]) -> Any:
    x = put([0, 0, 0, 0])
    x[1] = 5
    x[2:] += 7
    x[0].copy_(put(9))
    x[1] |= ~torch.any(x > 9)
    return x.tolist()


def _window_offsets(put: Callable[[Any], torch.Tensor]) -> Any:
    grid = put([[1, 4, 6], [2, 2, 2]])
    lengths = torch.repeat_interleave(grid[:, 1] * grid[:, 2], grid[:, 0])
    return torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0), value=0).tolist()


OPERATIONS: dict[str, Operation] = {
    "a copy": lambda put: put([[1, 4, 6]]).tolist(),
    "a view": lambda put: put([[1, 4, 6], [2, 3, 4]]).t()[1:].reshape(-1).tolist(),
    "one element": lambda put: int(put([1, 4, 6])[2]),
    "a product": lambda put: (put([[1, 4, 6]]).prod(-1) // 4).tolist(),
    "offsets": _window_offsets,
    "a comparison": lambda put: bool((put([3, 4]) >= 3).all()),
    "a selection by a mask": lambda put: put([5, 6, 7])[put([5, 6, 7]) > 5].tolist(),
    "positions": lambda put: (put([0, 2, 0, 3]) != 0).nonzero().tolist(),
    "positions as a tuple": lambda put: torch.where(put([0, 2, 0, 3]) > 0)[0].tolist(),
    "distinct values": lambda put: torch.unique(put([3, 1, 3])).tolist(),
    "counts of values": lambda put: torch.bincount(put([3, 1, 3])).tolist(),
    "one-hot codes": lambda put: tuple(torch.nn.functional.one_hot(put([0, 3])).shape),
    "an index": lambda put: put([5, 6, 7])[put([2, 0])].tolist(),
    "a range": lambda put: (torch.arange(int(put(3)), device=put(0).device) + 1).tolist(),
    "parts": lambda put: [one.tolist() for one in put([1, 2, 3]).split(put([1, 2]).tolist())],
    "a concatenation": lambda put: torch.cat([put([1]), put([2, 3])]).tolist(),
    "writes in place": _written_in_place,
    "a mean": lambda put: put([1, 2, 3, 6]).float().mean().item(),
    "sorted": lambda put: put([3, 1, 2]).sort().values.tolist(),
}
