"""An optimizer step that ran out of memory is repeated in parts, and the training stays the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from trainers import Pad, Seen, Texts, classifier, language_model, losses, trainer
from transformers import Trainer

from hf_bsopt.integrations.trainer.recovery import Recovery, _split
from hf_bsopt.integrations.trainer.uneven_steps import weights_by_content

MESSAGE = "CUDA out of memory. Tried to allocate 2.00 GiB"


class RunsOut:
    """A hook that makes a model run out of memory above ``most`` sequences, after ``first`` forward passes."""

    def __init__(self, most: int, first: int = 0, *, in_backward: bool = False) -> None:
        self.most, self.first, self.count = most, first, 0
        self.errors = 0
        self._in_backward = in_backward

    def attach(self, model: nn.Module) -> RunsOut:
        model.register_forward_pre_hook(self._before, with_kwargs=True)
        if self._in_backward:
            next(model.parameters()).register_hook(self._gradient)
        return self

    def _before(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self.count += 1
        self.size = len(kwargs["input_ids"])
        if not self._in_backward:
            self._fail()

    def _gradient(self, gradient: torch.Tensor) -> torch.Tensor:
        self._fail()
        return gradient

    def _fail(self) -> None:
        if self.count > self.first and self.size > self.most:
            self.errors += 1
            raise torch.OutOfMemoryError(MESSAGE)


def trained(made: Trainer, recovery: Recovery | None = None) -> list[float]:
    if recovery is not None:
        recovery.watch(made)
    made.train()
    if recovery is not None:
        recovery.end()
    return losses(made)


def weights(made: Trainer) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in made.model.parameters()]


@pytest.mark.parametrize("in_backward", [False, True], ids=["in the forward pass", "in the backward pass"])
def test_repeated_step_matches_a_run_without_error(tmp_path: Path, in_backward: bool) -> None:
    model = classifier()
    seen = Seen(model)
    full = RunsOut(4, first=2, in_backward=in_backward).attach(model)
    made = trainer(tmp_path, model, per_device_train_batch_size=16, max_steps=4)
    recovery = Recovery()
    ours = trained(made, recovery)
    plain = trainer(tmp_path, per_device_train_batch_size=16, max_steps=4)
    assert ours == pytest.approx(trained(plain), abs=1e-4)
    assert made.state.global_step == 4
    assert (recovery.parts, full.errors) == (4, 2)
    assert [size for size, _ in seen.shapes] == [16, 16, 16, 8, 4, 4, 4, 4, 4, 4, 4, 4]
    for one, other in zip(weights(made), weights(plain), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("model", [classifier, language_model])
def test_with_accumulation_the_whole_step_is_repeated(tmp_path: Path, model: Any) -> None:
    def made(hook: RunsOut | None) -> Trainer:
        of_tokens = model is language_model
        with_hook = model()
        if hook is not None:
            hook.attach(with_hook)
        data = Texts([8, 12, 16, 24] * 16, of_tokens)
        values = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2}
        return trainer(tmp_path, with_hook, data, max_steps=3, **values)

    recovery = Recovery()
    ours, plain = made(RunsOut(4, first=3)), made(None)
    assert trained(ours, recovery) == pytest.approx(trained(plain), rel=1e-3)
    assert recovery.parts == 2
    for one, other in zip(weights(ours), weights(plain), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def test_custom_loss_function_is_weighted_by_parts(tmp_path: Path) -> None:
    def loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(outputs.logits, labels)

    model = classifier()
    RunsOut(4, first=1).attach(model)
    made, plain = (trainer(tmp_path, m, per_device_train_batch_size=16, max_steps=3) for m in (model, classifier()))
    made.compute_loss_func = plain.compute_loss_func = loss
    assert trained(made, Recovery()) == pytest.approx(trained(plain), abs=1e-4)


def test_random_state_is_reset_to_the_start_of_the_step(tmp_path: Path) -> None:
    """The repeated first forward pass draws the same random numbers, such as dropout's, as the failed one."""
    model = classifier()
    drawn: list[float] = []
    model.register_forward_pre_hook(lambda *_: drawn.append(torch.rand(()).item()))
    RunsOut(8, first=1).attach(model)
    made = trainer(tmp_path, model, per_device_train_batch_size=16, max_steps=2)
    trained(made, Recovery())
    assert drawn[1] == drawn[2]
    assert len(set(drawn[2:])) == len(drawn[2:])


