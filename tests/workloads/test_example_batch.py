"""Batches of any size from an example batch."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hf_bsopt.errors import UsageError
from hf_bsopt.memory import trace
from hf_bsopt.workloads.example_batch import check_sizes, digest, expand, forget_values, sequences_in, without_data

VISION = {
    "input_ids": torch.tensor([[5, 6], [7, 8]]),
    "attention_mask": torch.ones(2, 2, dtype=torch.int64),
    "labels": torch.tensor([[5, 6], [7, 8]]),
    "pixel_values": torch.randn(6, 4),
    "image_grid_thw": torch.tensor([[1, 1, 3], [3, 1, 1]]),
}


def test_integers_of_a_vision_model_keep_their_values_at_every_size() -> None:
    batch = expand(VISION, 3, "cpu")
    assert batch["input_ids"].tolist() == [[5, 6], [7, 8], [5, 6]]
    assert batch["image_grid_thw"].tolist() == [[1, 1, 3], [3, 1, 1], [1, 1, 3]]


def test_rows_that_are_packed_grow_with_the_sequences() -> None:
    assert expand(VISION, 3, "cpu")["pixel_values"].shape == (9, 4)


@pytest.mark.parametrize("name", ["labels", "attention_mask"])
def test_values_that_differ_from_batch_to_batch_are_not_kept(name: str) -> None:
    assert not expand(VISION, 3, "cpu")[name].any()


def test_a_model_of_text_alone_gets_zeros() -> None:
    text = {name: VISION[name] for name in ("input_ids", "attention_mask", "labels")}
    assert not any(value.any() for value in expand(text, 4, "cpu").values())


def test_pictures_are_not_black_which_would_be_padding() -> None:
    example = {"input_ids": torch.ones(1, 2, dtype=torch.int64), "pixel_values": torch.zeros(1, 3, 2, 2)}
    assert expand(example, 2, "cpu")["pixel_values"].all()


def test_the_number_of_sequences_is_that_of_the_token_ids() -> None:
    assert sequences_in({"pixel_values": torch.zeros(6, 4), "input_ids": VISION["input_ids"]}) == 2
    assert sequences_in({"x": torch.zeros(3)}) == 3
    assert sequences_in({"x": 3}) == 1


@pytest.mark.parametrize(
    "example",
    [
        {"x": torch.zeros(4, 2), "y": torch.zeros(8)},
        {"input_ids": torch.zeros(4, 2), "y": torch.zeros(6)},
        {"input_ids": torch.zeros(8, 2), "position_ids": torch.zeros(1, 2)},
    ],
)
def test_tensors_that_are_not_of_one_batch_are_refused(example: dict[str, torch.Tensor]) -> None:
    with pytest.raises(UsageError, match="different sizes"):
        check_sizes(example)


@pytest.mark.parametrize(("names", "kept"), [(["input_ids", "image_grid_thw"], [1, 1]), (["input_ids", "x"], [0, 0])])
def test_values_of_a_batch_are_known_only_next_to_images(names: list[str], kept: list[int]) -> None:
    read: list[int] = []

    def step(model: nn.Module, batch_size: int) -> None:
        made = {name: torch.ones(1, dtype=torch.int64) for name in names} | {"labels": torch.ones(1, dtype=torch.int64)}
        forget_values({**made, "nested": {"x": torch.ones(2)}})
        read[:] = [int(value) for value in made.values()]

    trace(nn.Module, step)
    assert read == [*kept, 0]


def test_answers_for_images_of_other_sizes_are_not_mixed_up() -> None:
    other = {**VISION, "image_grid_thw": torch.tensor([[1, 3, 1], [1, 1, 3]])}
    assert digest(VISION) != digest(other)
    assert digest(VISION) == digest({**VISION, "labels": torch.zeros(2, 2)})
    assert digest({"input_ids": VISION["input_ids"], "x": torch.ones(2, dtype=torch.int64)}) == ""


def test_another_process_gets_the_integers_and_the_shapes_of_the_rest() -> None:
    sent = without_data({**VISION, "scale": 2.0})
    assert sent["pixel_values"].is_meta
    assert sent["image_grid_thw"].tolist() == VISION["image_grid_thw"].tolist()
    assert sent["scale"] == 2.0
    assert expand(sent, 2, "cpu")["pixel_values"].shape == (6, 4)
