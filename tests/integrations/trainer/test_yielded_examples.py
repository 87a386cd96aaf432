"""Data that cannot be indexed is sized by what it yields, and the training misses none of it."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset
from trainers import Pad, Texts, trainer
from transformers import Trainer, ViTConfig, ViTForImageClassification, default_data_collator

from hf_bsopt.errors import UsageError
from hf_bsopt.integrations.trainer import find_batch_size
from hf_bsopt.integrations.trainer.workload import trainer_workload
from hf_bsopt.integrations.trainer.worst_case import worst_case

SIZE = 16


def pictures() -> ViTForImageClassification:
    config = ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=SIZE, patch_size=8)
    return ViTForImageClassification(config)


def picture(number: int) -> dict[str, Any]:
    return {"pixel_values": torch.full((3, SIZE, SIZE), float(number)), "labels": number % 2}


class Pictures(IterableDataset[dict[str, Any]]):
    """A stream that begins anew each time, and counts how far it was read."""

    def __init__(self) -> None:
        self.position = 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for number in range(10):
            self.position += 1
            yield picture(number)


class OnePass(Pictures):
    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self

    def __next__(self) -> dict[str, Any]:
        if self.position == 10:
            raise StopIteration
        self.position += 1
        return picture(self.position - 1)


class Uncopyable(OnePass):
    def __init__(self) -> None:
        super().__init__()
        self.source = (number for number in range(10))


class Lines(IterableDataset[dict[str, Any]]):
    """A stream that reads on from one open file, whoever iterates."""

    def __init__(self) -> None:
        self.file = io.BytesIO(b"0\n1\n2\n3\n4\n5\n6\n7\n")

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while line := self.file.readline():
            yield picture(int(line))


def shapes(batch: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in batch.items()}


@pytest.mark.parametrize("kind", [Pictures, OnePass, Lines])
def test_a_stream_without_tokens_is_sized_by_its_first_examples_and_not_consumed(kind: Any, tmp_path: Path) -> None:
    stream = kind()
    workload = trainer_workload(trainer(tmp_path, pictures(), dataset=stream, collator=default_data_collator))
    for size in (1, 5):
        expected = {"pixel_values": (size, 3, SIZE, SIZE), "labels": (size,)}
        assert shapes(workload.batch(size, "meta")) == shapes(workload.batch(size, "cpu")) == expected
    assert any("the first" in note and "all that were read" in note for note in workload.defaults)
    assert [int(example["pixel_values"][0, 0, 0]) for example in stream] == [*range(8 if kind is Lines else 10)]


def test_a_stream_that_can_be_read_only_once_is_refused_in_words(tmp_path: Path) -> None:
    stream = Uncopyable()
    with pytest.raises(
        UsageError, match="can be read only once: give the Trainer an object whose __iter__ begins anew"
    ):
        trainer_workload(trainer(tmp_path, pictures(), dataset=stream, collator=default_data_collator))
    assert stream.position == 0


def test_a_stream_of_pictures_is_found_a_size_for(tmp_path: Path) -> None:
    made = trainer(
        tmp_path, pictures(), dataset=Pictures(), collator=default_data_collator, per_device_train_batch_size=4
    )
    report = find_batch_size(made, device="predict", gpu="T4", batch_size=2)
    assert (made.args.per_device_train_batch_size, made.args.gradient_accumulation_steps) == (2, 2)
    assert report.plan.effective_batch == 4


class OwnLoader(Trainer):
    """A Trainer whose dataloader is an object of its own."""

    rows: int | None = None

    def get_train_dataloader(self) -> Any:
        size = self.rows or self._train_batch_size
        return [
            {"input_ids": torch.ones(size, length, dtype=torch.long), "labels": torch.zeros(size, dtype=torch.long)}
            for length in (8, 24, 16)
        ]


class FixedLoader(OwnLoader):
    rows = 5


class ListLoader(OwnLoader):
    def get_train_dataloader(self) -> Any:
        return [[1, 2]]


class OneIterator(OwnLoader):
    kept: Any = None

    def get_train_dataloader(self) -> Any:
        self.kept = self.kept or (batch for batch in super().get_train_dataloader())
        return self.kept


def test_a_dataloader_without_a_dataset_is_sized_by_the_batches_that_it_yields(tmp_path: Path) -> None:
    workload = trainer_workload(trainer(tmp_path, kind=OwnLoader))
    for size in (1, 9):
        expected = {"input_ids": (size, 24), "labels": (size,)}
        assert shapes(workload.batch(size, "meta")) == shapes(workload.batch(size, "cpu")) == expected


@pytest.mark.parametrize(
    ("kind", "problem"),
    [
        (FixedLoader, r"yields batches of 5, not of the 8 that the arguments ask for: let it take its batch size"),
        (ListLoader, r"has no dataset, and its batches are not a dict of tensors"),
        (OneIterator, r"the dataloader is an iterator, which can be read only once"),
    ],
)
def test_a_dataloader_whose_size_cannot_be_changed_is_refused_in_words(kind: Any, problem: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=problem):
        trainer_workload(trainer(tmp_path, kind=kind, per_device_train_batch_size=8))


class Buckets(Dataset[dict[str, Any]]):
    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> dict[str, Any]:
        length = 8 if index < 6 else 24
        return {"input_ids": torch.ones(length, dtype=torch.long), "labels": torch.tensor(0)}


class InBuckets(Trainer):
    """A Trainer whose batches are of equal lengths, so that its collator need not pad."""

    def get_train_dataloader(self) -> Any:
        batches = [[0, 1, 2, 3], [6, 7, 8, 9]]
        return DataLoader(self.train_dataset, batch_sampler=batches, collate_fn=self.data_collator)


def test_batches_of_equals_are_sized_by_the_longest_equals(tmp_path: Path) -> None:
    workload = trainer_workload(trainer(tmp_path, dataset=Buckets(), kind=InBuckets, collator=default_data_collator))
    assert shapes(workload.batch(3, "cpu")) == {"input_ids": (3, 24), "labels": (3,)}
    assert any("the collator takes only examples of one length" in note for note in workload.defaults)


def test_a_collator_that_takes_nothing_is_refused_with_its_error() -> None:
    def broken(examples: list[Any]) -> Any:
        raise KeyError("prompt")

    with pytest.raises(UsageError, match=r"does not take the longest examples of the dataset: 'prompt'"):
        worst_case(Texts([4, 8]), broken)


def test_examples_that_are_padded_are_still_mixed() -> None:
    case = worst_case(Texts([4, 8, 8]), Pad())
    assert not case.is_of_equals and case.batch(3)["attention_mask"].sum(1).tolist() == [8, 8, 4]
