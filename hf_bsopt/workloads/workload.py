"""What is trained: a model by its configuration, a task, a length, and how.

    workload = describe("dmis-lab/biobert-v1.1", ModelOptions(max_length=512))
    with torch.device("meta"):
        model = workload.build()

Only configurations are read, never weights: random ones need the same memory.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol, Unpack

from ..data import catalog
from ..errors import MissingExtraError, UsageError
from ..option_keywords import FindKeywords
from ..options import ModelOptions, Options
from .bnb_4bit import quantized
from .model_config import AUTO_CLASSES, check_head, default_task, load_config, position_limit, supports_sdpa
from .step_settings import ALIASES, OPTIMIZERS, TRAINERS, OwnParts, Precision, StepSettings

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedConfig

Task = Literal[
    "token-classification", "sequence-classification", "masked-lm", "question-answering", "causal-lm", "seq2seq"
]
Attention = Literal["sdpa", "eager", "flash_attention_2"]
Phase = Literal["training", "evaluation", "generation"]

PRECISIONS: dict[str, str] = {
    "fp16": "mixed precision, fp16 over the weights",
    "bf16": "mixed precision, bf16 over the weights",
    "fp32": "single precision",
    "fp16-weights": "weights, gradients and optimizer in fp16",
    "bf16-weights": "weights, gradients and optimizer in bf16",
}
UNREADABLE = ("meta",)
"""Devices on which a mask cannot be read, so that it is kept in any case."""
DEFAULT_LENGTH = 512
GENERATING = ("causal-lm", "seq2seq")
DEFAULT_LABELS = {"token-classification": 3, "sequence-classification": 2}
"""Three: the B, I and O of one kind of entity."""


class Trainable(Protocol):
    """What a prediction, a probe or a report needs to know of a workload.

    own: the parts of its step that are the user's. accumulation: micro-batches per optimizer step. new_tokens: how many
    a generation adds to each sequence. is_custom: the model's code is the user's, so that its growth with the batch has
    to be verified. defaults: what was chosen for the user, and why.
    """

    @property
    def settings(self) -> StepSettings: ...
    @property
    def own(self) -> OwnParts: ...
    @property
    def length(self) -> int: ...
    @property
    def accumulation(self) -> int: ...
    @property
    def new_tokens(self) -> int: ...
    @property
    def is_custom(self) -> bool: ...
    @property
    def defaults(self) -> tuple[str, ...]: ...
    @property
    def evaluation_examples(self) -> int | None:
        """Number of examples in the evaluation dataset, None if it is not known."""
        ...

    def build(self) -> nn.Module: ...
    def batch(self, batch_size: int, device: str, *, padded: bool = True) -> dict[str, Any]:
        """Return a batch of full length. ``padded``: one sequence has a padding token, so that the mask is needed."""
        ...

    def accumulating(self, micro_batches: int) -> Trainable: ...
    def replicated(self) -> Trainable:
        """Return the same on each of several processes (DistributedDataParallel)."""
        ...

    def evaluating(self) -> Trainable:
        """Return the same with the batches of an evaluation."""
        ...

    def values(self) -> dict[str, Any]:
        """Return everything that decides about memory, as JSON values."""
        ...

    def describe(self) -> list[tuple[str, str]]:
        """Return (name, value) of everything that decides about memory."""
        ...

    def portable(self) -> Trainable:
        """Return the same without weights, for another process."""
        ...


@dataclass(frozen=True)
class Workload:
    """A Hugging Face model and how it is trained.

    max_length: tokens in every sequence (the worst case: nothing is shorter).
    weights_dtype: what the weights are held in, "float32", "float16" or "bfloat16".
    lora_r: rank of peft's LoRA, 0 without. lora_targets: names of modules; None is peft's choice for the architecture.
    accumulation: micro-batches in an optimizer step; from 2 on the gradients are resident during the forward.
    new_tokens: how many a generation adds to each sequence; 0 where none is asked for.
    pretrained: a real step loads the checkpoint's weights, in place of random ones that need the same memory.
    is_replicated: on each of several processes, by DistributedDataParallel.
    defaults: what was chosen for the user, and why.
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
    load_in_4bit: bool = False
    accumulation: int = 1
    new_tokens: int = 0
    pretrained: bool = False
    is_replicated: bool = False
    defaults: tuple[str, ...] = ()

    @property
    def settings(self) -> StepSettings:
        return StepSettings(self.precision, self.optimizer, is_replicated=self.is_replicated)

    @property
    def own(self) -> OwnParts:
        return TRAINERS

    @property
    def length(self) -> int:
        return self.max_length

    @property
    def is_custom(self) -> bool:
        """Whether the model's code is the user's, so that its growth with the batch has to be verified."""
        return False

    @property
    def evaluation_examples(self) -> int | None:
        """Not known of a model by name."""
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
        """Build the model on the default device, with random weights unless ``pretrained``; on ``meta`` it has none.

        It is ready to train: adapters on, cache off.
        """
        import torch

        model = self._model()
        model.config.use_cache = False  # as Trainer does, when the parts of the model have their own copies already
        if self.load_in_4bit:
            model = quantized(model, getattr(torch, self.weights_dtype))
        if self.activation_checkpointing:
            _checkpoint_activations(model)
        if self.lora_r:
            from peft import LoraConfig, get_peft_model

            targets = list(self.lora_targets) if self.lora_targets else None
            try:
                model = get_peft_model(model, LoraConfig(r=self.lora_r, target_modules=targets))
            except ValueError as error:
                raise UsageError(f"LoRA: {error}") from error
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
        except Exception as error:  # every architecture fails in its own way on invalid values
            raise UsageError(f"no model can be built from the configuration of {self.model}: {error}") from error

    def batch(self, batch_size: int, device: str, *, padded: bool = True) -> dict[str, torch.Tensor]:
        """Return the worst case: every sequence of full length, one of them padded so that the mask is kept.

        input_ids, attention_mask and labels are int64 of shape [batch_size, max_length]; labels of a sequence task, and
        the positions of question answering, are [batch_size].
        """
        import torch

        def ones(*shape: int) -> torch.Tensor:
            return torch.ones(shape, dtype=torch.int64, device=device)

        tokens = batch_size, self.max_length
        batch = {"input_ids": ones(*tokens)}
        if self.attention != "flash_attention_2":  # it takes the padding out itself
            batch["attention_mask"] = ones(*tokens)
            if padded and device not in UNREADABLE and self.max_length > 1:
                batch["attention_mask"][0, -1] = 0
        if self.task == "sequence-classification":
            batch["labels"] = ones(batch_size)
        elif self.task == "question-answering":
            batch["start_positions"], batch["end_positions"] = ones(batch_size), ones(batch_size)
        else:
            batch["labels"] = ones(*tokens)
        return batch

    def values(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        hidden = ("config", "defaults")
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in hidden}

    def describe(self) -> list[tuple[str, str]]:
        """Return (name, value) of everything that decides about memory."""
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
            rows.append(("adapters", f"LoRA r={self.lora_r} on {targets}"))
        if self.load_in_4bit:
            rows.append(("weights", "4-bit nf4 with double quantization (bitsandbytes)"))
        return rows


