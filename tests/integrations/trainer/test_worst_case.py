"""The longest examples of a dataset, from columns or from examples."""

from __future__ import annotations

from typing import Any

import datasets
import pytest
import torch
from trainers import Pad, Texts

from hf_bsopt.errors import UsageError
from hf_bsopt.integrations.trainer import worst_case as worst_case_module
from hf_bsopt.integrations.trainer.worst_case import worst_case

TAIL = [8] * 40 + [90] + [10] * 40


def columns(lengths: list[int]) -> datasets.Dataset:
    return datasets.Dataset.from_list([Texts(lengths)[index] for index in range(len(lengths))])


@pytest.mark.parametrize("make", [Texts, columns], ids=["examples", "columns"])
def test_batch_is_as_long_as_the_longest_example_in_any_order(make: Any) -> None:
    worst = worst_case(make(TAIL), Pad())
    assert worst.length == 90
    assert [tuple(worst.batch(size)["input_ids"].shape) for size in (1, 2, 7)] == [(1, 90), (2, 90), (7, 90)]
    assert tuple(Pad()([make(TAIL)[index] for index in range(7)])["input_ids"].shape) == (7, 8)


@pytest.mark.parametrize("make", [Texts, columns], ids=["examples", "columns"])
def test_one_example_is_padded_so_the_mask_is_needed(make: Any) -> None:
    worst = worst_case(make(TAIL), Pad())
    assert worst.batch(5)["attention_mask"].sum(1).tolist() == [90] * 4 + [8]
    assert worst.batch(5, padded=False)["attention_mask"].sum(1).tolist() == [90] * 5


@pytest.mark.parametrize("make", [list, datasets.Dataset.from_list], ids=["examples", "columns"])
def test_multiple_choice_length_is_the_longest_times_the_number_of_choices(make: Any) -> None:
    """Multiple choice: each example is a list of sequences, which are padded to the longest."""
    rows = [{"input_ids": [[1] * 5, [1] * few, [1] * 3, []]} for few in [5] * 20 + [40] + [6] * 20]
    worst = worst_case(make(rows), lambda examples: {"longest": max(len(c) for e in examples for c in e["input_ids"])})
    assert worst.length == 4 * 40
    assert worst.batch(2) == {"longest": 40}
    deeper = [{"pixels": [row["input_ids"]]} for row in rows]
    assert worst_case(make(deeper), len).length == 4 * 40


def test_equal_lengths_are_not_padded() -> None:
    assert worst_case(Texts([16] * 4), Pad()).batch(4)["attention_mask"].sum(1).tolist() == [16] * 4


def test_longest_examples_alternate_in_a_batch() -> None:
    batch = worst_case(Texts([16, 16, 16, 4]), Pad()).batch(6, padded=False)
    assert len({tuple(row) for row in batch["input_ids"].tolist()}) == 3


def test_selected_rows_decide_the_lengths() -> None:
    assert worst_case(columns(TAIL).select(range(40)), Pad()).length == 8


def test_transform_decides_the_lengths() -> None:
    twice = columns(TAIL).with_transform(lambda rows: {name: [v * 2 for v in rows[name]] for name in rows})
    assert worst_case(twice, Pad()).length == 180


class Summaries(torch.utils.data.Dataset[dict[str, list[int]]]):
    """A dataset in which the longest text has a short summary and vice versa."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        text, summary = [(50, 3), (10, 30), (20, 20)][index]
        return {"input_ids": [1] * text, "attention_mask": [1] * text, "labels": [2] * summary}


def test_longest_text_and_longest_summary_are_combined() -> None:
    def pad(examples: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        lengths = {name: max(len(example[name]) for example in examples) for name in examples[0]}
        return {
            name: torch.tensor([e[name] + [0] * (lengths[name] - len(e[name])) for e in examples]) for name in lengths
        }

    batch = worst_case(Summaries(), pad).batch(4)
    assert {name: tuple(value.shape) for name, value in batch.items()} == {
        "input_ids": (4, 50),
        "attention_mask": (4, 50),
        "labels": (4, 30),
    }


def test_large_dataset_is_sampled_evenly_and_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worst_case_module, "MAX_READ", 10)
    worst = worst_case(Texts([8] * 99 + [64]), Pad())
    assert (worst.length, worst.read, worst.total) == (64, 10, 100)
    assert "lengths of 10 of the 100" in worst.note


def test_images_are_compared_by_size() -> None:
    class Images(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
        def __len__(self) -> int:
            return 4

        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            return {"pixel_values": torch.zeros(3, 8 + index, 8)}

    def stack(examples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        return {"pixel_values": torch.stack([example["pixel_values"] for example in examples])}

    assert tuple(worst_case(Images(), stack).batch(3, padded=False)["pixel_values"].shape) == (3, 3, 11, 8)


def test_collator_that_pops_keys_does_not_change_later_batches() -> None:
    def pop(examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        return {"labels": torch.tensor([example.pop("labels") for example in examples]), **Pad()(examples)}

    worst = worst_case(Texts([8] * 4), pop)
    assert tuple(worst.batch(6)["labels"].shape) == tuple(worst.batch(6)["labels"].shape) == (6,)


def test_empty_dataset_is_rejected() -> None:
    with pytest.raises(UsageError, match="has no examples"):
        worst_case(Texts([]), Pad())
