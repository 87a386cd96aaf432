"""A Hugging Face model by name: its configuration, a task, a length, and how it is trained.

    workload = describe("dmis-lab/biobert-v1.1", ModelOptions(max_length=512))
    with torch.device("meta"):
        model = workload.build()

Only configurations are read, never weights: random ones need the same memory.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, Unpack

from ..data import catalog
from ..errors import UsageError
from ..option_keywords import FindKeywords
from ..options import ModelOptions, Options
from .adapters import check_adapters, choose_dropout, kbit_reason, with_adapters
from .bnb_4bit import quantized
from .config_values import in_one_line
from .heads import AUTO_CLASSES, EXAMPLE, has_stacked_experts
from .model_config import load_config
from .optimizers import OPTIMIZERS
from .option_defaults import (
    check_chunks,
    check_generation,
    choose_attention,
    choose_length,
    choose_optimizer,
    choose_precision,
    choose_task,
    choose_weights_dtype,
    quantization_reason,
    set_labels,
)
from .step_settings import NO_OVERRIDES, PRECISIONS, Precision, StepOverrides, StepSettings

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedConfig

Task = Literal[
    "token-classification", "sequence-classification", "masked-lm", "question-answering", "causal-lm", "seq2seq"
]
Attention = Literal["sdpa", "eager", "flash_attention_2"]


@dataclass(frozen=True)
class Workload:
    """A Hugging Face model and how it is trained.

    max_length: tokens in every sequence (the worst case: no sequence is shorter).
    weights_dtype: the dtype of the weights, "float32", "float16" or "bfloat16".
    lora_r: rank of peft's LoRA, 0 for none. lora_targets: names of modules or "all-linear", None for peft's choice.
    lora_dropout, lora_alpha: as in peft's LoraConfig; None for its default.
    prepare_kbit: 4-bit models go through peft's prepare_model_for_kbit_training.
    accumulation: micro-batches per optimizer step; from 2 on, gradients are in memory during the forward pass.
    new_tokens: tokens that a generation adds to each sequence; 0 for no generation.
    pretrained: real steps load the checkpoint's weights, instead of random ones that need the same memory.
    is_replicated: True for DistributedDataParallel, which replicates the model on each process.
    defaults: the choices that were made for the user, each with its reason.
    """

    model: str
    config: PreTrainedConfig = field(repr=False, compare=False)
    task: Task
    max_length: int
    precision: Precision = "fp16"
    weights_dtype: str = "float32"
    optimizer: str = "adamw_torch_fused"
    attention: Attention = "sdpa"
    activation_checkpointing: bool = False
    lora_r: int = 0
    lora_targets: tuple[str, ...] | None = None
    lora_dropout: float = 0.0
    lora_alpha: float | None = None
    load_in_4bit: bool = False
    prepare_kbit: bool = False
    accumulation: int = 1
    new_tokens: int = 0
    pretrained: bool = False
    is_replicated: bool = False
    defaults: tuple[str, ...] = ()

    @property
    def settings(self) -> StepSettings:
        return StepSettings(self.precision, self.optimizer, is_replicated=self.is_replicated)

    @property
    def overrides(self) -> StepOverrides:
        return NO_OVERRIDES

    @property
    def length(self) -> int:
        return self.max_length

    @property
    def is_custom(self) -> bool:
        """False: the model's code is that of transformers."""
        return False

    @property
    def evaluation_examples(self) -> int | None:
        """None: a model by name has no dataset."""
        return None

    def accumulating(self, micro_batches: int) -> Workload:
        return replace(self, accumulation=micro_batches)

    def replicated(self) -> Workload:
        return replace(self, is_replicated=True)

    def evaluating(self) -> Workload:
        return self

    def portable(self) -> Workload:
        return self

    def build(self) -> nn.Module:
        """Build the model on the default device, ready to train: with adapters, without a cache of keys and values.

        The weights are random unless ``pretrained``; on ``meta`` there are none. Raises UsageError if the configuration
        or the adapters are invalid.
        """
        import torch

        model = self._model()
        model.config.use_cache = False  # as Trainer does: after the construction, in which submodules copied the config
        if self.load_in_4bit:
            model = quantized(model, getattr(torch, self.weights_dtype), is_prepared=self.prepare_kbit)
        if self.activation_checkpointing:
            _turn_on_checkpointing(model)
        if self.lora_r:
            model = with_adapters(
                model, self.lora_r, self.lora_targets, dropout=self.lora_dropout, alpha=self.lora_alpha, task=self.task
            )
            if self.activation_checkpointing:
                model.enable_input_require_grads()
        return model

    def _model(self) -> Any:
        import torch
        import transformers

        config = self.config.__class__.from_dict(self.config.to_dict())
        config._attn_implementation = "sdpa" if self.attention == "flash_attention_2" else self.attention
        auto_class = getattr(transformers, AUTO_CLASSES[self.task])
        dtype = getattr(torch, self.weights_dtype)
        device = torch.get_default_device()
        if self.pretrained and device.type != "meta":
            try:
                with torch.device("cpu"):
                    model = auto_class.from_pretrained(self.model, config=config, dtype=dtype)
            except (OSError, ValueError) as error:
                raise UsageError(f"the weights of {self.model} cannot be loaded: {error}") from error
            return model.to(device)
        try:
            return auto_class.from_config(config, dtype=dtype)
        except Exception as error:  # each architecture raises its own errors for invalid values
            raise UsageError(
                f"a model cannot be built from the configuration of {self.model}: {in_one_line(error)}"
            ) from error

    def batch(self, batch_size: int, device: str, *, padded: bool = True) -> dict[str, torch.Tensor]:
        """Return the worst case: all sequences have full length, and one of them is padded so that the mask is kept.

        input_ids, attention_mask and labels are int64 of shape [batch_size, max_length]; the labels of sequence
        classification, and the positions of question answering, are [batch_size].
        """
        import torch

        from .._utils.known_values import make_unknown

        def ones(*shape: int) -> torch.Tensor:
            return torch.ones(shape, dtype=torch.int64, device=device)

        tokens = batch_size, self.max_length
        batch = {"input_ids": ones(*tokens)}
        if self.attention != "flash_attention_2":  # it removes the padding itself
            batch["attention_mask"] = ones(*tokens)
            # the model cannot read the values of a mask on meta, and keeps it in any case
            if padded and device != "meta" and self.max_length > 1:
                batch["attention_mask"][0, -1] = 0
        if self.task == "sequence-classification":
            batch["labels"] = ones(batch_size)
        elif self.task == "question-answering":
            batch["start_positions"], batch["end_positions"] = ones(batch_size), ones(batch_size)
        else:
            batch["labels"] = ones(*tokens)
        make_unknown(batch.values())
        return batch

    def failure(self, error: Exception) -> str:
        """Return a sentence about a training step that failed for another reason than memory, and what to do."""
        missing = ""
        if self.task == "seq2seq" and getattr(self.config, "decoder_start_token_id", None) is None:
            missing = "; its configuration has no decoder_start_token_id, from which most decoders make their inputs"
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        return (
            f"a training step of {self.model} for {self.task} fails: {kind}{in_one_line(error).rstrip('.')}{missing}. "
            f"Check its configuration, or {EXAMPLE}"
        )

    def values(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        hidden = ("config", "defaults")
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in hidden}

    def describe(self) -> list[tuple[str, str]]:
        """Return (name, value) of everything that determines memory use."""
        rows = [
            ("model", self.model),
            ("task", self.task),
            ("max_length", str(self.max_length)),
            ("precision", f"{self.precision} ({PRECISIONS[self.precision]}; weights held in {self.weights_dtype})"),
            ("optimizer", f"{self.optimizer} ({OPTIMIZERS[self.optimizer]})"),
            ("attention", self.attention),
        ]
        if self.activation_checkpointing:
            rows.append(("checkpointing", "activations are recomputed in the backward pass"))
        if self.lora_r:
            targets = ", ".join(self.lora_targets) if self.lora_targets else "peft's modules for this architecture"
            alpha = "" if self.lora_alpha is None else f", alpha {self.lora_alpha:g}"
            rows.append(("adapters", f"LoRA r={self.lora_r} on {targets}, dropout {self.lora_dropout:g}{alpha}"))
        if self.load_in_4bit:
            rows.append(("weights", f"4-bit nf4 with double quantization (bitsandbytes), {self._kbit_preparation}"))
        return rows

    @property
    def _kbit_preparation(self) -> str:
        if self.prepare_kbit:
            return "all others cast to float32 by prepare_model_for_kbit_training"
        return f"all others in {self.weights_dtype}, without prepare_model_for_kbit_training"


