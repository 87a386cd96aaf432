"""Small configurations for tests of workloads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

TINY = {
    "bert": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128},
    "llama": {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 128,
    },
    "t5": {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 2},
}


@pytest.fixture
def tiny(tmp_path: Path) -> Any:
    """Return a function that writes a small configuration of an architecture and returns its folder."""

    def folder(model_type: str, **more: Any) -> str:
        values = {"model_type": model_type, "vocab_size": 500, **TINY[model_type], **more}
        (tmp_path / "config.json").write_text(json.dumps(values))
        return str(tmp_path)

    return folder
