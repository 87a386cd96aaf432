"""Claims about the task, head, positions and attention of a configuration: `hf_bsopt.workloads.model_config`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import BertConfig, LlamaConfig, RobertaConfig, T5Config, ViTConfig
from transformers.models.auto import modeling_auto

from hf_bsopt.errors import UsageError
from hf_bsopt.workloads.model_config import (
    AUTO_CLASSES,
    OFFSET_POSITIONS,
    TASK_MAPPINGS,
    check_head,
    default_task,
    load_config,
    position_limit,
    supports_sdpa,
)


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


@pytest.mark.parametrize(
    ("config", "limit"),
    [
        (BertConfig(), 512),
        (RobertaConfig(max_position_embeddings=514), 512),  # positions start after the padding token's
        (T5Config(), None),
        (LlamaConfig(max_position_embeddings=4096), 4096),
        (transformers.GPT2Config(n_positions=1024), 1024),
        (transformers.XLMRobertaConfig(max_position_embeddings=514), 512),
        (transformers.OPTConfig(max_position_embeddings=2048), 2048),
        (transformers.BloomConfig(), None),
    ],
    ids=lambda value: getattr(value, "model_type", str(value)),
)
def test_the_position_limit_follows_from_the_configuration(config: Any, limit: int | None) -> None:
    assert position_limit(config) == limit


SMALL = {
    "vocab_size": 20,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "intermediate_size": 8,
    "max_position_embeddings": 12,
}
REQUIRED: dict[str, dict[str, Any]] = {
    "esm": {"position_embedding_type": "absolute", "mask_token_id": 2, "pad_token_id": 1},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
}


@pytest.mark.parametrize("kind", sorted({*OFFSET_POSITIONS} - {"layoutlmv3", "lilt", "longformer", "markuplm"}))
def test_a_model_takes_position_limit_tokens_and_not_one_more(kind: str) -> None:
    """Only for models that take nothing but tokens, and do not pad them to a window."""
    config = transformers.AutoConfig.for_model(kind, **{**SMALL, **REQUIRED.get(kind, {})})
    model = transformers.AutoModel.from_config(config).eval()
    longest = position_limit(config)
    assert longest == 10
    model(input_ids=torch.full((1, longest), 5))
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.full((1, longest + 1), 5))


def test_rotary_positions_have_no_limit() -> None:
    assert position_limit(transformers.EsmConfig(position_embedding_type="rotary", max_position_embeddings=12)) is None


def test_an_unknown_architecture_is_refused_with_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "berrt"}')
    with pytest.raises(UsageError, match="no model_type 'berrt'; the nearest is") as caught:
        load_config(str(tmp_path))
    assert len(str(caught.value)) < 300 + len(str(tmp_path))


def test_sdpa_is_supported_by_bert_and_llama_and_not_by_deberta() -> None:
    assert not supports_sdpa(load_config("deberta-v3-base"), "token-classification")
    assert supports_sdpa(load_config("bert-base-uncased"), "token-classification")
    assert supports_sdpa(load_config("llama-3.2-1b"), "causal-lm")
