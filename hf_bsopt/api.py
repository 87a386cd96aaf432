"""The public ``find_batch_size``: a model by name, or any module with an example batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from . import catalog, rehearsal
from .batch_plan import LearningRateScaling
from .errors import RehearsalError, UsageError
from .finder import Wishes, find
from .probing import Prober, VirtualCudaDevice
from .probing.prober import TIMEOUT_SECONDS
from .records import GpuSpec
from .report import Report
from .search import MAX_ATTEMPTS, MULTIPLE_OF, TARGET
from .step_settings import StepSettings
from .workload import ModuleWorkload, Workload, describe

if TYPE_CHECKING:
    from torch import nn

DEFAULT_GPU = "T4"
CUDNN_ATTENTION = (90, 100, 103)
"""Compute capabilities on which SDPA prefers cuDNN. Source: check_prefer_cudnn_attention in PyTorch's sdp_utils.cpp."""


def find_batch_size(
    model: str | nn.Module,
    *,
    gpu: str | GpuSpec | None = None,
    device: str = "auto",
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
    trust_remote_code: bool = False,
    target: tuple[float, float] = TARGET,
    multiple_of: int = MULTIPLE_OF,
    batch_size: int | None = None,
    check: int | None = None,
    effective_batch_size: int | None = None,
    total_tokens: int | None = None,
    gradient_accumulation_steps: int = 1,
    num_processes: int = 1,
    learning_rate: float | None = None,
    base_batch_size: int | None = None,
    lr_scaling: LearningRateScaling = "sqrt",
    evaluation: bool = True,
    check_evaluation: int | None = None,
    expandable_segments: bool = False,
    max_attempts: int = MAX_ATTEMPTS,
    probe_timeout: float = TIMEOUT_SECONDS,
) -> Report:
    """The batch size to train ``model`` with on ``gpu``, known without a GPU.

    ``model``: a hub id, a short name of the catalog, a folder with a config.json, or an ``nn.Module`` whose forward
    takes the tensors of ``example_batch`` (first dimension the batch) and returns a loss first or as ``"loss"``.
    ``gpu``: a card's name, a size such as "24GiB", or a GpuSpec; by default the CUDA device that is here, else a T4.
    ``device``: "predict", from the traced step alone; "rehearse", proved by real steps on a virtual card, which needs
    the CUDA build of torch and a C compiler; "auto" rehearses where it can. ``max_attempts``: sizes that are run at
    most. ``probe_timeout``: seconds for one of them.
    ``target``: shares of the device's memory, the upper of which is not passed. ``batch_size``: an upper limit.
    ``effective_batch_size`` (sequences) or ``total_tokens``: kept exactly, by accumulation.
    ``precision``: "fp16" and "bf16" are mixed precision; "fp32", "fp16-weights", "bf16-weights" hold everything so.

    Raises UsageError (a ValueError) for what can't be, NothingFitsError with the memory needed, TraceError where a
    module's step can't be followed, RehearsalError where a rehearsal was asked for and can't be had.
    """
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
    )
    if not isinstance(target, (tuple, list)) or len(target) != 2:
        raise UsageError(f"target is two shares of the memory, such as (0.8, 0.9), not {target!r}")
    if isinstance(model, str) and not model:
        raise UsageError("which model? For example dmis-lab/biobert-v1.1")
    if not 0 < probe_timeout < float("inf"):
        raise UsageError(f"probe_timeout is in seconds and above 0, not {probe_timeout}")
    spec, notes = resolve_gpu(gpu)
    can_rehearse, how = resolve_device(device)
    workload: Workload | ModuleWorkload
    if isinstance(model, str):
        if example_batch is not None:
            raise UsageError("example_batch goes with a module; a model by name makes its own batch")
        workload = describe(
            model,
            task=task,
            max_length=max_length,
            precision=precision,
            weights_dtype=weights_dtype,
            optimizer=optimizer,
            attention=attention,
            activation_checkpointing=activation_checkpointing,
            lora_r=lora_r,
            lora_targets=lora_targets,
            load_in_4bit=load_in_4bit,
            num_labels=num_labels,
            trust_remote_code=trust_remote_code,
        )
    else:
        workload = _module_workload(model, example_batch, precision, optimizer)
        asked = {"task": task, "max_length": max_length, "attention": attention, "lora_r": lora_r or None}
        for name, value in asked.items():
            if value is not None:
                raise UsageError(f"{name} goes with a model by name; a module is taken as it is")
    if isinstance(workload, Workload) and workload.attention == "flash_attention_2":
        _check_flash(workload, spec)
    wishes = Wishes(
        target=tuple(target),  # type: ignore[arg-type]
        multiple_of=multiple_of,
        batch_size=batch_size,
        check=check,
        effective_batch=effective_batch_size,
        total_tokens=total_tokens,
        accumulation=gradient_accumulation_steps,
        processes=num_processes,
        learning_rate=learning_rate,
        base_batch_size=base_batch_size,
        lr_scaling=lr_scaling,
        evaluation=evaluation,
        check_evaluation=check_evaluation,
        expandable_segments=expandable_segments,
        max_attempts=max_attempts,
        notes=(*notes, how),
    )
    if not can_rehearse:
        return find(workload, spec, wishes)
    card = VirtualCudaDevice(spec)
    with Prober(card, timeout_seconds=probe_timeout, expandable_segments=expandable_segments) as prober:
        try:
            return find(
                workload,
                spec,
                dataclasses.replace(wishes, notes=(*wishes.notes, *_differences(workload, spec))),
                prober,
            )
        except RehearsalError as error:
            if device == "rehearse":
                raise
            note = f"predicted only, the rehearsal failed: {error}"
    return find(workload, spec, dataclasses.replace(wishes, notes=(*notes, note)))


