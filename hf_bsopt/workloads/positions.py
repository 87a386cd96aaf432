"""How many tokens a model has positions for, and whether it can take more."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

OFFSET_POSITIONS = (
    "camembert",
    "data2vec-text",
    "esm",
    "ibert",
    "layoutlmv3",
    "lilt",
    "longformer",
    "luke",
    "markuplm",
    "mpnet",
    "roberta",
    "roberta-prelayernorm",
    "xlm-roberta",
    "xlm-roberta-xl",
    "xmod",
)
"""Model types whose positions start after the padding token's: the table is two longer than the longest input."""


def position_limit(config: PreTrainedConfig) -> int | None:
    """Return the number of tokens that the model has positions for; None if it has no such limit."""
    if config.model_type in ("t5", "mt5", "longt5", "umt5"):
        return None  # relative positions in buckets
    if config.model_type == "esm" and config.position_embedding_type != "absolute":
        return None  # rotary positions, without a limit
    limit = getattr(config, "max_position_embeddings", None)
    if not isinstance(limit, int) or limit <= 0:
        return None
    return limit - 2 if config.model_type in OFFSET_POSITIONS else limit


WITHOUT_A_TABLE = ("fsmt", "jamba", "m2m_100", "nllb-moe", "xglm", "zamba", "zamba2")
"""Model types without positions, or with a table of sinusoids that grows."""


def is_hard_limit(config: PreTrainedConfig) -> bool:
    """Return True if the model has a table of positions, so that it cannot run a longer sequence.

    Rotary and relative positions, and ALiBi, are computed for any length; the model was not trained beyond its own.
    """
    text = config.get_text_config()
    if text.model_type in WITHOUT_A_TABLE or getattr(text, "alibi", False):
        return False
    if getattr(text, "position_biased_input", True) is False:  # DeBERTa
        return False
    return not getattr(text, "rope_parameters", None)
