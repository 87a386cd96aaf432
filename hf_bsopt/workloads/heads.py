"""The heads that an architecture has in transformers, by task, and the one that its checkpoint was saved with."""

from __future__ import annotations

import functools
import inspect
from typing import TYPE_CHECKING, Any

from ..errors import UsageError

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


@functools.cache
def _tasks_of(model_type: str) -> tuple[str, ...]:
    from transformers.models.auto import modeling_auto

    return tuple(task for task, name in TASK_MAPPINGS.items() if model_type in getattr(modeling_auto, name))


FINE_TUNED = ("sequence-classification", "token-classification", "question-answering")
OTHER_INPUTS = ("pixel_values", "input_features", "input_values", "audio_values", "pixel_values_videos")
"""Inputs other than text."""
EXAMPLE = (
    "pass the model itself with a batch of yours, find_batch_size(model, example_batch=next(iter(dataloader))), or "
    "rehearse its script (hf-bsopt rehearse --gpu T4 -- train.py)"
)


def default_task(config: PreTrainedConfig) -> tuple[str, str]:
    """Return the usual task of the architecture and the reason; that of the checkpoint's own head if it was fine-tuned.

    Raises UsageError if the architecture has a head for none.
    """
    tasks = _tasks_of(config.model_type)
    own = own_architecture(config)
    for task in tasks:
        if task in FINE_TUNED and own == _head_name(config, task):
            return task, f"the checkpoint is a {own}"
    if config.is_encoder_decoder and "seq2seq" in tasks:
        return "seq2seq", "the model has an encoder and a decoder"
    if "masked-lm" in tasks and "token-classification" in tasks:
        if "causal-lm" in tasks and own == _head_name(config, "causal-lm") != _head_name(config, "masked-lm"):
            return "causal-lm", f"the checkpoint is a {own}"
        return "token-classification", "the usual task of an encoder"
    if "causal-lm" in tasks:
        return "causal-lm", "the usual task of a decoder"
    if tasks:
        return tasks[0], "the first task that this architecture has a head for"
    raise UsageError(f"architecture {config.model_type!r} has no head for any of {', '.join(AUTO_CLASSES)}: {EXAMPLE}")


def own_architecture(config: PreTrainedConfig) -> str:
    """Return the name of the class that the checkpoint was saved from, "" if the configuration does not say it."""
    names = getattr(config, "architectures", None)
    return str(names[0]) if isinstance(names, (list, tuple)) and names else ""


def check_architecture(config: PreTrainedConfig, task: str, *, is_requested: bool) -> str:
    """Return what the head for this task leaves out of the checkpoint's own model, "" if nothing.

    Raises UsageError if that is another model and the task was not requested: Whisper's decoder alone, for example.
    """
    import transformers

    own = own_architecture(config)
    own_class = getattr(transformers, own, None) or _base_class(config)
    chosen = model_class(config, task)
    if own_class is None or own_class is chosen:
        return _left_out(chosen)
    others, kept = _other_inputs(own_class), _other_inputs(chosen)
    name = own_class.__name__
    if others and not kept:
        if is_requested:
            return f"task {task}: the text model alone, {chosen.__name__}; {name} takes {', '.join(others)}, too"
        raise UsageError(
            f"{name} takes {', '.join(others)}, and the head for {task} is that of its text model alone "
            f"({chosen.__name__}): {EXAMPLE}; or --task {task} for the text model"
        )
    is_known = own in {_head_name(config, known) for known in _tasks_of(config.model_type)}
    if config.is_encoder_decoder and own and not is_known and own_class is not _base_class(config) and not is_requested:
        raise UsageError(
            f"the checkpoint is a {own}, and {task} would train a {chosen.__name__}: add --task {task} if that is what "
            f"you want, or {EXAMPLE}"
        )
    return _left_out(chosen)


def _left_out(chosen: Any) -> str:
    others = _other_inputs(chosen)
    return f"text alone: {chosen.__name__} takes {', '.join(others)}, too; for these {EXAMPLE}" if others else ""


def _other_inputs(kind: Any) -> list[str]:
    parameters = inspect.signature(kind.forward).parameters
    return [name for name in OTHER_INPUTS if name in parameters]


def _base_class(config: PreTrainedConfig) -> Any:
    from transformers import AutoModel

    found = AutoModel._model_mapping.get(type(config), None)
    return found[0] if isinstance(found, tuple) else found


def _head_name(config: PreTrainedConfig, task: str) -> str:
    from transformers.models.auto import modeling_auto

    found = getattr(modeling_auto, TASK_MAPPINGS[task]).get(config.model_type, "")
    return str(found if isinstance(found, str) else found[0])


def check_head(config: PreTrainedConfig, task: str) -> None:
    """Raise UsageError unless the architecture has a head for this task."""
    tasks = _tasks_of(config.model_type)
    if task not in tasks:
        has = f"it has {', '.join(tasks)}" if tasks else EXAMPLE
        raise UsageError(f"{config.model_type} has no head for {task}; {has}")


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
