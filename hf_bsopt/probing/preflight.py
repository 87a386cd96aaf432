"""What a device is like before anything runs on it, in one line; asked in a process of its own."""

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
"""What training makes resident of the files of libraries that are only imported before: 34 to 36 MiB with bert-mini,
distilbert and smollm2-135m at any size (python benchmarks/host_peaks.py, torch 2.13.0+cpu on 2 cores, 2026-11-25).
"""


@dataclass(frozen=True)
class Preflight:
    """line: what was found, for the report. spec: the device as it is, what else is on it counted as context.
    driver: the version of the device's driver, where it has one. problem: why nothing can run here; empty if it can.
    """

    line: str
    spec: GpuSpec
    driver: str = ""
    problem: str = ""


def cuda_preflight(spec: GpuSpec, memory_limit: int | None) -> Preflight:
    """Of the first CUDA card. Raises DeviceError where there is none, or where torch has no kernels for it."""
    import torch

    if not torch.cuda.is_available():
        raise DeviceError("there is no CUDA device here that torch can use")
    properties = torch.cuda.get_device_properties(0)
    capability = properties.major * 10 + properties.minor
    compiled_for = torch.cuda.get_arch_list()
    if not has_kernels(compiled_for, capability):
        raise DeviceError(
            f"torch {torch.__version__} has no kernels for {properties.name} (sm_{capability}), only for "
            f"{', '.join(compiled_for)}; another build of torch may, or --device predict needs no card"
        )
    card = nvml.Card.of(str(properties.uuid))
    before = card.used_bytes() if card else None
    free, total = torch.cuda.mem_get_info()  # makes the context
    gone = total - free
    context = card.used_bytes() - before if card and before is not None else min(gone, spec.context_bytes)
    others = max(0, gone - context)
    found = replace(
        spec,
        name=properties.name,
        total_bytes=min(total, memory_limit or total),
        compute_capability=capability,
        multiprocessors=properties.multi_processor_count,
        context_bytes=max(gone, others + spec.context_bytes),
        assumed="",
    )
    if memory_limit is not None and memory_limit > total:
        raise DeviceError(f"{properties.name} has {total / GIB:.1f} GiB, not the {memory_limit / GIB:.1f} of --memory")
    users = card.processes() if card else []
    line = (
        f"{properties.name} (sm_{capability}): torch {torch.__version__} has kernels for it; "
        f"{(total - others) / GIB:.1f} of {total / GIB:.1f} GiB are free; "
        f"{_told(users, others, is_known=card is not None)}"
    )
    if memory_limit is not None:
        line += f"; {memory_limit / GIB:.1f} GiB of it are used, as --memory says"
    return Preflight(line, found, driver=nvml.driver_version())


def _told(users: Sequence[nvml.GpuProcess], others: int, *, is_known: bool) -> str:
    users = [user for user in users if user.pid != os.getpid()]
    if users:
        names = ", ".join(f"{user.pid}: {user.used_bytes / GIB:.1f} GiB" for user in users if user.used_bytes)
        listed = f" (process {names})" if names else ""
        return f"{len(users)} other process{'es' if len(users) > 1 else ''} on it{listed}"
    if others > GIB // 4:
        return f"{others / GIB:.1f} GiB are taken by other processes"
    return "nobody else uses it" if is_known else "who else uses it is not known (pip install nvidia-ml-py)"


def has_kernels(compiled_for: Sequence[str], capability: int) -> bool:
    """Machine code (sm_75) runs on the same major version from its minor version on; what is compiled to PTX
    (compute_75) runs on everything later. Source: CUDA C++ Programming Guide, binary and PTX compatibility.
    """
    for architecture in compiled_for:
        match = re.fullmatch(r"(sm|compute)_(\d+)([a-z]?)", architecture)
        if match is None:
            continue
        kind, number, only_there = match[1], int(match[2]), bool(match[3])
        if number == capability:
            return True
        if only_there or number > capability:
            continue
        if kind == "compute" or number // 10 == capability // 10:
            return True
    return False


def mps_preflight(spec: GpuSpec) -> Preflight:
    """Of a Mac's GPU. Raises DeviceError where there is none."""
    import torch

    if not torch.backends.mps.is_available():
        raise DeviceError("there is no MPS device here: it needs a Mac with Apple's own processor")
    recommended = torch.mps.recommended_max_memory()
    gone = torch.mps.driver_allocated_memory()
    total = min(recommended, spec.total_bytes or recommended)
    line = f"{spec.name}: Metal recommends to use {recommended / GIB:.1f} GiB at most"
    return Preflight(line, replace(spec, total_bytes=total, context_bytes=max(gone, spec.context_bytes)))


def cpu_preflight(spec: GpuSpec) -> Preflight:
    """Of this machine. Raises DeviceError where a process's memory can't be limited, or is not there."""
    reason = why_no_limit()
    if reason is not None:
        raise DeviceError(f"can't measure on this CPU: {reason}; --device predict needs no limit")
    available, known_from = available_bytes()
    libraries = ProcessStatus.read().resident_bytes + FIRST_STEP_BYTES
    total = available if spec.total_bytes is None else spec.total_bytes
    if total > available:
        raise DeviceError(
            f"{total / GIB:.1f} GiB are asked for and {available / GIB:.1f} GiB are there ({known_from}): what does "
            f"not fit would be swapped or killed; --memory {int(available / GIB)}GiB or less"
        )
    source = "as --memory says" if spec.total_bytes is not None else known_from
    line = f"CPU: {total / GIB:.1f} GiB for the training process, {source}; beyond it allocation fails"
    return Preflight(line, replace(spec, total_bytes=total, context_bytes=max(libraries, spec.context_bytes)))
