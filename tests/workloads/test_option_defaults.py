"""Claims about the defaults and checks of `describe`: `hf_bsopt.workloads.option_defaults` and `checks`."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest

from hf_bsopt.errors import MissingExtraError, UsageError
from hf_bsopt.workloads.workload import Workload, describe


def reason_for(workload: Workload, option: str) -> str:
    """Return the only line of the defaults that begins with ``option``."""
    [line] = [line for line in workload.defaults if line.startswith(option)]
    return line


# ---- defaults and their reasons


def test_a_name_alone_gets_a_default_with_a_reason_for_every_option() -> None:
    workload = describe("biobert")
    assert workload.model == "dmis-lab/biobert-v1.1"
    assert workload.task == "token-classification"
    assert workload.max_length == 512
    assert workload.precision == "fp16"
    assert workload.weights_dtype == "float32"
    assert workload.optimizer == "adamw_torch_fused"
    assert workload.attention == "sdpa"
    for option in ("task", "max_length", "precision", "optimizer", "attention", "3 labels"):
        assert ":" in reason_for(workload, option)


def test_given_options_are_kept_and_are_not_among_the_defaults() -> None:
    workload = describe(
        "bert-base-uncased",
        task="sequence-classification",
        max_length=64,
        precision="bf16",
        optimizer="sgd",
        attention="eager",
        num_labels=5,
    )
    assert workload.defaults == ()
    assert (workload.task, workload.max_length, workload.settings.precision) == ("sequence-classification", 64, "bf16")
    assert (workload.settings.optimizer, workload.attention, workload.config.num_labels) == ("sgd", "eager", 5)


@pytest.mark.parametrize(
    ("name", "length", "reason"),
    [
        ("bert-base-uncased", 512, "limit"),
        ("roberta-base", 512, "limit"),
        ("llama-3.2-1b", 512, "usual"),
        ("t5-small", 512, "usual"),
        ("tinystories", 256, "limit"),
        ("modernbert", 512, "usual"),
    ],
)
def test_the_default_length_is_512_or_the_limit_of_the_model(name: str, length: int, reason: str) -> None:
    workload = describe(name)
    assert workload.max_length == length
    assert reason in reason_for(workload, "max_length")


@pytest.mark.parametrize(
    ("name", "too_long", "longest"),
    [("bert-base-uncased", 513, 512), ("roberta-base", 513, 512), ("gpt2", 1025, 1024), ("opt-125m", 2049, 2048)],
)
def test_a_length_over_the_limit_is_refused_and_the_limit_is_named(name: str, too_long: int, longest: int) -> None:
    with pytest.raises(UsageError, match=rf"max_length {too_long} .*use {longest} or less"):
        describe(name, max_length=too_long)
    assert describe(name, max_length=longest).max_length == longest


def test_a_model_with_relative_positions_takes_any_length() -> None:
    assert describe("t5-small", max_length=100_000).max_length == 100_000


@pytest.mark.parametrize("length", [0, -5])
def test_a_length_below_1_is_refused(length: int) -> None:
    with pytest.raises(UsageError, match="at least 1"):
        describe("bert-base-uncased", max_length=length)


@pytest.mark.parametrize(
    ("precision", "weights"),
    [
        ("fp16", "float32"),
        ("bf16", "float32"),
        ("fp32", "float32"),
        ("fp16-weights", "float16"),
        ("bf16-weights", "bfloat16"),
    ],
)
def test_the_default_dtype_of_the_weights_is_float32_under_mixed_precision(precision: str, weights: str) -> None:
    assert describe("bert-base-uncased", precision=precision).weights_dtype == weights


@pytest.mark.parametrize(("precision", "weights"), [("fp16", "float16"), ("bf16", "bfloat16"), ("fp32", "float32")])
def test_with_adapters_the_frozen_base_is_in_half_precision_and_the_reason_is_given(
    precision: str, weights: str
) -> None:
    pytest.importorskip("peft")
    workload = describe("llama-3.2-1b", precision=precision, lora_r=8)
    assert workload.weights_dtype == weights
    assert any(line.startswith("weights in") for line in workload.defaults) == (weights != "float32")


def test_a_given_dtype_of_the_weights_is_kept() -> None:
    assert describe("bert-base-uncased", weights_dtype="bfloat16").weights_dtype == "bfloat16"


def test_deberta_falls_back_to_eager_attention_with_a_reason() -> None:
    for requested in (None, "sdpa", "flash_attention_2"):
        workload = describe("deberta-v3-base", attention=requested)
        assert workload.attention == "eager"
        assert "no other" in reason_for(workload, "attention eager")


def test_an_alias_of_an_optimizer_is_resolved() -> None:
    pytest.importorskip("bitsandbytes")
    assert describe("bert-base-uncased", optimizer="adamw_8bit").optimizer == "adamw_bnb_8bit"


def test_sequence_classification_with_a_decoder_gets_a_padding_token() -> None:
    assert describe("gpt2", task="sequence-classification").config.pad_token_id == 0


# ---- invalid options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "causal"}, r"'causal' is not one of .*did you mean causal-lm"),
        ({"task": "causal-lm", "model": "t5-small"}, "t5 has no head for causal-lm"),
        ({"precision": "bf-16"}, r"did you mean bf16"),
        ({"optimizer": "adamw_torchfused"}, r"did you mean adamw_torch_fused"),
        ({"attention": "flash"}, r"did you mean flash_attention_2"),
        ({"weights_dtype": "half"}, r"float32, float16, bfloat16"),
        ({"load_in_4bit": True}, r"add adapters, such as --lora_r 16"),
    ],
)
def test_an_invalid_option_is_refused_with_a_valid_choice(options: dict[str, Any], message: str) -> None:
    if "load_in_4bit" in options:
        pytest.importorskip("bitsandbytes")
    with pytest.raises(UsageError, match=message):
        describe(options.pop("model", "llama-3.2-1b"), **options)


@pytest.mark.parametrize("labels", [0, -1])
def test_fewer_than_one_label_is_refused(labels: int) -> None:
    with pytest.raises(UsageError):
        describe("bert-base-uncased", num_labels=labels)


@pytest.mark.parametrize(
    ("options", "command"),
    [
        ({"lora_r": 8}, "pip install peft"),
        ({"lora_r": 8, "load_in_4bit": True}, "pip install bitsandbytes"),
        ({"optimizer": "adamw_bnb_8bit"}, "pip install bitsandbytes"),
        ({"optimizer": "adamw_8bit"}, "pip install bitsandbytes"),
    ],
)
def test_a_missing_package_is_refused_with_the_command_that_installs_it(
    options: dict[str, Any], command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = command.split()[-1]
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == missing else find(name, *more))
    with pytest.raises(MissingExtraError, match=command):
        describe("llama-3.2-1b", **options)
