"""The public ``find_batch_size``: a model by name, or any module with an example batch."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from inspect import signature
from typing import TYPE_CHECKING, Any, TypeGuard

from .errors import UsageError
from .probing.client import TIMEOUT_SECONDS
from .records import GpuSpec
from .report.report import Report
from .search.answer_cache import AnswerCache, default_folder
from .search.answering import Keeping, answered, check_precision, started
from .search.batch_plan import LearningRateScaling
from .search.choose import MULTIPLE_OF, TARGET
from .search.device_choice import choose_device
from .search.verify import MAX_ATTEMPTS
from .search.wishes import Wishes
from .workloads.module import module_workload
from .workloads.workload import Trainable, describe

if TYPE_CHECKING:
    from torch import nn
    from transformers import Trainer


def find_batch_size(
    model: str | nn.Module | Trainer,
    *,
    gpu: str | GpuSpec | None = None,
    device: str = "auto",
    memory: str | None = None,
    example_batch: Mapping[str, Any] | None = None,
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
    pretrained: bool = False,
    trust_remote_code: bool = False,
    target: tuple[float, float] = TARGET,
    multiple_of: int = MULTIPLE_OF,
    batch_size: int | None = None,
    dataset_size: int | None = None,
    check: int | None = None,
    effective_batch_size: int | None = None,
    fill: bool = False,
    total_tokens: int | None = None,
    gradient_accumulation_steps: int = 1,
    num_processes: int = 1,
    learning_rate: float | None = None,
    base_batch_size: int | None = None,
    lr_scaling: LearningRateScaling = "sqrt",
    evaluation: bool = True,
    prove_evaluation: bool = False,
    check_evaluation: int | None = None,
    generate: int = 0,
    throughput: bool = False,
    expandable_segments: bool = False,
    max_attempts: int = MAX_ATTEMPTS,
    probe_timeout: float = TIMEOUT_SECONDS,
    cache: bool = True,
    trust_cache: bool = False,
) -> Report:
    """The batch size to train ``model`` with: known without a GPU, proved on the device where there is one.

    ``model``: a Trainer, whose own arguments then decide, and which is set to what is found
    (:func:`hf_bsopt.integrations.trainer.find_batch_size`); or a hub id, a short name of the catalog, a folder with a
    config.json, or an ``nn.Module`` whose forward takes the tensors of ``example_batch`` (first dimension the batch)
    and returns a loss first or as ``"loss"``.
    ``gpu``: a card's name, a size such as "24GiB", or a GpuSpec; by default the CUDA device that is here, else a T4.
    ``device``: "predict", from the traced step alone; "rehearse", proved by real steps on a virtual card, which needs
    the CUDA build of torch and a C compiler; "cuda", "mps" or "cpu", proved by real steps there; "auto" measures on
    the GPU that is here if that is the one that is meant, else rehearses where it can. ``memory``: such as "15GiB",
    how much of the device there is, so that a large one stands in for a small one.
    ``max_attempts``: sizes that are run at most. ``probe_timeout``: seconds for one of them. ``throughput``: measured
    at up to five sizes, of which the smallest that trains about as fast as any is taken. ``prove_evaluation``: the
    evaluation batch is run too. ``generate``: tokens that a generation adds; its largest batch is found too.
    ``pretrained``: real steps load the checkpoint's weights, in place of random ones. ``cache``: measured answers are
    kept and confirmed by one step; ``trust_cache``: taken without it.
    ``target``: shares of the device's memory, the upper of which is not passed. ``batch_size``: an upper limit;
    ``dataset_size``: sequences that there are, another.
    ``effective_batch_size`` (sequences) or ``total_tokens``: kept exactly, by accumulation. ``fill``: of a Trainer, as
    large as the device takes.
    ``precision``: "fp16" and "bf16" are mixed precision; "fp32", "fp16-weights", "bf16-weights" hold everything so.

    Raises UsageError (a ValueError) for what can't be, NothingFitsError with the memory needed, TraceError where a
    module's step can't be followed, DeviceError or RehearsalError where the device that was asked for can't be had,
    ProbeError where a real step fails otherwise than by memory.
    """
    options = dict(locals())
    if _is_trainer(model):
        from .integrations.trainer.sizing import find_with

        return find_with(model, {name: options[name] for name, usual in _usual() if options[name] != usual})
    if fill:
        raise UsageError("fill goes with a Trainer; everything else fills the device unless a batch is asked for")
    _check_numbers(
        max_length=max_length,
        lora_r=lora_r,
        num_labels=num_labels,
        multiple_of=multiple_of,
        batch_size=batch_size,
        check=check,
        effective_batch_size=effective_batch_size,
        total_tokens=total_tokens,
        gradient_accumulation_steps=gradient_accumulation_steps,
        num_processes=num_processes,
        learning_rate=learning_rate,
        base_batch_size=base_batch_size,
        check_evaluation=check_evaluation,
        max_attempts=max_attempts,
        probe_timeout=probe_timeout,
        dataset_size=dataset_size,
        generate=generate,
    )
    if not isinstance(target, (tuple, list)) or len(target) != 2:
        raise UsageError(f"target is two shares of the memory, such as (0.8, 0.9), not {target!r}")
    if isinstance(model, str) and not model:
        raise UsageError("which model? For example dmis-lab/biobert-v1.1")
    if not 0 < probe_timeout < float("inf"):
        raise UsageError(f"probe_timeout is in seconds and above 0, not {probe_timeout}")
    choice = choose_device(device, gpu, memory)
    if precision is None and choice.spec.kind == "cpu":
        precision = "fp32"
    if throughput and choice.device is None:
        raise UsageError(f"throughput is measured on a device that computes: --device cuda or cpu; {choice.note}")
    by_name: dict[str, Any] = {
        "task": task,
        "max_length": max_length,
        "weights_dtype": weights_dtype,
        "attention": attention,
        "activation_checkpointing": activation_checkpointing,
        "lora_r": lora_r,
        "lora_targets": lora_targets,
        "load_in_4bit": load_in_4bit,
        "num_labels": num_labels,
        "pretrained": pretrained,
        "trust_remote_code": trust_remote_code,
    }
    with started(choice, probe_timeout, expandable_segments) as client:  # its imports take as long as the model's here
        workload: Trainable
        if isinstance(model, str):
            if example_batch is not None:
                raise UsageError("example_batch goes with a module; a model by name makes its own batch")
            workload = describe(model, precision=precision, optimizer=optimizer, new_tokens=generate, **by_name)
        else:
            workload = module_workload(model, example_batch, precision, optimizer)
            usual = dict(_usual())
            for name, value in {**by_name, "generate": generate}.items():
                if value != usual[name]:
                    raise UsageError(f"{name} goes with a model by name; a module is taken as it is")
        check_precision(workload, choice.spec)
        wishes = Wishes(
            target=tuple(target),  # type: ignore[arg-type]
            multiple_of=multiple_of,
            batch_size=batch_size,
            dataset_size=dataset_size,
            check=check,
            effective_batch=effective_batch_size,
            total_tokens=total_tokens,
            accumulation=gradient_accumulation_steps,
            processes=num_processes,
            learning_rate=learning_rate,
            base_batch_size=base_batch_size,
            lr_scaling=lr_scaling,
            evaluation=evaluation or prove_evaluation,
            prove_evaluation=prove_evaluation,
            check_evaluation=check_evaluation,
            expandable_segments=expandable_segments,
            max_attempts=max_attempts,
            throughput=throughput,
            notes=(*choice.notes, choice.note),
        )
        keeping = Keeping(AnswerCache(default_folder()), trust_cache) if cache else None
        return answered(workload, choice, wishes, client, keeping)


def _is_trainer(model: object) -> TypeGuard[Trainer]:
    """Without importing Trainer where nobody has."""
    room = sys.modules.get("transformers.trainer")
    return room is not None and isinstance(model, room.Trainer)


def _usual() -> list[tuple[str, Any]]:
    """Every option with its default."""
    return [(name, p.default) for name, p in signature(find_batch_size).parameters.items() if name != "model"]


def _check_numbers(**values: Any) -> None:
    """Raises UsageError for what is no number: Python's own errors would come from deep inside."""
    for name, value in values.items():
        whole = name not in ("learning_rate", "probe_timeout")
        wanted = (int,) if whole else (int, float)
        if value is not None and (isinstance(value, bool) or not isinstance(value, wanted)):
            raise UsageError(f"{name} is a {'whole ' if whole else ''}number, not {value!r}")
