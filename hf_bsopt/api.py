"""The public ``find_batch_size``: a model by name, or any module with an example batch."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from .batch_plan import LearningRateScaling
from .cache import AnswerCache, band, default_folder
from .device_choice import Choice, choose_device, differences
from .errors import DeviceError, ProbeError, RehearsalError, UsageError
from .finder import Wishes, find
from .probing import Preflight, Prober
from .probing.prober import TIMEOUT_SECONDS
from .proof import MAX_ATTEMPTS
from .proving import Remembering
from .records import GpuSpec
from .report import Report, versions
from .search import MULTIPLE_OF, TARGET
from .step_settings import StepSettings
from .workload import ModuleWorkload, Workload, describe

if TYPE_CHECKING:
    from torch import nn


def find_batch_size(
    model: str | nn.Module,
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

    ``model``: a hub id, a short name of the catalog, a folder with a config.json, or an ``nn.Module`` whose forward
    takes the tensors of ``example_batch`` (first dimension the batch) and returns a loss first or as ``"loss"``.
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
    ``effective_batch_size`` (sequences) or ``total_tokens``: kept exactly, by accumulation.
    ``precision``: "fp16" and "bf16" are mixed precision; "fp32", "fp16-weights", "bf16-weights" hold everything so.

    Raises UsageError (a ValueError) for what can't be, NothingFitsError with the memory needed, TraceError where a
    module's step can't be followed, DeviceError or RehearsalError where the device that was asked for can't be had,
    ProbeError where a real step fails otherwise than by memory.
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
    with _started(choice, probe_timeout, expandable_segments) as prober:  # its imports take as long as the model's here
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
                new_tokens=generate,
                pretrained=pretrained,
                trust_remote_code=trust_remote_code,
            )
        else:
            workload = _module_workload(model, example_batch, precision, optimizer)
            asked = {"task": task, "max_length": max_length, "attention": attention, "lora_r": lora_r or None}
            asked |= {"generate": generate or None, "pretrained": pretrained or None}
            for name, value in asked.items():
                if value is not None:
                    raise UsageError(f"{name} goes with a model by name; a module is taken as it is")
        _check_precision(workload, choice.spec)
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
        return _answered(workload, choice, wishes, prober, keeping)


@dataclasses.dataclass(frozen=True)
class Keeping:
    """Where measured answers are kept, and whether they are taken without running them once more."""

    cache: AnswerCache
    is_trusted: bool


@contextlib.contextmanager
def _started(choice: Choice, probe_timeout: float, expandable_segments: bool) -> Iterator[Prober | None]:
    """None where nothing is run."""
    if choice.device is None:
        yield None
        return
    with Prober(choice.device, timeout_seconds=probe_timeout, expandable_segments=expandable_segments) as prober:
        with contextlib.suppress(RehearsalError):  # said where it is asked something
            prober.start()
        yield prober


def _answered(
    workload: Workload | ModuleWorkload,
    choice: Choice,
    wishes: Wishes,
    prober: Prober | None,
    keeping: Keeping | None,
) -> Report:
    if prober is None:
        return find(workload, choice.spec, wishes)
    try:
        if prober.device.source == "rehearsed":
            notes = (*wishes.notes, *differences(workload, choice.spec))
            return find(workload, choice.spec, dataclasses.replace(wishes, notes=notes), prober)
        found = prober.preflight()
        remembering = None if keeping is None else _remembering(keeping, workload, found, wishes)
        wishes = dataclasses.replace(wishes, notes=(*wishes.notes, found.line))
        return find(workload, found.spec, wishes, prober, remembering)
    except (ProbeError, DeviceError) as error:
        failed_for_real = isinstance(error, ProbeError) and prober.device.source == "measured"
        if choice.is_demanded or failed_for_real:
            raise
        note = f"predicted only, nothing could be run: {error}"
    return find(workload, choice.spec, dataclasses.replace(wishes, notes=(*choice.notes, note)))


def _remembering(
    keeping: Keeping, workload: Workload | ModuleWorkload, found: Preflight, wishes: Wishes
) -> Remembering | None:
    """All that decides a measured answer. A module is known by nothing that could be compared with another day's."""
    if not isinstance(workload, Workload):
        return None
    spec = found.spec
    total = spec.total_bytes or 1
    asked = {k: v for k, v in dataclasses.asdict(wishes).items() if k not in ("notes", "max_attempts")}
    key = {
        "workload": workload.values(),
        "config": workload.config.to_dict(),
        "wishes": asked,
        "device": {**dataclasses.asdict(spec), "context_bytes": None},
        "driver": found.driver,
        "free_band": band(total - spec.context_bytes, total),
        "versions": versions(),
    }
    plain = json.loads(json.dumps(key, default=str))
    return Remembering(keeping.cache, plain, keeping.is_trusted)


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


def _check_precision(workload: Workload | ModuleWorkload, device: GpuSpec) -> None:
    """Raises UsageError where the device does not compute so."""
    if device.kind == "cpu" and workload.settings.precision.startswith("fp16"):
        raise UsageError("a CPU does not train in fp16, and Trainer refuses it there: take --precision fp32 or bf16")
    if not isinstance(workload, Workload) or workload.attention != "flash_attention_2":
        return
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
