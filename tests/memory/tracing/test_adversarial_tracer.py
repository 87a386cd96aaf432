"""Steps that leave the traced copy: each is an error that names the operation, never a small number."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from hf_bsopt.errors import TraceError
from hf_bsopt.memory import trace

OUTSIDE = nn.Linear(8, 8)
TABLE = nn.Embedding(10, 8)
LEAF = torch.zeros(8, 8, requires_grad=True)


def step(run: Callable[[nn.Module, torch.Tensor], torch.Tensor]) -> Callable[[nn.Module, int], None]:
    def train(model: nn.Module, batch_size: int) -> None:
        run(model, torch.zeros(batch_size, 8)).sum().backward()

    return train


def through_the_original(model: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    return model(OUTSIDE(torch.zeros(hidden.size(0), 8, device="cpu")).to("meta"))  # type: ignore[no-any-return]


def mixed(model: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    return OUTSIDE(model(hidden))  # type: ignore[no-any-return]


def by_its_table(model: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    return model(hidden) + TABLE(torch.zeros(hidden.size(0), dtype=torch.int64)).to("meta")  # type: ignore[no-any-return]


def without_gradients(model: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        outside = OUTSIDE(torch.zeros(8, device="cpu"))
    return model(hidden) + outside.to("meta")  # type: ignore[no-any-return]


def with_a_leaf(model: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    return model(hidden) @ LEAF  # type: ignore[no-any-return]


@pytest.mark.parametrize("run", [through_the_original, mixed, by_its_table, without_gradients, with_a_leaf])
def test_weight_on_the_host_is_an_error_that_names_the_operation(run: Any) -> None:
    with pytest.raises(TraceError, match=r"aten\.\w+.* runs on cpu with a weight of shape \[\d+, 8\].*rehearse"):
        trace(lambda: nn.Linear(8, 8), step(run))


def test_copies_on_the_host_are_no_error() -> None:
    def run(model: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = model(hidden)
        output.detach().cpu().mean()
        return output

    assert trace(lambda: nn.Linear(8, 8), step(run)).peak(4).allocated_bytes > 0
