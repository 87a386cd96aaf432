"""Configurations that no model can have end the command with exit code 2 and one sentence that names the field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hf_bsopt.cli.main import USAGE, main

BERT: dict[str, Any] = {
    "model_type": "bert",
    "vocab_size": 500,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 128,
}
BART: dict[str, Any] = {
    "model_type": "bart",
    "d_model": 64,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "vocab_size": 500,
}
T5 = {"model_type": "t5", "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 1, "num_heads": 4, "vocab_size": 500}
DECODER = {**BERT, "is_decoder": True}
EXPERTS = {"num_experts": 4, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1, "num_decoder_layers": 1}
GIT_VISION = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32, "patch_size": 16}


def nested(levels: int) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for _ in range(levels):
        values = {"a": values}
    return values


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({**BERT, "chunk_size_feed_forward": 7}, "chunk_size_feed_forward 7 of the configuration does not divide"),
        ({**BART, "decoder_start_token_id": None}, "decoder_start_token_id"),
        (T5, "decoder_start_token_id"),
        ({"model_type": "encoder-decoder", "encoder": BERT, "decoder": DECODER}, "decoder_start_token_id"),
        (
            {
                "model_type": "encoder-decoder",
                "encoder": BERT,
                "decoder": DECODER,
                "decoder_start_token_id": 1,
                "pad_token_id": 0,
            },
            "add_cross_attention",
        ),
        ({**BERT, "x": nested(900)}, "x.a.a.a"),
        ({**BERT, "to_dict": 3}, "to_dict is a method of every configuration"),
        ({**BERT, "vocab_size": 10**19}, "vocab_size is a number of 20 digits"),
        ({**BERT, "text_config": {"vocab_size": 10**400}}, "text_config.vocab_size is a number of 401 digits"),
        ({**BERT, "vocab_size": -1}, "[-1, 64]"),
        ({**BERT, "vocab_size": "500"}, "vocab_size"),
        ({**BERT, "num_labels": 10**8}, "num_labels is 100000000"),
        ({**BERT, "num_hidden_layers": 10**6}, "num_hidden_layers is 1000000"),
        ({**T5, "model_type": "switch_transformers", "decoder_start_token_id": 0, **EXPERTS}, "hf-bsopt rehearse"),
        ({**BERT, "model_type": "git", "vision_config": GIT_VISION}, "example_batch"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_configuration_that_cannot_be_trained_is_refused_in_one_sentence(
    values: dict[str, Any], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(values))
    flags = ["--gpu", "T4", "--device", "predict", "--max_length", "16"]
    assert main(["find", "--model", str(tmp_path), *flags]) == USAGE
    message = capsys.readouterr().err
    assert said in message
    assert len(message.strip().splitlines()) == 1
    assert message.startswith("error: ")


@pytest.mark.parametrize("problem", ["regression", "multi_label_classification", "nonsense"])
def test_the_problem_type_of_a_classifier_changes_no_answer(problem: str, tmp_path: Path) -> None:
    from hf_bsopt import find_batch_size

    (tmp_path / "config.json").write_text(json.dumps({**BERT, "problem_type": problem}))
    found = find_batch_size(
        str(tmp_path), task="sequence-classification", max_length=16, gpu="T4", device="predict", evaluation=False
    )
    assert found.batch_size > 0


def test_a_checkpoint_that_is_quantized_already_is_not_sized_in_silence(tmp_path: Path) -> None:
    from hf_bsopt.workloads.workload import describe

    settings = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "config.json").write_text(json.dumps({**BERT, "quantization_config": settings}))
    assert any("is quantized (bitsandbytes)" in reason for reason in describe(str(tmp_path)).defaults)
