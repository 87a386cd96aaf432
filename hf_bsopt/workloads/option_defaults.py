"""Values for the options of a model by name: each with its reason, which is empty if the user gave the value."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import UsageError
from .checks import check_choice
from .heads import AUTO_CLASSES, check_architecture, check_head, default_task, supports_sdpa
from .optimizers import optimizer_name
from .positions import is_hard_limit, position_limit
from .step_settings import precision_name

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

DEFAULT_LENGTH = 512
GENERATING_TASKS = ("causal-lm", "seq2seq")
DEFAULT_LABELS = {"token-classification": 3, "sequence-classification": 2}
"""Three: the B, I and O tags of one kind of entity."""
DTYPES = ("float32", "float16", "bfloat16")
ATTENTIONS = ("sdpa", "eager", "flash_attention_2")


def choose_task(config: PreTrainedConfig, requested: str | None) -> tuple[str, str]:
    """Return the task and the reason. Raises UsageError if the architecture has no head for it."""
    task, reason = requested, ""
    if task is None:
        task, why = default_task(config)
        reason = f"task {task}: {why}"
    check_choice("task", task, tuple(AUTO_CLASSES))
    check_head(config, task)
    left_out = check_architecture(config, task, is_requested=requested is not None)
    return task, "; ".join(part for part in (reason, left_out) if part)


def choose_length(config: PreTrainedConfig, requested: int | None) -> tuple[int, str]:
    """Return the tokens per sequence and the reason. Raises UsageError for more than the model has positions for."""
    limit = position_limit(config)
    if requested is None:
        length = min(DEFAULT_LENGTH, limit or DEFAULT_LENGTH)
        return length, f"max_length {length}: " + ("the model's limit" if limit == length else "a usual length")
    if limit is None or requested <= limit:
        return requested, ""
    if is_hard_limit(config):
        raise UsageError(f"max_length {requested} exceeds the model's limit of {limit} positions; use {limit} or less")
    return requested, (
        f"max_length {requested} is more than the {limit} tokens of max_position_embeddings: the model runs, since its "
        f"positions are computed, and was not trained at that length"
    )


def check_chunks(config: PreTrainedConfig, max_length: int) -> None:
    """Raise UsageError if the feed-forward layers are cut into chunks that do not divide the length."""
    chunk = getattr(config, "chunk_size_feed_forward", 0)
    if isinstance(chunk, int) and chunk > 0 and max_length % chunk:
        longer = -(-max_length // chunk) * chunk
        raise UsageError(
            f"chunk_size_feed_forward {chunk} of the configuration does not divide max_length {max_length}; use "
            f"--max_length {longer}, or 0 for it"
        )


def check_generation(config: PreTrainedConfig, task: str, max_length: int, new_tokens: int) -> None:
    """Raise UsageError unless a model for this task can generate so many tokens after a prompt of full length."""
    if not new_tokens:
        return
    if task not in GENERATING_TASKS:
        raise UsageError(
            f"a model for {task} does not generate text; use --task {GENERATING_TASKS[0]} or {GENERATING_TASKS[1]}"
        )
    limit = position_limit(config)
    prompt = max_length if task == "causal-lm" else 1
    if limit is not None and prompt + new_tokens > limit and is_hard_limit(config):
        has_room = new_tokens < limit and task == "causal-lm"
        instead = f"--max_length {limit - new_tokens}" if has_room else "fewer new tokens"
        raise UsageError(
            f"a prompt of {prompt} tokens and {new_tokens} new ones exceed the model's limit of {limit} positions; use "
            f"{instead}"
        )


def choose_precision(requested: str | None) -> tuple[str, str]:
    """Return the precision and the reason."""
    if requested is None:
        return "fp16", "precision fp16: supported by every GPU since the T4"
    return precision_name(requested), ""


def choose_weights_dtype(
    config: PreTrainedConfig, precision: str, requested: str | None, *, has_frozen_base: bool
) -> tuple[str, str]:
    """Return the dtype in which the weights are held and the reason.

    ``has_frozen_base``: only adapters are trained. Raises UsageError for weights that the gradient scaler refuses.
    """
    dtype, reason = requested, ""
    if dtype is None:
        dtype = _default_dtype(precision, has_frozen_base)
        saved = str(getattr(config, "dtype", None) or "").removeprefix("torch.")
        if dtype == "float32" and saved in ("float16", "bfloat16"):
            reason = (
                f"weights in float32: the checkpoint is saved in {saved}, and from_pretrained keeps that dtype unless "
                f"it is called with dtype=torch.float32; for a prediction in {saved}, use --weights_dtype {saved}"
            )
        elif has_frozen_base and dtype != "float32":
            reason = f"weights in {dtype}: the base model is frozen, only adapters are trained in float32"
    check_choice("weights dtype", dtype, DTYPES)
    if precision == "fp16" and dtype == "float16" and not has_frozen_base:
        raise UsageError(
            "fp16 mixed precision cannot train weights that are held in float16 (its gradient scaler refuses them): "
            "load them with dtype=torch.float32, or use --bf16"
        )
    return dtype, reason


def _default_dtype(precision: str, has_frozen_base: bool) -> str:
    half = {"fp16": "float16", "bf16": "bfloat16", "fp16-weights": "float16", "bf16-weights": "bfloat16"}
    if precision.endswith("-weights") or has_frozen_base:
        return half.get(precision, "float32")
    return "float32"


def choose_optimizer(requested: str | None) -> tuple[str, str]:
    """Return the optimizer, aliases resolved, and the reason."""
    if requested is None:
        return "adamw_torch_fused", "optimizer adamw_torch_fused: Trainer's default"
    return optimizer_name(requested), ""


def choose_attention(config: PreTrainedConfig, requested: str | None, task: str) -> tuple[str, str]:
    """Return the attention implementation and the reason; eager if the architecture has no other."""
    if requested is not None:
        check_choice("attention", requested, ATTENTIONS)
    if requested == "eager" or supports_sdpa(config, task):
        return (requested, "") if requested else ("sdpa", "attention sdpa: transformers' default")
    return "eager", f"attention eager: transformers has no other implementation for {config.model_type}"


def set_labels(config: PreTrainedConfig, task: str, requested: int | None) -> str:
    """Set the number of classes in the configuration, and a padding token if the head needs one; return the reason for
    the number.
    """
    if requested is not None and task not in DEFAULT_LABELS:
        raise UsageError(f"num_labels is an option for classification, and the task is {task}")
    labels, reason = requested or DEFAULT_LABELS.get(task), ""
    if labels is not None:
        config.num_labels = labels
        if requested is None:
            reason = f"{labels} labels: a few more or fewer make no difference"
    if getattr(config, "problem_type", None) is not None:
        config.problem_type = None  # the labels of its losses differ by a few bytes
    if task == "sequence-classification" and getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = 0
    return reason


def quantization_reason(config: PreTrainedConfig, weights_dtype: str, *, load_in_4bit: bool) -> str:
    """Return what is assumed if the checkpoint is quantized already."""
    settings = getattr(config, "quantization_config", None)
    if settings is None or load_in_4bit:
        return ""
    method = settings.get("quant_method", "") if isinstance(settings, dict) else getattr(settings, "quant_method", "")
    return (
        f"the checkpoint is quantized ({getattr(method, 'value', method) or 'see its quantization_config'}), and its "
        f"weights are sized as if held in {weights_dtype}; for adapters over 4-bit weights: --lora_r 16 --load_in_4bit"
    )
