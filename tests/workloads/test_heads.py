"""Claims about the task, head and attention of a configuration: `hf_bsopt.workloads.heads`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers
from transformers import BertConfig, LlamaConfig, T5Config, ViTConfig, WhisperConfig
from transformers.models.auto import modeling_auto

from hf_bsopt.errors import UsageError
from hf_bsopt.workloads.heads import AUTO_CLASSES, TASK_MAPPINGS, check_head, default_task, supports_sdpa
from hf_bsopt.workloads.model_config import load_config
from hf_bsopt.workloads.workload import describe


def test_each_task_has_an_auto_class_and_a_mapping_in_transformers() -> None:
    assert AUTO_CLASSES.keys() == TASK_MAPPINGS.keys()
    for name in AUTO_CLASSES.values():
        assert hasattr(transformers, name)
    for name in TASK_MAPPINGS.values():
        assert "bert" in getattr(modeling_auto, name) or "t5" in getattr(modeling_auto, name)


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("bert-base-uncased", "token-classification"),
        ("roberta-base", "token-classification"),
        ("distilbert", "token-classification"),
        ("albert", "token-classification"),
        ("google/electra-base-discriminator", "token-classification"),
        ("deberta-v3-base", "token-classification"),
        ("modernbert", "token-classification"),
        ("gpt2", "causal-lm"),
        ("opt-125m", "causal-lm"),
        ("llama-3.2-1b", "causal-lm"),
        ("mistral-7b", "causal-lm"),
        ("Qwen2.5-0.5B", "causal-lm"),
        ("tinystories", "causal-lm"),
        ("t5-small", "seq2seq"),
        ("flan-t5-base", "seq2seq"),
    ],
)
def test_the_default_task_suits_encoders_decoders_and_t5(name: str, task: str) -> None:
    assert default_task(load_config(name))[0] == task


def test_an_architecture_without_a_text_head_is_refused() -> None:
    with pytest.raises(UsageError, match=r"'vit' has no head"):
        default_task(ViTConfig())


def test_a_task_without_a_head_is_refused_and_the_available_ones_are_listed() -> None:
    with pytest.raises(UsageError, match=r"llama has no head for masked-lm; it has .*causal-lm"):
        check_head(LlamaConfig(), "masked-lm")
    check_head(LlamaConfig(), "sequence-classification")
    with pytest.raises(UsageError, match="no head for token-classification"):
        check_head(transformers.OPTConfig(), "token-classification")


def test_sdpa_is_supported_by_bert_and_llama_and_not_by_deberta() -> None:
    assert not supports_sdpa(load_config("deberta-v3-base"), "token-classification")
    assert supports_sdpa(load_config("bert-base-uncased"), "token-classification")
    assert supports_sdpa(load_config("llama-3.2-1b"), "causal-lm")


# ---- the checkpoint's own architecture


def saved(config: Any, architecture: str | None, folder: Path) -> str:
    """Write a configuration as the checkpoint of an architecture has it, and return its folder."""
    config.architectures = None if architecture is None else [architecture]
    config.save_pretrained(folder)
    return str(folder)


WHISPER = {
    "d_model": 64,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "vocab_size": 51865,
}


@pytest.mark.parametrize("architecture", ["WhisperForConditionalGeneration", None])
def test_whisper_is_not_sized_as_its_text_decoder(architecture: str | None, tmp_path: Path) -> None:
    folder = saved(WhisperConfig(**WHISPER), architecture, tmp_path)
    with pytest.raises(UsageError, match=r"takes input_features.*example_batch.*or --task causal-lm for the text"):
        describe(folder)
    reasons = describe(folder, task="causal-lm").defaults
    assert any("the text model alone, WhisperForCausalLM" in reason for reason in reasons)


def test_a_model_of_text_and_images_that_is_sized_without_images_says_so(tmp_path: Path) -> None:
    config = transformers.Gemma3Config(text_config={"num_hidden_layers": 1}, vision_config={"num_hidden_layers": 1})
    folder = saved(config, "Gemma3ForConditionalGeneration", tmp_path)
    reasons = describe(folder, max_length=16).defaults
    assert any("text alone: Gemma3ForConditionalGeneration takes pixel_values" in reason for reason in reasons)


def test_the_encoder_of_an_encoder_decoder_is_asked_about(tmp_path: Path) -> None:
    folder = saved(T5Config(decoder_start_token_id=0), "T5EncoderModel", tmp_path)
    with pytest.raises(UsageError, match=r"is a T5EncoderModel, and seq2seq would train .* add --task seq2seq"):
        describe(folder)
    assert describe(folder, task="seq2seq").task == "seq2seq"


@pytest.mark.parametrize(
    ("config", "architecture", "task"),
    [
        (LlamaConfig(), "LlamaForSequenceClassification", "sequence-classification"),
        (LlamaConfig(), "LlamaForCausalLM", "causal-lm"),
        (LlamaConfig(), "LlamaModel", "causal-lm"),
        (BertConfig(), "BertForQuestionAnswering", "question-answering"),
        (BertConfig(), "BertForMaskedLM", "token-classification"),
        (BertConfig(), "BertForPreTraining", "token-classification"),
        (BertConfig(), "BertLMHeadModel", "causal-lm"),
        (transformers.BartConfig(), "BartForConditionalGeneration", "seq2seq"),
        (transformers.BartConfig(), "BartForSequenceClassification", "sequence-classification"),
        (transformers.BartConfig(), "BartModel", "seq2seq"),
        (transformers.MarianConfig(), "MarianMTModel", "seq2seq"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_default_task_is_that_of_a_fine_tuned_checkpoint(
    config: Any, architecture: str, task: str, tmp_path: Path
) -> None:
    assert describe(saved(config, architecture, tmp_path)).task == task


@pytest.mark.parametrize(
    "config", [ViTConfig(), transformers.Wav2Vec2Config(), transformers.CLIPConfig()], ids=lambda c: c.model_type
)
def test_a_model_without_a_head_for_text_is_sent_to_example_batch_or_the_rehearsal(config: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"has no head for any of .*example_batch.*hf-bsopt rehearse"):
        describe(saved(config, None, tmp_path))
    with pytest.raises(UsageError, match=r"has no head for causal-lm; .*example_batch"):
        describe(saved(config, None, tmp_path), task="causal-lm")
