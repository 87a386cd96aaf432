"""The options as keyword arguments, for editors. Written by ``python -m hf_bsopt.options``."""

from __future__ import annotations

from typing import TypedDict

from .options import LearningRateScaling
from .records import GpuSpec


class FindKeywords(TypedDict, total=False):
    """See the fields of the same names in options.py."""

    task: str | None
    max_length: int | None
    max_seq_length: int | None
    precision: str | None
    weights_dtype: str | None
    dtype: str | None
    optimizer: str | None
    optim: str | None
    attention: str | None
    attn_implementation: str | None
    activation_checkpointing: bool
    gradient_checkpointing: bool
    lora_r: int
    lora_targets: tuple[str, ...] | None
    lora_target_modules: tuple[str, ...] | None
    lora_dropout: float | None
    lora_alpha: float | None
    load_in_4bit: bool
    prepare_kbit: bool
    prepare_model_for_kbit_training: bool
    num_labels: int | None
    generate: int
    pretrained: bool
    trust_remote_code: bool
    gpu: str | GpuSpec | None
    device: str
    memory: str | None
    expandable_segments: bool
    probe_timeout: float
    cache: bool
    trust_cache: bool
    target: tuple[float, float]
    multiple_of: int
    batch_size: int | None
    per_device_train_batch_size: int | None
    dataset_size: int | None
    check: int | None
    effective_batch_size: int | None
    total_tokens: int | None
    fill: bool
    gradient_accumulation_steps: int
    num_processes: int
    learning_rate: float | None
    base_batch_size: int | None
    lr_scaling: LearningRateScaling
    evaluation: bool
    verify_evaluation: bool
    eval: bool
    check_evaluation: int | None
    per_device_eval_batch_size: int | None
    throughput: bool
    max_attempts: int


class TrainerKeywords(TypedDict, total=False):
    """See the fields of the same names in options.py."""

    max_length: int | None
    max_seq_length: int | None
    gpu: str | GpuSpec | None
    device: str
    memory: str | None
    expandable_segments: bool
    probe_timeout: float
    target: tuple[float, float]
    multiple_of: int
    batch_size: int | None
    per_device_train_batch_size: int | None
    check: int | None
    effective_batch_size: int | None
    fill: bool
    lr_scaling: LearningRateScaling
    evaluation: bool
    max_attempts: int


class AccelerateKeywords(TypedDict, total=False):
    """See the fields of the same names in options.py."""

    optimizer: str | None
    optim: str | None
    gpu: str | GpuSpec | None
    device: str
    memory: str | None
    expandable_segments: bool
    probe_timeout: float
    target: tuple[float, float]
    multiple_of: int
    batch_size: int | None
    per_device_train_batch_size: int | None
    dataset_size: int | None
    effective_batch_size: int | None
    total_tokens: int | None
    learning_rate: float | None
    base_batch_size: int | None
    lr_scaling: LearningRateScaling
    evaluation: bool
    throughput: bool
    max_attempts: int
