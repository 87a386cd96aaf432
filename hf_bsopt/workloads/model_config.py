"""A model's configuration, from a folder, the catalog or the hub, and what follows from it. Weights are never read."""

from __future__ import annotations

import difflib
import functools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._utils.files import is_folder
from ..data import catalog
from ..errors import UnknownModelError, UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

AUTO_CLASSES: dict[str, str] = {
    "token-classification": "AutoModelForTokenClassification",
    "sequence-classification": "AutoModelForSequenceClassification",
    "masked-lm": "AutoModelForMaskedLM",
    "question-answering": "AutoModelForQuestionAnswering",
    "causal-lm": "AutoModelForCausalLM",
    "seq2seq": "AutoModelForSeq2SeqLM",
}
TASK_MAPPINGS: dict[str, str] = {
    "token-classification": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
    "sequence-classification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "masked-lm": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "question-answering": "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES",
    "causal-lm": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "seq2seq": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
}


def load_config(model: str, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """Return the configuration of a model: from a folder, the catalog or the hub, in this order.

    Raises UsageError for a folder without a valid configuration, and for a model that needs ``trust_remote_code``;
    UnknownModelError if the name is not found.
    """
    from transformers import AutoConfig

    if is_folder(model) or model.endswith("config.json"):
        return _config_of_folder(Path(model))
    entry = catalog.model_entry(model)
    if entry is not None:
        return AutoConfig.for_model(**entry.config)
    try:
        offline = not is_hub_reachable()
        return AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code, local_files_only=offline)
    except (OSError, ValueError, KeyError) as error:
        if "trust_remote_code" in str(error):
            raise UsageError(f"{model} comes with its own code: add --trust_remote_code if you trust it") from error
        nearest = ", ".join(catalog.nearest_models(model))
        raise UnknownModelError(
            f"{model!r} is not in the catalog, is not a folder with a config.json, and could not be loaded from the "
            f"hub. Nearest names: {nearest}"
        ) from error


def is_hub_reachable() -> bool:
    """Return True if the hub can be reached. Tries once: without a network the hub's own client would retry for half a
    minute. Behind a proxy the hub counts as reachable.
    """
    import socket
    import urllib.request
    from urllib.parse import urlsplit

    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or urllib.request.getproxies():
        return not constants.HF_HUB_OFFLINE
    address = urlsplit(constants.ENDPOINT)
    port = address.port or (80 if address.scheme == "http" else 443)
    try:
        with socket.create_connection((address.hostname or "", port), timeout=3):
            return True
    except OSError:
        return False


def _config_of_folder(folder: Path) -> PreTrainedConfig:
    from transformers import CONFIG_MAPPING, AutoConfig

    path = folder / "config.json" if folder.is_dir() else folder
    if not path.is_file():
        raise UsageError(f"no config.json in {folder}; save one with config.save_pretrained({str(folder)!r})")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict) or "model_type" not in values:
            raise UsageError(f"{path} has no model_type, so the architecture is unknown")
        if values["model_type"] not in CONFIG_MAPPING:
            near = difflib.get_close_matches(str(values["model_type"]), list(CONFIG_MAPPING), n=1)
            hint = f"; the nearest is {near[0]}" if near else ""
            raise UsageError(f"{path}: transformers has no model_type {values['model_type']!r}{hint}")
        if "auto_map" in values:
            values = {name: value for name, value in values.items() if name != "auto_map"}
        return AutoConfig.for_model(**values)
    except UsageError:
        raise
    except Exception as error:  # each architecture raises its own errors for invalid values
        raise UsageError(f"{path} is not a valid model configuration: {error}") from error


@functools.cache
def _tasks_of(model_type: str) -> tuple[str, ...]:
    from transformers.models.auto import modeling_auto

    return tuple(task for task, name in TASK_MAPPINGS.items() if model_type in getattr(modeling_auto, name))


def default_task(config: PreTrainedConfig) -> tuple[str, str]:
    """Return the usual task of the architecture and the reason. Raises UsageError if it has a head for none."""
    tasks = _tasks_of(config.model_type)
    if config.is_encoder_decoder and "seq2seq" in tasks:
        return "seq2seq", "the model has an encoder and a decoder"
    if "masked-lm" in tasks and "token-classification" in tasks:
        return "token-classification", "the usual task of an encoder"
    if "causal-lm" in tasks:
        return "causal-lm", "the usual task of a decoder"
    if tasks:
        return tasks[0], "the first task that this architecture has a head for"
    raise UsageError(f"architecture {config.model_type!r} has no head for any of {', '.join(AUTO_CLASSES)}")


def check_head(config: PreTrainedConfig, task: str) -> None:
    """Raise UsageError unless the architecture has a head for this task."""
    tasks = _tasks_of(config.model_type)
    if task not in tasks:
        raise UsageError(f"{config.model_type} has no head for {task}; it has {', '.join(tasks)}")


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


def supports_sdpa(config: PreTrainedConfig, task: str) -> bool:
    """Return True if transformers has scaled_dot_product_attention for this architecture."""
    return bool(model_class(config, task)._supports_sdpa)


def has_stacked_experts(config: PreTrainedConfig, task: str) -> bool:
    """Return True for a mixture of experts that holds the weights of all experts in one parameter (transformers 5)."""
    return bool(model_class(config, task)._can_set_experts_implementation())


def model_class(config: PreTrainedConfig, task: str) -> Any:
    """Return the class of the model with the head for this task."""
    import transformers

    found = getattr(transformers, AUTO_CLASSES[task])._model_mapping[type(config)]
    return found[0] if isinstance(found, tuple) else found