class MeanOfLabels(nn.Module):
    """A model whose loss is nan for a batch without labels."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(100, 8), nn.Linear(8, 100)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.head(self.embedding(input_ids))
        known = labels != -100
        each = nn.functional.cross_entropy(logits.transpose(1, 2), labels.clamp(min=0), reduction="none")
        return {"loss": (each * known).sum() / known.sum(), "logits": logits}


class HalfWithoutLabels(Texts):
    def __getitem__(self, index: int) -> dict[str, Any]:
        example = super().__getitem__(index)
        labels = [-100] * len(example["labels"]) if index % 8 >= 4 else example["labels"]
        return {"input_ids": example["input_ids"], "labels": labels}


def test_part_without_labels_is_skipped(tmp_path: Path) -> None:
    values = {"per_device_train_batch_size": 8, "train_sampling_strategy": "sequential", "max_steps": 2}
    data = HalfWithoutLabels([12] * 32, labels_for_tokens=True)
    model = MeanOfLabels()
    RunsOut(4).attach(model)
    made = trainer(tmp_path, model, data, logging_nan_inf_filter=False, **values)
    plain = trainer(tmp_path, MeanOfLabels(), data, **values)
    assert trained(made, Recovery()) == pytest.approx(trained(plain), rel=1e-4)
    for one, other in zip(weights(made), weights(plain), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def test_batch_that_cannot_be_split_raises_the_original_error(tmp_path: Path) -> None:
    """If image patches are concatenated, only the model knows which belong to which sequence."""

    class Patches(Pad):
        def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
            return {**super().__call__(examples), "patches": torch.ones(4 * len(examples), 3)}

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = classifier()

        def forward(self, patches: torch.Tensor, **kwargs: Any) -> Any:
            return self.inner(**kwargs)

    model = Model()
    RunsOut(4).attach(model)
    values = {"per_device_train_batch_size": 8, "remove_unused_columns": False}
    made = trainer(tmp_path, model, collator=Patches(), **values)
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory") as raised:
        trained(made, Recovery())
    assert "different first dimensions" in raised.value.__notes__[0]


def test_single_sequence_that_does_not_fit_raises_the_original_error(tmp_path: Path) -> None:
    model = classifier()
    RunsOut(0).attach(model)
    made = trainer(tmp_path, model, per_device_train_batch_size=2)
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory") as raised:
        trained(made, Recovery())
    assert "not even one sequence at a time fits" in raised.value.__notes__[0]


def test_other_errors_are_raised_unchanged(tmp_path: Path) -> None:
    model = classifier()

    def fail(*_: Any) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    model.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        trained(trainer(tmp_path, model), Recovery())


def test_training_without_error_is_bit_identical(tmp_path: Path) -> None:
    watched = trainer(tmp_path, classifier(0.1))
    with_it = trained(watched, Recovery())
    plain = trainer(tmp_path, classifier(0.1))
    assert trained(plain) == with_it
    assert all(torch.equal(one, other) for one, other in zip(weights(watched), weights(plain), strict=True))
    assert "training_step" not in vars(watched)


def test_previously_shadowed_method_is_restored(tmp_path: Path) -> None:
    made = trainer(tmp_path)
    before = made.training_step
    vars(made)["training_step"] = before
    recovery = Recovery()
    recovery.watch(made)
    recovery.end()
    assert vars(made)["training_step"] is before
    assert "get_batch_samples" not in vars(made)


def test_parts_are_weighted_by_their_labels() -> None:
    labels = torch.tensor([[1, 2, 3, -100], [1, -100, -100, -100], [-100] * 4, [1, 2, 3, 4]])
    parts = _split({"input_ids": torch.ones(4, 4), "labels": labels, "scale": torch.ones(()), "names": [*"abcd"]}, 3)
    assert [len(part["input_ids"]) for part in parts] == [1, 1, 2]
    assert [part["names"] for part in parts] == [["a"], ["b"], ["c", "d"]]
    assert weights_by_content(parts) == [3 / 8, 1 / 8, 4 / 8]
    assert weights_by_content(_split({"x": torch.ones(3, 2), "labels": torch.ones(3)}, 2)) == [1 / 3, 2 / 3]
