"""Inspect a device before anything runs on it and describe it in one line; called in a separate process."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..errors import DeviceError
from ..records import GpuSpec
from . import nvml
from .host_memory import ProcessStatus, available_bytes, why_no_limit

GIB = 2**30
FIRST_STEP_BYTES = 35 * 2**20
"""Library pages that become resident in the first training step, not at import: 34 to 36 MiB with bert-mini,
distilbert and smollm2-135m at any size (python benchmarks/host_peaks.py, torch 2.13.0+cpu on 2 cores, 2026-11-25).
"""


@dataclass(frozen=True)
class Preflight:
    """line: the finding, for the report. spec: the device as found; memory of other processes counts as context.
    driver: the version of the device's driver, if it has one. problem: why nothing can run here; empty if it can.
    """

    line: str
    spec: GpuSpec
    driver: str = ""
    problem: str = ""


def cuda_preflight(spec: GpuSpec, memory_limit: int | None) -> Preflight:
    """Inspect the first CUDA device. Raise DeviceError if there is none or torch has no kernels for it."""
    import torch

    if not torch.cuda.is_available():
        raise DeviceError("there is no CUDA device here that torch can use")
    properties = torch.cuda.get_device_properties(0)
    capability = properties.major * 10 + properties.minor
    compiled_for = torch.cuda.get_arch_list()
    if not has_kernels(compiled_for, capability):
        raise DeviceError(
            f"torch {torch.__version__} has no kernels for {properties.name} (sm_{capability}), only for "
            f"{', '.join(compiled_for)}; install another build of torch or use --device predict, which needs no GPU"
        )
    device = nvml.NvmlDevice.from_uuid(str(properties.uuid))
    before = device.used_bytes() if device else None
    free, total = torch.cuda.mem_get_info()  # creates the context
    in_use = total - free
    context = device.used_bytes() - before if device and before is not None else min(in_use, spec.context_bytes)
    others = max(0, in_use - context)
    found = replace(
        spec,
        name=properties.name,
        total_bytes=min(total, memory_limit or total),
        compute_capability=capability,
        multiprocessors=properties.multi_processor_count,
        context_bytes=max(in_use, others + spec.context_bytes),
        assumed="",
    )
    if memory_limit is not None and memory_limit > total:
        raise DeviceError(
            f"--memory {memory_limit / GIB:.1f} GiB is more than the {total / GIB:.1f} GiB of {properties.name}"
        )
    users = device.processes() if device else []
    line = (
        f"{properties.name} (sm_{capability}): torch {torch.__version__} has kernels for it; "
        f"{(total - others) / GIB:.1f} of {total / GIB:.1f} GiB are free; "
        f"{_format_other_processes(users, others, is_known=device is not None)}"
    )
    if memory_limit is not None:
        line += f"; {memory_limit / GIB:.1f} GiB of it are used (--memory)"
    return Preflight(line, found, driver=nvml.driver_version())


def _format_other_processes(users: Sequence[nvml.GpuProcess], others: int, *, is_known: bool) -> str:
    users = [user for user in users if user.pid != os.getpid()]
    if users:
        names = ", ".join(f"{user.pid}: {user.used_bytes / GIB:.1f} GiB" for user in users if user.used_bytes)
        listed = f" (process {names})" if names else ""
        return f"{len(users)} other process{'es' if len(users) > 1 else ''} on it{listed}"
    if others > GIB // 4:
        return f"{others / GIB:.1f} GiB are used by other processes"
    return "no other process uses it" if is_known else "other processes are not known (pip install nvidia-ml-py)"


def has_kernels(compiled_for: Sequence[str], capability: int) -> bool:
    """Return True if a build compiled for these architectures runs on this compute capability (times 10).

    Machine code (sm_75) runs on the same major version with at least its minor version; PTX (compute_75) runs on all
    later ones. Source: CUDA C++ Programming Guide, binary and PTX compatibility.
    """
    for architecture in compiled_for:
        match = re.fullmatch(r"(sm|compute)_(\d+)([a-z]?)", architecture)
        if match is None:
            continue
        kind, number, is_specific = match[1], int(match[2]), bool(match[3])
        if number == capability:
            return True
        if is_specific or number > capability:
            continue
        if kind == "compute" or number // 10 == capability // 10:
            return True
    return False


def mps_preflight(spec: GpuSpec) -> Preflight:
    """Inspect a Mac's GPU. Raise DeviceError if there is none."""
    import torch

    if not torch.backends.mps.is_available():
        raise DeviceError("there is no MPS device here: it needs a Mac with Apple silicon")
    recommended = torch.mps.recommended_max_memory()
    in_use = torch.mps.driver_allocated_memory()
    total = min(recommended, spec.total_bytes or recommended)
    line = f"{spec.name}: Metal recommends using at most {recommended / GIB:.1f} GiB"
    return Preflight(line, replace(spec, total_bytes=total, context_bytes=max(in_use, spec.context_bytes)))


def cpu_preflight(spec: GpuSpec) -> Preflight:
    """Inspect this machine. Raise DeviceError if memory cannot be limited, or less is free than asked for."""
    reason = why_no_limit()
    if reason is not None:
        raise DeviceError(f"cannot measure on this CPU: {reason}; --device predict works without")
    available, origin = available_bytes()
    libraries = ProcessStatus.read().resident_bytes + FIRST_STEP_BYTES
    total = available if spec.total_bytes is None else spec.total_bytes
    if total > available:
        raise DeviceError(
            f"{total / GIB:.1f} GiB were requested but {available / GIB:.1f} GiB are available ({origin}): training "
            f"would be swapped or killed; use --memory {int(available / GIB)}GiB or less"
        )
    source = "set by --memory" if spec.total_bytes is not None else origin
    line = f"CPU: {total / GIB:.1f} GiB for the training process, {source}; beyond it allocation fails"
    return Preflight(line, replace(spec, total_bytes=total, context_bytes=max(libraries, spec.context_bytes)))
