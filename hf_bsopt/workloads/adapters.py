"""LoRA adapters, as peft adds them, and what the options about them may be."""

from __future__ import annotations

import warnings
from typing import Any

from ..errors import InvalidOptionError, UsageError
from ..options import ModelOptions
from .checks import require_package

USUAL_DROPOUT = 0.05
"""trl's default (ModelConfig.lora_dropout), and that of most tutorials; peft's own default is 0. Any dropout keeps a
mask and a copy of the adapter's input: the same memory for every rate above 0."""
ALL_LINEAR = "all-linear"
TASK_TYPES = {
    "token-classification": "TOKEN_CLS",
    "sequence-classification": "SEQ_CLS",
    "question-answering": "QUESTION_ANS",
    "causal-lm": "CAUSAL_LM",
    "seq2seq": "SEQ_2_SEQ_LM",
}
"""peft's name of each task: it trains the head of a classifier, which is new, too. masked-lm has none."""


def check_adapters(options: ModelOptions) -> None:
    """Raise UsageError or MissingExtraError for adapters or 4-bit weights that cannot be trained as requested."""
    if options.lora_dropout is not None and options.lora_dropout >= 1:
        raise InvalidOptionError("lora_dropout", f"is below 1, such as {USUAL_DROPOUT}, not {options.lora_dropout}")
    if not options.lora_r:
        for name in ("lora_targets", "lora_dropout", "lora_alpha"):
            if getattr(options, name) is not None:
                raise UsageError(f"{name} is about adapters: add their rank, such as --lora_r 16")
    if options.lora_targets is not None and ALL_LINEAR in options.lora_targets and len(options.lora_targets) > 1:
        raise UsageError(f"lora_targets: {ALL_LINEAR} has the other names in it; give it alone")
    if options.lora_r:
        require_package("peft", "LoRA")
    if options.load_in_4bit:
        require_package("bitsandbytes", "4-bit weights")
        if not options.lora_r:
            raise UsageError("4-bit weights cannot be trained themselves: add adapters, such as --lora_r 16")
        if options.pretrained:
            raise UsageError("4-bit weights are always random here, and need the same memory: leave out pretrained")


def choose_dropout(options: ModelOptions, *, has_experts: bool) -> tuple[float, str]:
    """Return the dropout of the adapters and the reason. peft's adapters of experts take none."""
    if not options.lora_r:
        return 0.0, ""
    if options.lora_dropout is not None:
        return options.lora_dropout, ""
    if has_experts and options.lora_targets in (None, (ALL_LINEAR,)):
        return 0.0, "lora_dropout 0: peft's adapters of experts take no dropout"
    return USUAL_DROPOUT, (
        f"lora_dropout {USUAL_DROPOUT}: that of most tutorials and trl's default; peft's own is 0, which needs less "
        f"memory (--lora_dropout 0)"
    )


def kbit_reason(options: ModelOptions, *, leaves_experts: bool) -> str:
    """Return what is assumed of the weights that bitsandbytes leaves as they are."""
    if not options.load_in_4bit:
        return ""
    dtype = "float32" if options.prepare_kbit else "16 bits"
    experts = f"; the experts are not linear layers: transformers 5 leaves them in {dtype}" if leaves_experts else ""
    if not options.prepare_kbit:
        return f"4-bit weights without prepare_model_for_kbit_training, as asked{experts}"
    return (
        "4-bit weights: prepare_model_for_kbit_training casts norms, embeddings and head to float32, as in the usual "
        "recipe (--no_prepare_kbit if your script leaves it out); it also turns gradient checkpointing on unless it is "
        f"called with use_gradient_checkpointing=False: --gradient_checkpointing{experts}"
    )


def with_adapters(
    model: Any, rank: int, targets: tuple[str, ...] | None, *, dropout: float, alpha: float | None, task: str
) -> Any:
    """Return the model with peft's LoRA. Raises UsageError for targets that the model lacks."""
    import torch
    from peft import LoraConfig, get_peft_model

    modules: Any = ALL_LINEAR if targets == (ALL_LINEAR,) else list(targets) if targets else None
    settings: dict[str, Any] = {} if alpha is None else {"lora_alpha": alpha}
    if task in TASK_TYPES:
        settings["task_type"] = TASK_TYPES[task]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # of patterns that peft itself adds for experts
            model = get_peft_model(model, LoraConfig(r=rank, target_modules=modules, lora_dropout=dropout, **settings))
    except ValueError as error:
        kind = model.config.model_type
        missing = f"peft has no modules of its own for {kind}; name them, or take --lora_targets {ALL_LINEAR}"
        takes_none = "; add --lora_dropout 0" if "lora_dropout" in str(error) else ""
        raise UsageError(f"LoRA: {error if targets else missing}{takes_none}") from error
    for parameter in model.parameters():  # a trained head in fp16, which the gradient scaler refuses: peft's
        if parameter.requires_grad and parameter.dtype == torch.float16:  # cast_mixed_precision_params does the same
            parameter.data = parameter.data.float()
    return model