def describe(model: str, options: ModelOptions | None = None, **keywords: Unpack[FindKeywords]) -> Workload:
    """Return the workload that these options describe, with a default and its reason for each option that is not set.

    ``model``: a name in the catalog, a folder with a config.json, or a hub id. ``keywords``: instead of ``options``.
    Raises UnknownModelError, UsageError or MissingExtraError.
    """
    options = options or Options.of(keywords, "name").model
    check_adapters(options)
    config = load_config(model, trust_remote_code=options.trust_remote_code)
    task, task_reason = choose_task(config, options.task)
    max_length, length_reason = choose_length(config, options.max_length)
    check_chunks(config, max_length)
    check_generation(config, task, max_length, options.generate)
    precision, precision_reason = choose_precision(options.precision)
    weights_dtype, dtype_reason = choose_weights_dtype(
        config, precision, options.weights_dtype, has_frozen_base=bool(options.lora_r or options.load_in_4bit)
    )
    optimizer, optimizer_reason = choose_optimizer(options.optimizer)
    attention, attention_reason = choose_attention(config, options.attention, task)
    labels_reason = set_labels(config, task, options.num_labels)
    has_experts = has_stacked_experts(config, task)
    lora_dropout, dropout_reason = choose_dropout(options, has_experts=has_experts)
    reasons = (
        task_reason,
        length_reason,
        precision_reason,
        dtype_reason,
        optimizer_reason,
        attention_reason,
        labels_reason,
        dropout_reason,
        quantization_reason(config, weights_dtype, load_in_4bit=options.load_in_4bit),
        kbit_reason(options, leaves_experts=has_experts),
    )
    entry = catalog.model_entry(model)
    return Workload(
        model=entry.hub_id if entry else model,
        config=config,
        task=task,  # type: ignore[arg-type]
        max_length=max_length,
        precision=precision,  # type: ignore[arg-type]
        weights_dtype=weights_dtype,
        optimizer=optimizer,
        attention=attention,  # type: ignore[arg-type]
        activation_checkpointing=options.activation_checkpointing,
        lora_r=options.lora_r,
        lora_targets=options.lora_targets,
        lora_dropout=lora_dropout,
        lora_alpha=options.lora_alpha,
        load_in_4bit=options.load_in_4bit,
        prepare_kbit=options.load_in_4bit and options.prepare_kbit,
        new_tokens=options.generate,
        pretrained=options.pretrained,
        defaults=tuple(reason for reason in reasons if reason),
    )


def _turn_on_checkpointing(model: Any) -> None:
    """Turn on activation checkpointing; transformers 5.23 gave the method a new name."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    try:
        enable()
    except ValueError as error:
        raise UsageError(f"activation checkpointing: {error}") from error
