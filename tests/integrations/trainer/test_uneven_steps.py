"""A step of uneven micro-batches is trained as the one batch that was asked for."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from trainers import Texts, classifier, losses, trainer
from transformers import Trainer

from hf_bsopt import BatchSizeCallback, find_batch_size
from hf_bsopt.integrations.trainer.recovery import Recovery
from hf_bsopt.integrations.trainer.uneven_steps import UnevenSteps, weight_in_step

EXAMPLES = 70
"""With 16 = 4 × 4, the last step has 6 examples: 4 and 2."""
SMALL = {"device": "predict", "memory": "1GiB"}


class MeanOfExamples(nn.Module):
    """A model whose loss is a mean over its batch, and which takes no keywords: Trainer divides it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(100, 8), nn.Linear(8, 2)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.head(self.embedding(input_ids).mean(1))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class Examples(Texts):
    def __getitem__(self, index: int) -> dict[str, Any]:
        example = super().__getitem__(index)
        return {"input_ids": example["input_ids"], "labels": int(index * 7 % 5 > 2)}


def made(folder: Path, model: nn.Module, callbacks: Any = None, **values: Any) -> Trainer:
    values = {
        "per_device_train_batch_size": 16,
        "num_train_epochs": 2,
        "max_steps": -1,
        "learning_rate": 1e-2,
        **values,
    }
    return trainer(folder, model, Examples([12] * EXAMPLES), callbacks, **values)


def weights(of: Trainer) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in of.model.parameters()]


def is_trained_like(one: Trainer, other: Trainer) -> bool:
    assert losses(one) == pytest.approx(losses(other), abs=2e-5)
    return all(torch.allclose(a, b, atol=2e-5) for a, b in zip(weights(one), weights(other), strict=True))


@pytest.mark.parametrize("model", [MeanOfExamples, classifier], ids=["divided by Trainer", "ignores the label count"])
@pytest.mark.parametrize("recover", [False, True])
def test_introduced_accumulation_trains_the_uneven_last_step_as_one_batch(
    tmp_path: Path, model: Any, recover: bool
) -> None:
    callback = BatchSizeCallback(**SMALL, batch_size=4, recover=recover)
    ours, plain = made(tmp_path, model(), [callback]), made(tmp_path, model())
    ours.train()
    plain.train()
    assert (ours.args.per_device_train_batch_size, ours.args.gradient_accumulation_steps) == (4, 4)
    assert ours.state.global_step == 2 * 5
    assert is_trained_like(ours, plain)
    assert not {"training_step", "get_batch_samples"} & vars(ours).keys()


def test_a_second_training_weighs_its_steps_too(tmp_path: Path) -> None:
    ours = made(tmp_path, MeanOfExamples(), [BatchSizeCallback(**SMALL, batch_size=4)])
    plain = made(tmp_path, MeanOfExamples())
    for each in (ours, plain):
        each.train()
        each.train()
    assert is_trained_like(ours, plain)


def test_find_batch_size_weighs_them_too(tmp_path: Path) -> None:
    ours, plain = made(tmp_path, MeanOfExamples()), made(tmp_path, MeanOfExamples())
    find_batch_size(ours, **SMALL, batch_size=4)
    copied = copy.deepcopy(ours)
    for each in (ours, plain, copied):
        each.train()
    assert is_trained_like(ours, plain)
    assert is_trained_like(copied, plain)


def test_accumulation_of_the_user_stays_trainers_own(tmp_path: Path) -> None:
    values = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4}
    ours, plain = made(tmp_path, MeanOfExamples(), **values), made(tmp_path, MeanOfExamples(), **values)
    find_batch_size(ours, **SMALL, batch_size=4)
    assert UnevenSteps.of(ours) is None
    ours.train()
    plain.train()
    assert losses(ours) == losses(plain)


def test_a_step_recovered_in_parts_is_weighed_in_both_ways(tmp_path: Path) -> None:
    def full(module: nn.Module, args: Any, kwargs: Any) -> None:
        if len(kwargs["input_ids"]) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    model = MeanOfExamples()
    callback = BatchSizeCallback(**SMALL, batch_size=4, recover=True)
    ours, plain = made(tmp_path, model, [callback]), made(tmp_path, MeanOfExamples())
    model.register_forward_pre_hook(full, with_kwargs=True)
    ours.train()
    plain.train()
    assert callback.recovery is not None and callback.recovery.parts == 2
    assert is_trained_like(ours, plain)


def test_what_was_shadowed_before_is_restored(tmp_path: Path) -> None:
    ours = made(tmp_path, MeanOfExamples())
    before = ours.training_step
    vars(ours)["training_step"] = before
    uneven = UnevenSteps(ours)
    uneven.begin()
    UnevenSteps(ours).begin()
    assert UnevenSteps.of(ours) is uneven
    uneven.end()
    assert vars(ours)["training_step"] is before
    assert "get_batch_samples" not in vars(ours)
    assert Recovery().parts == 1


def test_only_a_micro_batch_of_an_uneven_step_has_a_weight() -> None:
    four, two = {"input_ids": torch.ones(4, 3)}, {"input_ids": torch.ones(2, 3)}
    assert weight_in_step([four, two], four) == 4 / 6
    assert weight_in_step([four, two], two) == 2 / 6
    assert weight_in_step([four, {**four}], four) is None
    assert weight_in_step([four], four) is None
    assert weight_in_step([four, two], {**two}) is None
