"""Which device is meant, and whether steps are run on it: a GPU by name, the local one, a virtual one, or none."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING
from unittest import mock

from .. import virtual_gpu
from ..data import catalog
from ..errors import DeviceError, RehearsalError, UnknownGpuError, UsageError
from ..options import DeviceOptions
from ..probing import CpuDevice, CudaDevice, Device, MpsDevice, VirtualCudaDevice, nvml
from ..records import GpuSpec
from ..workloads.trainable import Trainable
from ..workloads.workload import Workload

if TYPE_CHECKING:
    import torch

DEFAULT_GPU = "T4"
DEVICES = ("auto", "predict", "rehearse", "cuda", "mps", "cpu")
METAL_BYTES = 64 * 2**20
"""Memory that Metal takes for itself, assumed until it is asked."""


@dataclass(frozen=True)
class DeviceChoice:
    """The device, and whether steps are run on it.

    spec: the device, as far as it is known before it is asked. device: where to run; None predicts only. note: which
    device, and why. notes: what was assumed of it. is_demanded: the user named it, so nothing else will do.
    """

    spec: GpuSpec
    device: Device | None
    note: str
    notes: tuple[str, ...] = ()
    is_demanded: bool = False

    @property
    def all_notes(self) -> tuple[str, ...]:
        """Assumptions about the device, and how it was chosen."""
        return (*self.notes, self.note)


def choose_device(options: DeviceOptions) -> DeviceChoice:
    """Choose the device, and whether steps are run on it.

    Raises UsageError for an unknown device or a contradiction, RehearsalError or DeviceError for a device that was
    asked for by name and cannot be used.
    """
    device, gpu = options.device, options.gpu
    if device not in DEVICES:
        raise UsageError(f"device {device!r} is not one of {', '.join(DEVICES)}")
    limit = None if options.memory is None else memory_bytes(options.memory)
    if device in ("cuda", "mps", "cpu"):
        return _demanded(device, gpu, limit)
    if device == "auto" and _is_here(gpu):
        kind = "cuda" if has_cuda() else "mps"
        return replace(_local(kind, limit), note="measured: the GPU of this machine", is_demanded=False)
    spec, notes = named_gpu(gpu, limit)
    if device == "predict":
        return DeviceChoice(spec, None, "predicted: from one traced training step, as asked", notes)
    reason = virtual_gpu.why_not()
    if reason is None:
        note = "rehearsed: real training steps on a virtual GPU, with the installed CUDA build of torch"
        return DeviceChoice(spec, VirtualCudaDevice(spec), note, notes, is_demanded=device == "rehearse")
    if device == "rehearse":
        raise RehearsalError(f"cannot rehearse here: {reason}; --device predict needs none of it")
    return DeviceChoice(spec, None, f"predicted, not rehearsed: {reason}", notes)


def _demanded(device: str, gpu: str | GpuSpec | None, limit: int | None) -> DeviceChoice:
    if gpu is not None and not (device == "cuda" and _is_here(gpu)):
        raise UsageError(
            f"--device {device} measures on the device of this machine: leave out --gpu, or let --memory make it as "
            f"small as another; --device rehearse runs on a virtual one"
        )
    if device == "cuda" and not has_cuda():
        raise DeviceError("there is no CUDA device here; --device predict or rehearse needs none")
    choice = _local(device, limit)
    return replace(choice, note=f"measured: real training steps on this {device.upper()} device, as asked")


def _local(kind: str, limit: int | None) -> DeviceChoice:
    if kind == "cpu":
        spec = GpuSpec("CPU", limit, 0, 0, 0, kind="cpu")
        return DeviceChoice(spec, CpuDevice(spec), "", is_demanded=True)
    if kind == "mps":
        spec = GpuSpec("MPS", limit, 0, 0, METAL_BYTES, kind="mps")
        return DeviceChoice(spec, MpsDevice(spec), "", is_demanded=True)
    spec = replace(catalog.gpu(DEFAULT_GPU), name="CUDA device")  # the preflight will know
    return DeviceChoice(spec, CudaDevice(spec, limit), "", is_demanded=True)


def named_gpu(gpu: str | GpuSpec | None, limit: int | None = None) -> tuple[GpuSpec, tuple[str, ...]]:
    """Return the GPU that is meant, and what was assumed. ``limit``: bytes of its memory that may be used."""
    notes: tuple[str, ...] = ()
    if isinstance(gpu, GpuSpec):
        spec = gpu
    elif gpu is not None and not isinstance(gpu, str):
        raise UsageError(f'gpu is a name or a size, such as "T4" or "24GiB", not {gpu!r}')
    elif gpu is not None:
        spec = catalog.gpu(gpu)
        notes = (spec.assumed,) if spec.assumed else ()
    else:
        spec, notes = _local_gpu()
    if limit is None:
        return spec, notes
    if spec.total_bytes is not None and limit > spec.total_bytes:
        raise UsageError(f"{spec.name} has {spec.total_bytes / 2**30:.1f} GiB, not the {limit / 2**30:.1f} of --memory")
    return replace(spec, total_bytes=limit), (*notes, f"{limit / 2**30:.1f} GiB of {spec.name}, as --memory says")


def _local_gpu() -> tuple[GpuSpec, tuple[str, ...]]:
    """Return the GPU of this machine by its name, which is read without touching it; else the default."""
    name = nvml.first_gpu_name()
    if name is not None:
        try:
            return catalog.gpu(name), (f"{name}: the CUDA device of this machine",)
        except UnknownGpuError:
            return catalog.gpu(DEFAULT_GPU), (f"{DEFAULT_GPU}: {name} is not in the catalog; --gpu names another",)
    return catalog.gpu(DEFAULT_GPU), (f"{DEFAULT_GPU}: there is no CUDA device here; --gpu names another",)


def _is_here(gpu: str | GpuSpec | None) -> bool:
    """Return whether the GPU that is meant is the local one, so that it can be measured."""
    if gpu is None:
        return has_cuda() or _has_mps()
    if isinstance(gpu, GpuSpec) or not has_cuda():
        return False
    name = nvml.first_gpu_name()
    try:
        return name is not None and catalog.gpu(name).name == catalog.gpu(gpu).name
    except UnknownGpuError:
        return False


def has_cuda() -> bool:
    """Return whether there is a CUDA device. Asks NVML if it answers, so that the driver is not started here."""
    import torch

    with mock.patch.dict(os.environ, {"PYTORCH_NVML_BASED_CUDA_CHECK": "1"}):
        return bool(torch.cuda.is_available())


def _has_mps() -> bool:
    import torch

    return bool(torch.backends.mps.is_available())


def memory_bytes(memory: str) -> int:
    """Return a memory size such as "15GiB" in bytes. Raises UsageError for anything else."""
    size = catalog.memory_size(memory) if isinstance(memory, str) else None
    if size is None or size <= 0:
        raise UsageError(f"memory is a size such as 15GiB, not {memory!r}")
    return size


def check_precision(workload: Trainable, device: GpuSpec) -> None:
    """Raise UsageError if the device does not compute in the workload's precision or with its attention."""
    if device.kind == "cpu" and workload.settings.precision.startswith("fp16"):
        raise UsageError("a CPU does not train in fp16, and Trainer refuses it there: take --precision fp32 or bf16")
    if not isinstance(workload, Workload) or workload.attention != "flash_attention_2":
        return
    if device.compute_capability < 80:
        raise UsageError(f"flash_attention_2 runs from compute capability 8.0 on; {device.name} has sdpa and eager")
    if workload.precision == "fp32":
        raise UsageError("flash_attention_2 computes in half precision only: add --fp16 or --bf16, or take sdpa")


def differences(workload: Trainable, spec: GpuSpec) -> tuple[str, ...]:
    """Return what runs differently on the virtual GPU than on the real one, in sentences."""
    attention = workload.attention if isinstance(workload, Workload) else "sdpa"
    if attention == "sdpa" and spec.prefers_cudnn_attention:
        return ("the virtual GPU has no cuDNN: its attention is replaced by the flash kernel, which keeps as much",)
    if attention == "flash_attention_2":
        return ("flash_attention_2 is rehearsed as the flash kernel of PyTorch's own SDPA",)
    return ()


def device_name(device: torch.device) -> str:
    """Return name and memory of a device, to tell two of them apart."""
    import torch

    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return f"{properties.name}, {properties.total_memory / 2**30:.1f} GiB"
    return device.type.upper()
