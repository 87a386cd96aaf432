"""Integers that came from the host keep their values in a trace."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from integer_operations import OPERATIONS
from torch import nn

from hf_bsopt._utils.known_values import make_unknown
from hf_bsopt._utils.lazy_tensors import MAX_DEPTH
from hf_bsopt.errors import TraceError
from hf_bsopt.memory import trace
from hf_bsopt.memory.replay.timeline_by_size import TimelineBySize


def on_host(value: Any) -> torch.Tensor:
    return torch.tensor(value, device="cpu")


def moved(value: Any) -> torch.Tensor:
    return torch.tensor(value, device="cpu").to("meta")


def made(value: Any) -> torch.Tensor:
    return torch.tensor(value)  # looked up in the trace


def traced(step: Any) -> Any:
    """Return the first answer of ``step`` in a trace."""
    answers: list[Any] = []
    trace(lambda: nn.Linear(2, 2), lambda model, batch_size: answers.append(step(model, batch_size)))
    return answers[0]


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("put", [moved, made], ids=["moved", "made on the device"])
def test_operations_on_integers_give_what_the_host_computes(name: str, put: Any) -> None:
    assert traced(lambda *_: OPERATIONS[name](put)) == OPERATIONS[name](on_host)


def test_a_selection_by_a_known_mask_has_as_many_rows_as_the_mask_has_elements() -> None:
    def step(model: nn.Module, batch_size: int) -> Any:
        x, mask = torch.randn(4, 8), moved([0, 1, 1, 0]) > 0
        return tuple(x[mask].shape), tuple(torch.masked_select(x, mask[:, None]).shape)

    assert traced(step) == ((2, 8), (16,))


def test_a_selection_by_a_computed_mask_selects_everything() -> None:
    def step(model: nn.Module, batch_size: int) -> Any:
        x = torch.randn(4, 8)
        return tuple(x[x.sum(-1) > 0].shape), tuple((moved([1, 0, 1, 0])[x.sum(-1) > 0]).shape)

    assert traced(step) == ((4, 8), (4,))


def test_what_is_computed_from_unknown_values_is_unknown_also_after_a_write_in_place() -> None:
    def step(model: nn.Module, batch_size: int) -> Any:
        x = moved([1, 2])
        x += torch.randn(2).argmax()
        return x.tolist()

    assert traced(step) == [0, 0]


def test_random_integers_are_unknown() -> None:
    assert traced(lambda *_: torch.randint(5, 9, (2,)).tolist()) == [0, 0]


def test_a_later_change_of_the_host_tensor_changes_nothing() -> None:
    def step(model: nn.Module, batch_size: int) -> Any:
        host = torch.tensor([1, 2], device="cpu")
        on_device = host.to("meta")
        host.zero_()
        return on_device.tolist()

    assert traced(step) == [1, 2]


def test_long_chains_of_operations_are_computed() -> None:
    def step(model: nn.Module, batch_size: int) -> Any:
        x = moved([0])
        for _ in range(20 * MAX_DEPTH):
            x = x + 1
        return x.tolist()

    assert traced(step) == [20 * MAX_DEPTH]


def test_values_can_be_made_unknown() -> None:
    def step(model: nn.Module, batch_size: int) -> Any:
        x = moved([1, 2])
        make_unknown([x, None, 3])
        return x[1:].tolist()

    assert traced(step) == [0]


def test_pictures_that_are_not_black_are_counted() -> None:
    """Idefics3 drops the black pictures with which a batch is padded."""

    def step(model: nn.Module, batch_size: int) -> Any:
        pictures = torch.ones(2, 3, 16, 16, device="cpu")
        pictures[1] = 0
        pictures = pictures.to("meta").to(torch.float16)
        is_real = (pictures == 0.0).sum(dim=(-1, -2, -3)) != 768
        return is_real.tolist(), pictures[is_real].shape[0]

    assert traced(step) == ([True, False], 1)


def test_a_step_whose_operations_depend_on_the_values_of_the_batch_is_traced_at_each_size() -> None:
    def step(model: nn.Module, batch_size: int) -> None:
        lengths = torch.tensor([2] * batch_size, device="cpu").to("meta")
        rows = torch.randn(2 * batch_size, 1000)
        sum(model(part).sum() for part in rows.split(lengths.tolist())).backward()  # type: ignore[union-attr]

    timeline = trace(lambda: nn.Linear(1000, 1000), step)
    assert isinstance(timeline, TimelineBySize)
    assert timeline.peak(4).allocated_bytes < timeline.peak(16).allocated_bytes
    assert timeline.peak(16) == timeline.at(16).peak(16)
    with pytest.raises(ValueError, match="at least 1"):
        timeline.peak(0)


def test_a_step_that_fails_after_reading_a_computed_value_names_the_line_and_the_rehearsal() -> None:
    def step(model: nn.Module, batch_size: int) -> int:
        return 7 // int(torch.randn(2).argmax())

    with pytest.raises(TraceError, match=r"ZeroDivisionError.* in test_known_values\.py, line \d+.*hf-bsopt rehearse"):
        traced(step)


def test_an_error_of_the_step_itself_is_raised_as_it_is() -> None:
    def step(model: nn.Module, batch_size: int) -> int:
        return 7 // int(moved([0]))

    with pytest.raises(ZeroDivisionError):
        traced(step)
