"""Vision-language models: the host reads grids, counts and masks of pixels back to decide the sizes of tensors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from rehearsing import NEEDS_THE_DEVICE
from vision_models import MODELS

import hf_bsopt
from hf_bsopt.data import catalog
from hf_bsopt.memory.predictor import Predictor
from hf_bsopt.records import Trial
from hf_bsopt.workloads.module import ModuleWorkload


def memory_for(name: str) -> str:
    """Return how much of the T4 to use. The steps of a Qwen loop over the images, so each size is traced: few sequences
    have to fill it.
    """
    return "1GiB" if name.startswith("Qwen") else "4GiB"


@pytest.mark.parametrize("name", ["Qwen2-VL", "Idefics3", "LLaVA"])
def test_a_vision_model_is_predicted_at_any_size(name: str) -> None:
    model, example = MODELS[name]()
    predict = Predictor(ModuleWorkload(model, example), catalog.gpu("T4"))
    sizes = [predict(size).used_bytes or 0 for size in (2, 4, 8)]
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[-1]


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
class TestRehearsed:
    pytestmark = NEEDS_THE_DEVICE

    def test_prediction_and_rehearsal_agree_within_1_percent(self, name: str, checkpointing: bool) -> None:
        model, example = MODELS[name]()
        if checkpointing:
            model.gradient_checkpointing_enable()  # type: ignore[operator]
        report = hf_bsopt.find_batch_size(
            model, example_batch=example, gpu="T4", device="rehearse", memory=memory_for(name)
        )
        predicted = {trial.batch_size: trial for trial in report.trials if trial.source == "predicted"}
        rehearsed = [trial for trial in report.trials if trial.source == "rehearsed"]
        assert rehearsed
        for trial in rehearsed:
            assert _bytes(predicted[trial.batch_size]) == pytest.approx(_bytes(trial), rel=0.01)


@pytest.mark.slow
class TestTrainer:
    pytestmark = NEEDS_THE_DEVICE

    @pytest.mark.parametrize("name", ["Qwen2-VL", "Idefics3"])
    def test_a_trainer_of_a_vision_model_is_predicted_within_1_percent(self, name: str, tmp_path: Path) -> None:
        model, example = MODELS[name]()

        def collate(examples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
            return {name: torch.cat([one[name] for one in examples]) for name in example}

        trainer = transformers.Trainer(
            model,
            transformers.TrainingArguments(str(tmp_path), report_to=[], use_cpu=True, remove_unused_columns=False),
            train_dataset=[example] * 64,  # type: ignore[arg-type]
            data_collator=collate,
        )
        report = hf_bsopt.find_batch_size(trainer, gpu="T4", device="rehearse", memory="1GiB")
        predicted = {trial.batch_size: trial for trial in report.trials if trial.source == "predicted"}
        (rehearsed,) = [trial for trial in report.trials if trial.source == "rehearsed"]
        assert _bytes(predicted[rehearsed.batch_size]) == pytest.approx(_bytes(rehearsed), rel=0.01)


def _bytes(trial: Trial) -> tuple[int, int]:
    assert trial.outcome == "fits"
    assert trial.peak is not None
    assert trial.used_bytes is not None
    return trial.used_bytes, trial.peak.allocated_bytes
