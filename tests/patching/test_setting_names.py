"""Names of settings are recognized in any spelling, and only as whole names."""

from __future__ import annotations

import pytest

from hf_bsopt.patching.setting_names import specificity_rank, split_words


@pytest.mark.parametrize(
    "name", ["batch_size", "BATCH_SIZE", "batchSize", "BatchSize", "--batch-size", "train_bs", "TRAIN_BATCH_SIZE", "bs"]
)
def test_every_spelling_of_the_batch_size_is_recognized(name: str) -> None:
    assert specificity_rank("batch_size", name) is not None


@pytest.mark.parametrize(
    "name",
    [
        "eval_batch_size",
        "per_device_eval_batch_size",
        "valid_bs",
        "effective_batch_size",
        "batch_size_file",
        "auto_find_batch_size",
        "batch",
        "gradient_accumulation_kwargs",
        "eval_accumulation_steps",
        "",
    ],
)
def test_names_that_only_contain_a_setting_are_not_recognized(name: str) -> None:
    assert specificity_rank("batch_size", name) is None
    assert specificity_rank("gradient_accumulation_steps", name) is None


def test_names_are_split_into_words_in_any_case() -> None:
    assert split_words("SFTConfig") == ("sft", "config")
    assert split_words("perDeviceTrainBatchSize") == split_words("PER_DEVICE_TRAIN_BATCH_SIZE")