def describe(model: str, options: ModelOptions | None = None, **keywords: Unpack[FindKeywords]) -> Workload:
    """Return the workload that these options mean, with a default and its reason for each one that was not given.

    ``model``: a name of the catalog, a folder with a config.json, or a hub id. ``keywords``: in place of ``options``.
    Raises UnknownModelError, UsageError or MissingExtraError.
    """
    options = options or Options.of(keywords, "name").model
    if options.lora_targets and not options.lora_r:
        raise UsageError("lora_targets are the modules that get adapters: add their rank, such as --lora_r 16")
    if options.lora_r:
        _needs("peft", "LoRA")
    if options.load_in_4bit:
        _needs("bitsandbytes", "4-bit weights")
        if not options.lora_r:
            raise UsageError("4-bit weights cannot be trained themselves: add adapters, such as --lora_r 16")
        if options.pretrained:
            raise UsageError(
                "weights that are quantized here are random: leave out pretrained, they need the same memory"
            )
    config = load_config(model, trust_remote_code=options.trust_remote_code)
    reasons: list[str] = []
    task = _task(config, options, reasons)
    max_length = _length(config, options.max_length, reasons)
    _check_generation(config, task, max_length, options.generate)
    precision = _precision(options, reasons)
    weights_dtype = _weights_dtype(config, precision, options, reasons)
    optimizer = _optimizer(options, reasons)
    attention, why = _attention(config, options.attention, task)
    if why:
        reasons.append(f"attention {attention}: {why}")
    _set_labels(config, task, options.num_labels, reasons)
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
        load_in_4bit=options.load_in_4bit,
        new_tokens=options.generate,
        pretrained=options.pretrained,
        defaults=tuple(reasons),
    )


def _task(config: PreTrainedConfig, options: ModelOptions, reasons: list[str]) -> str:
    task = options.task
    if task is None:
        task, why = default_task(config)
        reasons.append(f"task {task}: {why}")
    check_choice("task", task, tuple(AUTO_CLASSES))
    check_head(config, task)
    return task


def _precision(options: ModelOptions, reasons: list[str]) -> str:
    precision = options.precision
    if precision is None:
        precision = "fp16"
        reasons.append("precision fp16: runs on every GPU from the T4 on")
    check_choice("precision", precision, tuple(PRECISIONS))
    return precision


