"""From the command's flags to find_batch_size."""

from __future__ import annotations

from ..api import find_batch_size
from ..report.report import Report
from .arguments import Arguments


def found(arguments: Arguments, length: int | None, processes: int, limit: int | None) -> Report:
    """The search that the flags ask for. ``limit``: on the micro-batch, theirs or that of another process."""
    return find_batch_size(
        arguments.model or "",
        gpu=arguments.gpu,
        device=arguments.device,
        memory=arguments.memory,
        task=arguments.task,
        max_length=length,
        precision=arguments.precision,
        weights_dtype=arguments.weights_dtype,
        optimizer=arguments.optimizer,
        attention=arguments.attention,
        activation_checkpointing=arguments.activation_checkpointing,
        lora_r=arguments.lora_r,
        lora_targets=tuple(arguments.lora_targets) or None,
        load_in_4bit=arguments.load_in_4bit,
        num_labels=arguments.num_labels,
        pretrained=arguments.pretrained,
        trust_remote_code=arguments.trust_remote_code,
        target=(arguments.target[0], arguments.target[1]),
        multiple_of=arguments.multiple_of,
        batch_size=limit,
        dataset_size=arguments.dataset_size,
        check=arguments.check,
        effective_batch_size=arguments.effective_batch_size,
        total_tokens=arguments.total_tokens,
        gradient_accumulation_steps=arguments.gradient_accumulation_steps,
        num_processes=processes,
        learning_rate=arguments.learning_rate,
        base_batch_size=arguments.base_batch_size,
        lr_scaling=arguments.lr_scaling,  # type: ignore[arg-type]
        evaluation=arguments.evaluation,
        prove_evaluation=arguments.eval,
        check_evaluation=arguments.per_device_eval_batch_size,
        generate=arguments.generate,
        throughput=arguments.throughput,
        expandable_segments=arguments.expandable_segments,
        max_attempts=arguments.max_attempts,
        probe_timeout=arguments.probe_timeout,
        cache=arguments.cache,
        trust_cache=arguments.trust_cache,
    )
