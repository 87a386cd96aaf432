"""What is trained: a model by its configuration, a task, a length, and how.

    workload = describe("dmis-lab/biobert-v1.1", max_length=512)
    with torch.device("meta"):
        model = workload.build()

Only configurations are read, never weights: random ones need the same memory.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol

from ..data import catalog
from ..errors import MissingExtraError, UsageError
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
"""Devices on which nobody can read what a mask holds, so that it is kept in any case."""
DEFAULT_LENGTH = 512
GENERATING = ("causal-lm", "seq2seq")
DEFAULT_LABELS = {"token-classification": 3, "sequence-classification": 2}
"""Three: the B, I and O of one kind of entity."""


class Trainable(Protocol):
    """What a prediction, a probe or a report needs to know of a workload.

    own: what of its step is the user's own. accumulation: micro-batches in an optimizer step. new_tokens: how many a
    generation adds to each sequence. is_custom: whether the model's code is the user's own, so that its growth with the
    batch has to be verified. defaults: what was chosen for the user, and why.
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
    def build(self) -> nn.Module: ...
    def batch(self, batch_size: int, device: str, *, padded: bool = True) -> dict[str, Any]:
        """Of full length. ``padded``: one sequence has a token of padding, so that the mask is needed."""
        ...

    def accumulating(self, micro_batches: int) -> Trainable: ...
    def replicated(self) -> Trainable:
        """The same on each of several processes (DistributedDataParallel)."""
        ...

    def evaluating(self) -> Trainable:
        """The same with the batches of an evaluation."""
        ...

    def values(self) -> dict[str, Any]:
        """What decides about memory, as JSON knows it."""
        ...

    def describe(self) -> list[tuple[str, str]]:
        """(name, value) of everything that decides about memory."""
        ...

    def portable(self) -> Trainable:
        """The same without weights, for another process."""
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
        """Whether the model's code is the user's own, so that its growth with the batch has to be verified."""
        return False

    def accumulating(self, micro_batches: int) -> Workload:
        return replace(self, accumulation=micro_batches)

    def replicated(self) -> Workload:
        return replace(self, is_replicated=True)

    def evaluating(self) -> Workload:
        return self

    def portable(self) -> Workload:
        return self

    def build(self) -> nn.Module:
        """The model on the default device, with random weights unless ``pretrained``; on ``meta`` it has none. Trained
        as it is: adapters on, cache off.
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
                raise UsageError(f"the weights of {self.model} can't be loaded: {error}") from error
            return model.to(device)
        try:
            return auto_class.from_config(config, dtype=dtype)
        except Exception as error:  # every architecture fails in its own way on values that can't be
            raise UsageError(f"no model can be built from the configuration of {self.model}: {error}") from error

    def batch(self, batch_size: int, device: str, *, padded: bool = True) -> dict[str, torch.Tensor]:
        """The worst case: every sequence of full length, one of them padded so that the mask is kept.

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
        """The fields, as JSON knows them."""
        hidden = ("config", "defaults")
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in hidden}

    def describe(self) -> list[tuple[str, str]]:
        """(name, value) of everything that decides about memory."""
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


