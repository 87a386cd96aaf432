"""Claims about the positions of a model: `hf_bsopt.workloads.positions`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import BertConfig, LlamaConfig, RobertaConfig, T5Config

from hf_bsopt.errors import UsageError
from hf_bsopt.workloads.positions import OFFSET_POSITIONS, is_hard_limit, position_limit
from hf_bsopt.workloads.workload import describe


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


SHORT = {"vocab_size": 50, "num_hidden_layers": 1, "max_position_embeddings": 12, "hidden_size": 16}
ATTENTION = {"num_attention_heads": 2, "intermediate_size": 16}
DEBERTA = {"relative_attention": True, "position_biased_input": False, "pos_att_type": ["c2p", "p2c"]}
COMPUTED = [
    LlamaConfig(**SHORT, **ATTENTION),
    transformers.MistralConfig(**SHORT, **ATTENTION, num_key_value_heads=2),
    transformers.GPTNeoXConfig(**SHORT, **ATTENTION),
    transformers.ModernBertConfig(**SHORT, **ATTENTION, pad_token_id=0, eos_token_id=1, bos_token_id=1, cls_token_id=1,
                                  sep_token_id=1),
    transformers.DebertaV2Config(**SHORT, **ATTENTION, **DEBERTA),
    transformers.DebertaConfig(**SHORT, **ATTENTION, **DEBERTA),
]  # fmt: skip
TABLES = [
    BertConfig(**SHORT, **ATTENTION),
    transformers.DebertaV2Config(**SHORT, **ATTENTION),
    transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=50, n_positions=12),
    transformers.GPTJConfig(n_embd=16, n_layer=1, n_head=2, vocab_size=50, n_positions=12, rotary_dim=4),
]


@pytest.mark.parametrize("config", [*COMPUTED, *TABLES], ids=lambda config: config.model_type)
def test_only_a_table_of_positions_is_a_hard_limit(config: Any, tmp_path: Path) -> None:
    """Each model is run on the CPU, with twice as many tokens as it has positions."""
    model = transformers.AutoModel.from_config(config).eval()
    tokens = torch.full((1, 24), 5)
    config.save_pretrained(tmp_path)
    if config in TABLES:
        assert is_hard_limit(config)
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=tokens)
        with pytest.raises(UsageError, match="max_length 24 exceeds the model's limit of 12 positions; use 12 or less"):
            describe(str(tmp_path), max_length=24)
    else:
        assert not is_hard_limit(config)
        model(input_ids=tokens)
        reasons = describe(str(tmp_path), max_length=24).defaults
        assert any("max_length 24 is more than the 12 tokens of max_position_embeddings" in r for r in reasons)


def test_smollm2_is_sized_beyond_its_8192_positions() -> None:
    assert describe("SmolLM2-135M", max_length=16_384).max_length == 16_384
