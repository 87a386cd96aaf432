"""Processes and memory of an NVIDIA GPU, through nvidia-ml-py if it is installed. Creates no CUDA context."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class GpuProcess:
    """used_bytes: 0 if the driver does not report it, as on Windows and in some containers."""

    pid: int
    used_bytes: int


@dataclass(frozen=True)
class NvmlDevice:
    """A GPU as NVML sees it."""

    handle: Any

    @classmethod
    def from_uuid(cls, uuid: str) -> NvmlDevice | None:
        """Return the GPU with this UUID; None without nvidia-ml-py or if NVML does not respond."""
        nvml = _initialized_nvml()
        if nvml is None:
            return None
        name = uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}"
        try:
            return cls(nvml.nvmlDeviceGetHandleByUUID(name))
        except nvml.NVMLError:
            return None

    def used_bytes(self) -> int:
        """Return the GPU memory used by all processes, including what the driver reserves for itself."""
        return int(_initialized_nvml().nvmlDeviceGetMemoryInfo(self.handle).used)

    def processes(self) -> list[GpuProcess]:
        """Return the compute and graphics processes on it, sorted by pid, as far as this process may see them."""
        nvml = _initialized_nvml()
        found: dict[int, int] = {}
        for list_processes in (nvml.nvmlDeviceGetComputeRunningProcesses, nvml.nvmlDeviceGetGraphicsRunningProcesses):
            try:
                for process in list_processes(self.handle):
                    found[process.pid] = max(found.get(process.pid, 0), process.usedGpuMemory or 0)
            except nvml.NVMLError:
                continue
        return [GpuProcess(pid, used) for pid, used in sorted(found.items())]


def first_gpu_name() -> str | None:
    """Return the driver's name of the first GPU in CUDA_VISIBLE_DEVICES; None if there is none, or no NVML.

    NVML numbers GPUs by PCI bus. CUDA does so only with CUDA_DEVICE_ORDER=PCI_BUS_ID; by default the fastest is first.
    """
    nvml = _initialized_nvml()
    if nvml is None:
        return None
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
    try:
        if first.isdecimal():
            handle = nvml.nvmlDeviceGetHandleByIndex(int(first))
        elif first.startswith(("GPU-", "MIG-")):
            handle = nvml.nvmlDeviceGetHandleByUUID(first)
        else:
            return None
        return str(nvml.nvmlDeviceGetName(handle))
    except nvml.NVMLError:
        return None


def driver_version() -> str:
    """Return the driver's version; empty if it is not known."""
    nvml = _initialized_nvml()
    return str(nvml.nvmlSystemGetDriverVersion()) if nvml is not None else ""


def _initialized_nvml() -> Any:
    """Return pynvml, initialized; None if it is not installed or there is no driver. nvmlInit counts its calls."""
    if importlib.util.find_spec("pynvml") is None:
        return None
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    return pynvml