def describe(
    model: str,
    *,
    task: str | None = None,
    max_length: int | None = None,
    precision: str | None = None,
    weights_dtype: str | None = None,
    optimizer: str | None = None,
    attention: str | None = None,
    activation_checkpointing: bool = False,
    lora_r: int = 0,
    lora_targets: tuple[str, ...] | None = None,
    load_in_4bit: bool = False,
    num_labels: int | None = None,
    new_tokens: int = 0,
    pretrained: bool = False,
    trust_remote_code: bool = False,
) -> Workload:
    """The workload that these options mean, with a default and its reason for everything that was not said.

    ``model``: a name of the catalog, a folder with a config.json, or a hub id. Raises UnknownModelError, UsageError or
    MissingExtraError.
    """
    if lora_r < 0:
        raise UsageError(f"lora_r is a rank from 1 on, or 0 for no adapters, not {lora_r}")
    if lora_targets and not lora_r:
        raise UsageError("lora_targets are the modules that get adapters: add their rank, such as --lora_r 16")
    if lora_r:
        _needs("peft", "LoRA")
    if load_in_4bit:
        _needs("bitsandbytes", "4-bit weights")
    config = load_config(model, trust_remote_code=trust_remote_code)
    chosen: list[str] = []
    if task is None:
        task, why = default_task(config)
        chosen.append(f"task {task}: {why}")
    check_choice("task", task, tuple(AUTO_CLASSES))
    check_head(config, task)
    max_length = _length(config, max_length, chosen)
    _check_generation(config, task, max_length, new_tokens)
    if pretrained and load_in_4bit:
        raise UsageError("weights that are quantized here are random: leave out pretrained, they need the same memory")
    if precision is None:
        precision = "fp16"
        chosen.append("precision fp16: runs on every GPU from the T4 on")
    check_choice("precision", precision, tuple(PRECISIONS))
    if weights_dtype is None:
        weights_dtype = _default_dtype(precision, bool(lora_r or load_in_4bit))
        saved = str(getattr(config, "dtype", None) or "").removeprefix("torch.")
        if weights_dtype == "float32" and saved in ("float16", "bfloat16"):
            chosen.append(
                f"weights in float32: the checkpoint is saved in {saved}, and from_pretrained keeps that unless it is "
                f"told dtype=torch.float32; --weights_dtype {saved} predicts it so"
            )
        if (lora_r or load_in_4bit) and weights_dtype != "float32":
            chosen.append(f"weights in {weights_dtype}: the base model is frozen, only adapters are trained in float32")
    check_choice("weights dtype", weights_dtype, ("float32", "float16", "bfloat16"))
    if precision == "fp16" and weights_dtype == "float16" and not (lora_r or load_in_4bit):
        raise UsageError(
            "fp16 mixed precision can't train weights that are held in float16 (its gradient scaler refuses them): "
            "load them with dtype=torch.float32, or take --bf16"
        )
    if optimizer is None:
        optimizer = "adamw_torch_fused"
        chosen.append("optimizer adamw_torch_fused: Trainer's default")
    optimizer = ALIASES.get(optimizer, optimizer)
    check_choice("optimizer", optimizer, tuple(OPTIMIZERS))
    if "8bit" in optimizer:
        _needs("bitsandbytes", optimizer)
    attention, why = _attention(config, attention, task)
    if why:
        chosen.append(f"attention {attention}: {why}")
    if load_in_4bit and not lora_r:
        raise UsageError("4-bit weights can't be trained themselves: add adapters, such as --lora_r 16")
    if num_labels is not None and num_labels < 1:
        raise UsageError(f"num_labels is at least 1, not {num_labels}")
    if num_labels is not None and task not in DEFAULT_LABELS:
        raise UsageError(f"num_labels are those of a classification, and the task is {task}")
    labels = num_labels or DEFAULT_LABELS.get(task)
    if labels is not None:
        config.num_labels = labels
        if num_labels is None:
            chosen.append(f"{labels} labels: a few more or less change nothing")
    if task == "sequence-classification" and getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = 0
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
        activation_checkpointing=activation_checkpointing,
        lora_r=lora_r,
        lora_targets=lora_targets,
        load_in_4bit=load_in_4bit,
        new_tokens=new_tokens,
        pretrained=pretrained,
        defaults=tuple(chosen),
    )


def check_choice(what: str, value: str, choices: tuple[str, ...]) -> None:
    """Raises UsageError, with the nearest."""
    if value not in choices:
        import difflib

        near = difflib.get_close_matches(value, choices, n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UsageError(f"{what} {value!r} is not one of {', '.join(choices)}{hint}")


def _needs(package: str, what: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise MissingExtraError(f"{what} needs {package}: pip install {package}")


def _length(config: PreTrainedConfig, asked: int | None, chosen: list[str]) -> int:
    limit = position_limit(config)
    if asked is None:
        length = min(DEFAULT_LENGTH, limit or DEFAULT_LENGTH)
        chosen.append(f"max_length {length}: " + ("the model's limit" if limit == length else "a usual one"))
        return length
    if asked < 1:
        raise UsageError(f"max_length is at least 1, not {asked}")
    if limit is not None and asked > limit:
        raise UsageError(f"max_length {asked} is over the model's limit of {limit} positions; use {limit} or less")
    return asked


def _check_generation(config: PreTrainedConfig, task: str, max_length: int, new_tokens: int) -> None:
    if new_tokens < 0:
        raise UsageError(f"a generation adds at least 1 token, or 0 for none, not {new_tokens}")
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
    """Transformers 5.23 gave the method a new name."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    try:
        enable()
    except ValueError as error:
        raise UsageError(f"activation checkpointing: {error}") from error
