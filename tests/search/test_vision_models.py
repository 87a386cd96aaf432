"""Vision-language models: the host reads grids, counts and masks of pixels back to decide the sizes of tensors."""

from __future__ import annotations

import pytest
from rehearsing import NEEDS_THE_DEVICE
from vision_models import MODELS

import hf_bsopt
from hf_bsopt.data import catalog
from hf_bsopt.memory.predictor import Predictor
from hf_bsopt.records import Trial
from hf_bsopt.workloads.module import ModuleWorkload

MEMORY = "1GiB"
"""Small, so that few sequences fill it: a step that loops over the images is traced at each size."""


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
            model, example_batch=example, gpu="T4", device="rehearse", memory=MEMORY, check=4
        )
        predicted, rehearsed = (_trial(report.trials, source) for source in ("predicted", "rehearsed"))
        assert rehearsed.outcome == "fits"
        assert predicted.used_bytes == pytest.approx(rehearsed.used_bytes, rel=0.01)
        assert predicted.peak is not None
        assert rehearsed.peak is not None
        assert predicted.peak.allocated_bytes == pytest.approx(rehearsed.peak.allocated_bytes, rel=0.01)


def _trial(trials: tuple[Trial, ...], source: str) -> Trial:
    (size,) = {trial.batch_size for trial in trials if trial.source == "rehearsed"}
    (found,) = [trial for trial in trials if (trial.batch_size, trial.source) == (size, source)]
    return found
