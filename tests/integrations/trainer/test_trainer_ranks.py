"""A Trainer in two processes that train together (DistributedDataParallel over gloo)."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run
from trainers import Seen, Texts, classifier, losses, trainer

from hf_bsopt import BatchSizeCallback
from hf_bsopt.integrations.trainer import checkpoint_state

MAX_SECONDS = 30.0
LONG = Texts([8] * 40 + [128] * 216)


def train_with(memory: str) -> dict[str, Any]:
    """Size each rank for a GPU with this much memory, by prediction; the training itself is real."""
    model = classifier(hidden_size=128, num_hidden_layers=2, intermediate_size=512)
    seen = Seen(model)
    callback = BatchSizeCallback(device="predict", gpu="T4", memory=memory, target=(0.0, 1.0))
    folder = Path(tempfile.mkdtemp())
    made = trainer(folder, model, LONG, [callback], per_device_train_batch_size=128, max_steps=2)
    made.train()
    assert callback.report is not None
    first = next(made.model.parameters())
    return {
        "micro_batch": made.args.per_device_train_batch_size,
        "accumulation": made.args.gradient_accumulation_steps,
        "effective": callback.report.plan.effective_batch,
        "sizes": sorted({size for size, _ in seen.shapes}),
        "steps": made.state.global_step,
        "weights": float(first.detach().double().sum()),
        "losses": losses(made),
        "notes": list(callback.report.notes),
    }


def evaluate_with(memory: str) -> dict[str, Any]:
    """Size each rank for a GPU with this much memory; evaluation results are gathered."""
    callback = BatchSizeCallback(device="predict", gpu="T4", memory=memory, target=(0.0, 1.0))
    values = {"per_device_train_batch_size": 4, "per_device_eval_batch_size": 400, "max_steps": 1}
    data = Texts([128] * 600)
    made = trainer(Path(tempfile.mkdtemp()), classifier(), data, [callback], eval_dataset=data, **values)
    made.train()
    return {"size": made.args.per_device_eval_batch_size, "predicted": made.predict(data).predictions.shape}


def resume_as(given: tuple[str, str, bool]) -> dict[str, Any]:
    """Train or resume on a machine with two kinds of GPU; the checkpoint records that of rank 0."""
    device, folder, is_resumed = given
    checkpoint_state.device_name = lambda _: device  # type: ignore[assignment]  # in this process only
    callback = BatchSizeCallback(device="predict", gpu="T4", memory="1GiB")
    values = {"per_device_train_batch_size": 8, "max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    made = trainer(Path(folder), classifier(), Texts([24] * 64), [callback], **values)
    made.train(resume_from_checkpoint=f"{folder}/checkpoint-1" if is_resumed else None)
    return {"size": made.args.per_device_train_batch_size, "searched": callback.report is not None}


def train_with_accumulation(given: tuple[int, dict[str, Any]]) -> list[int]:
    accumulation, options = given
    options = dict(options)
    strategy = {"train_sampling_strategy": "batch_rebalance"} if options.pop("batch_rebalance", False) else {}
    callback = BatchSizeCallback(device="predict", gpu="T4", memory="2GiB", **options)
    values = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": accumulation, **strategy}
    made = trainer(Path(tempfile.mkdtemp()), classifier(), Texts([24] * 64), [callback], **values)
    made.train()
    return [made.args.per_device_train_batch_size, made.args.gradient_accumulation_steps]


def train_or_fail(memory: str) -> None:
    train_with(memory)


def run_out(most: int) -> str:
    """Run out of memory in the second step, on the rank that fits fewer sequences."""
    model = classifier()
    count: list[int] = []

    def full(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        count.append(len(kwargs["input_ids"]))
        if len(count) > 1 and count[-1] > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    model.register_forward_pre_hook(full, with_kwargs=True)
    callback = BatchSizeCallback(device="predict", recover=True)
    folder = Path(tempfile.mkdtemp())
    made = trainer(folder, model, LONG, [callback], per_device_train_batch_size=8, max_steps=3)
    made.train()
    return "finished"


def test_both_ranks_train_with_the_size_of_the_smaller_gpu() -> None:
    first, second = run(train_with, "2GiB", "620MiB")
    assert first.value is not None, first.message
    assert second.value is not None, second.message
    for name in ("micro_batch", "accumulation", "effective", "steps", "weights"):
        assert first.value[name] == second.value[name]
    assert first.value["micro_batch"] < 128
    assert first.value["effective"] == 256
    assert first.value["micro_batch"] * first.value["accumulation"] == 128
    assert first.value["sizes"] == second.value["sizes"] == [first.value["micro_batch"]]
    assert any("rank 1 can take no more" in note for note in first.value["notes"])


@pytest.mark.parametrize("options", [{}, {"fill": True}], ids=["kept", "filled"])
def test_ranks_that_begin_with_different_accumulation_do_not_train(options: dict[str, Any]) -> None:
    """They trained 8 × 2 and 8 × 1, without a word."""
    answers = run(train_with_accumulation, (16, options), (8, options))
    name = "base_batch_size" if options else "effective_batch_size"  # the former scales the learning rate
    for answer in answers:
        assert answer.error == "AgreementError"
        assert f"{name} is 32 on rank 0 and 16 on rank 1" in answer.message
        assert answer.seconds < MAX_SECONDS


def test_ranks_that_ask_for_different_effective_batches_do_not_train() -> None:
    answers = run(train_with_accumulation, (1, {"effective_batch_size": 32}), (1, {"effective_batch_size": 64}))
    for answer in answers:
        assert answer.error == "AgreementError"
        assert "effective_batch_size is 32 on rank 0 and 64 on rank 1" in answer.message


def test_a_rank_that_cannot_be_sized_is_named_by_the_other() -> None:
    first, second = run(train_with_accumulation, (1, {}), (1, {"batch_rebalance": True}))
    assert second.error == "UsageError"
    assert first.error == "AgreementError"
    assert first.message.startswith('rank 1 failed: UsageError: train_sampling_strategy="batch_rebalance"')
    assert first.seconds < MAX_SECONDS


def test_both_ranks_evaluate_with_the_size_of_the_smaller_gpu() -> None:
    first, second = run(evaluate_with, "2GiB", "500MiB")
    assert first.value is not None, first.message
    assert second.value is not None, second.message
    assert first.value == second.value
    assert first.value["size"] < 400
    assert first.value["predicted"] == (600, 2)


def test_all_ranks_search_again_if_one_has_to(tmp_path: Path) -> None:
    kinds = ("Tesla T4, 14.6 GiB", "Tesla P100, 15.9 GiB")
    for is_resumed in (False, True):
        answers = run(resume_as, *[(kind, str(tmp_path), is_resumed) for kind in kinds])
        assert [answer.value for answer in answers] == [{"size": 8, "searched": True}] * 2, answers[1].message


def test_failed_search_on_one_rank_ends_both_with_the_reason() -> None:
    first, second = run(train_or_fail, "2GiB", "450MiB")
    assert first.error == second.error == "AgreementError"
    assert first.message.startswith("rank 1 failed: NothingFitsError: not even one sequence")
    assert max(first.seconds, second.seconds) < MAX_SECONDS


def test_out_of_memory_on_one_rank_saves_a_checkpoint_and_does_not_hang(tmp_path: Path) -> None:
    first, second = run(run_out, 100, 4)
    assert second.error == "RecoveryError"
    assert second.message.startswith("rank 1 ran out of memory in step 2; the other ranks wait in a collective")
    saved = re.search(r"The state before the step is saved in (\S+)\.", second.message)
    assert saved is not None, second.message
    alone = trainer(tmp_path, classifier(), LONG, per_device_train_batch_size=16, max_steps=3)
    alone.train(resume_from_checkpoint=saved[1])
    assert alone.state.global_step == 3
    assert len(losses(alone)) == 3
    assert first.error  # its collective fails when the other rank ends
    assert max(first.seconds, second.seconds) < MAX_SECONDS