DEVICES = ("auto", "predict", "rehearse")
DEVICES_TO_COME = ("cuda", "mps", "cpu")


def resolve_device(device: str) -> tuple[bool, str]:
    """(whether to rehearse, which and why). Raises UsageError for a mode that is not known, RehearsalError for a
    rehearsal that was asked for by name and can't be.
    """
    if device in DEVICES_TO_COME:
        raise UsageError(
            f"--device {device} would measure on the device itself, which is not built yet; there are "
            f"{', '.join(DEVICES)}"
        )
    if device not in DEVICES:
        raise UsageError(f"device {device!r} is not one of {', '.join(DEVICES)}")
    if device == "predict":
        return False, "predicted: from one traced training step, as asked"
    reason = rehearsal.why_not()
    if reason is None:
        return True, "rehearsed: real training steps on a virtual card, with the CUDA build of torch that is here"
    if device == "rehearse":
        raise RehearsalError(f"can't rehearse here: {reason}; --device predict needs none of it")
    return False, f"predicted, not rehearsed: {reason}"


def _differences(workload: Workload | ModuleWorkload, spec: GpuSpec) -> tuple[str, ...]:
    """What runs otherwise on the virtual card than on the real one."""
    attention = workload.attention if isinstance(workload, Workload) else "sdpa"
    if attention == "sdpa" and spec.compute_capability in CUDNN_ATTENTION:
        return ("the virtual card has no cuDNN: its attention is replaced by the flash kernel, which keeps as much",)
    if attention == "flash_attention_2":
        return ("flash_attention_2 is rehearsed as the flash kernel of PyTorch's own SDPA",)
    return ()


def _check_example(example: Mapping[str, Any]) -> None:
    import torch

    sizes: dict[str, int] = {}
    for name, value in example.items():
        if isinstance(value, torch.Tensor):
            if value.dim():
                sizes[name] = value.size(0)
        elif value is not None and not isinstance(value, (bool, int, float)):
            raise UsageError(
                f"example_batch[{name!r}] is a {type(value).__name__}: give tensors whose first dimension is the "
                f"batch, and leave out what forward does not take"
            )
    if len(set(sizes.values())) > 1:
        raise UsageError(f"the tensors of example_batch have batches of different sizes: {sizes}")


def _check_numbers(**values: Any) -> None:
    """Raises UsageError for what is no number: Python's own errors would come from deep inside."""
    for name, value in values.items():
        whole = name not in ("learning_rate", "probe_timeout")
        wanted = (int,) if whole else (int, float)
        if value is not None and (isinstance(value, bool) or not isinstance(value, wanted)):
            raise UsageError(f"{name} is a {'whole ' if whole else ''}number, not {value!r}")


def _check_flash(workload: Workload, device: GpuSpec) -> None:
    if device.compute_capability < 80:
        raise UsageError(f"flash_attention_2 runs from compute capability 8.0 on; {device.name} has sdpa and eager")
    if workload.precision == "fp32":
        raise UsageError("flash_attention_2 computes in half precision only: add --fp16 or --bf16, or take sdpa")


def _module_workload(
    module: nn.Module, example: Mapping[str, Any] | None, precision: str | None, optimizer: str | None
) -> ModuleWorkload:
    from torch import nn

    if not isinstance(module, nn.Module):
        raise UsageError(f"model is a name or an nn.Module, not {type(module).__name__}")
    if not isinstance(example, Mapping) or not example:
        given = "" if example is None else f", not a {type(example).__name__}"
        raise UsageError(
            "a module needs an example_batch: a dict of the keyword arguments of its forward, such as "
            f"next(iter(dataloader)){given}"
        )
    _check_example(example)
    precision = precision or "fp16"
    settings = StepSettings(precision, optimizer or "adamw_torch_fused")  # type: ignore[arg-type]
    return ModuleWorkload(module, example, settings)


def resolve_gpu(gpu: str | GpuSpec | None) -> tuple[GpuSpec, tuple[str, ...]]:
    """The device meant, and what was assumed on the way."""
    if isinstance(gpu, GpuSpec):
        return gpu, ()
    if gpu is not None and not isinstance(gpu, str):
        raise UsageError(f'gpu is a name or a size, such as "T4" or "24GiB", not {gpu!r}')
    if gpu is not None:
        spec = catalog.gpu(gpu)
        return spec, (spec.assumed,) if spec.assumed else ()
    here = local_gpu()
    if here is not None:
        return here, (f"{here.name}: the CUDA device of this machine",)
    return catalog.gpu(DEFAULT_GPU), (f"{DEFAULT_GPU}: there is no CUDA device here; --gpu names another",)


def local_gpu() -> GpuSpec | None:
    """The first CUDA device, as torch sees it without making a context on it."""
    import torch

    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    known = catalog.gpu(DEFAULT_GPU)
    return dataclasses.replace(
        known,
        name=properties.name,
        total_bytes=properties.total_memory,
        compute_capability=properties.major * 10 + properties.minor,
        multiprocessors=properties.multi_processor_count,
        assumed="",
    )