def _weights_dtype(config: PreTrainedConfig, precision: str, options: ModelOptions, reasons: list[str]) -> str:
    dtype, has_frozen_base = options.weights_dtype, bool(options.lora_r or options.load_in_4bit)
    if dtype is None:
        dtype = _default_dtype(precision, has_frozen_base)
        saved = str(getattr(config, "dtype", None) or "").removeprefix("torch.")
        if dtype == "float32" and saved in ("float16", "bfloat16"):
            reasons.append(
                f"weights in float32: the checkpoint is saved in {saved}, which from_pretrained keeps unless it is "
                f"given dtype=torch.float32; --weights_dtype {saved} predicts it so"
            )
        if has_frozen_base and dtype != "float32":
            reasons.append(f"weights in {dtype}: the base model is frozen, only adapters are trained in float32")
    check_choice("weights dtype", dtype, ("float32", "float16", "bfloat16"))
    if precision == "fp16" and dtype == "float16" and not has_frozen_base:
        raise UsageError(
            "fp16 mixed precision cannot train weights that are held in float16 (its gradient scaler refuses them): "
            "load them with dtype=torch.float32, or take --bf16"
        )
    return dtype


def _optimizer(options: ModelOptions, reasons: list[str]) -> str:
    optimizer = options.optimizer
    if optimizer is None:
        optimizer = "adamw_torch_fused"
        reasons.append("optimizer adamw_torch_fused: Trainer's default")
    optimizer = ALIASES.get(optimizer, optimizer)
    check_choice("optimizer", optimizer, tuple(OPTIMIZERS))
    if "8bit" in optimizer:
        _needs("bitsandbytes", optimizer)
    return optimizer


def _set_labels(config: PreTrainedConfig, task: str, num_labels: int | None, reasons: list[str]) -> None:
    """Set the number of classes in the configuration, and a padding token where the head needs one."""
    if num_labels is not None and task not in DEFAULT_LABELS:
        raise UsageError(f"num_labels applies to classification, and the task is {task}")
    labels = num_labels or DEFAULT_LABELS.get(task)
    if labels is not None:
        config.num_labels = labels
        if num_labels is None:
            reasons.append(f"{labels} labels: a few more or less change nothing")
    if task == "sequence-classification" and getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = 0


def check_choice(what: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise UsageError, with the nearest choice, unless the value is one of the choices."""
    if value not in choices:
        import difflib

        near = difflib.get_close_matches(value, choices, n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UsageError(f"{what} {value!r} is not one of {', '.join(choices)}{hint}")


def _needs(package: str, what: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise MissingExtraError(f"{what} needs {package}: pip install {package}")


def _length(config: PreTrainedConfig, asked: int | None, reasons: list[str]) -> int:
    limit = position_limit(config)
    if asked is None:
        length = min(DEFAULT_LENGTH, limit or DEFAULT_LENGTH)
        reasons.append(f"max_length {length}: " + ("the model's limit" if limit == length else "a usual one"))
        return length
    if limit is not None and asked > limit:
        raise UsageError(f"max_length {asked} is over the model's limit of {limit} positions; use {limit} or less")
    return asked


def _check_generation(config: PreTrainedConfig, task: str, max_length: int, new_tokens: int) -> None:
    if not new_tokens:
        return
    if task not in GENERATING:
        raise UsageError(f"a model for {task} generates nothing; --task {GENERATING[0]} or {GENERATING[1]} does")
    limit = position_limit(config)
    prompt = max_length if task == "causal-lm" else 1
    if limit is not None and prompt + new_tokens > limit:
        room = f"--max_length {limit - new_tokens}" if new_tokens < limit and task == "causal-lm" else "fewer tokens"
        raise UsageError(
            f"{new_tokens} tokens after a prompt of {prompt} are over the model's limit of {limit} positions; {room}"
        )


def _default_dtype(precision: str, frozen_base: bool) -> str:
    half = {"fp16": "float16", "bf16": "bfloat16", "fp16-weights": "float16", "bf16-weights": "bfloat16"}
    if precision.endswith("-weights") or frozen_base:
        return half.get(precision, "float32")
    return "float32"


def _attention(config: PreTrainedConfig, asked: str | None, task: str) -> tuple[str, str]:
    check_choice("attention", asked or "sdpa", ("sdpa", "eager", "flash_attention_2"))
    if asked == "eager" or supports_sdpa(config, task):
        return (asked, "") if asked else ("sdpa", "transformers' default")
    return "eager", f"{config.model_type} has no other in transformers"


def _checkpoint_activations(model: Any) -> None:
    """Turn it on; transformers 5.23 gave the method a new name."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    try:
        enable()
    except ValueError as error:
        raise UsageError(f"activation checkpointing: {error}") from error
