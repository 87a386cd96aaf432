"""Who else is on an NVIDIA card, through nvidia-ml-py where it is installed. Asking makes no CUDA context."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class GpuProcess:
    """used_bytes: 0 where the driver does not say, as under Windows or in some containers."""

    pid: int
    used_bytes: int


@dataclass(frozen=True)
class Card:
    """A card as NVML knows it."""

    handle: Any

    @classmethod
    def of(cls, uuid: str) -> Card | None:
        """The card of this UUID; None without nvidia-ml-py, or where NVML does not answer."""
        nvml = _started()
        if nvml is None:
            return None
        name = uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}"
        try:
            return cls(nvml.nvmlDeviceGetHandleByUUID(name))
        except nvml.NVMLError:
            return None

    def used_bytes(self) -> int:
        """Of the whole card, by everybody; what the driver reserves for itself counts too."""
        return int(_started().nvmlDeviceGetMemoryInfo(self.handle).used)

    def processes(self) -> list[GpuProcess]:
        """That compute or draw on it, by number, as far as this process may see them."""
        nvml = _started()
        found: dict[int, int] = {}
        for ask in (nvml.nvmlDeviceGetComputeRunningProcesses, nvml.nvmlDeviceGetGraphicsRunningProcesses):
            try:
                for process in ask(self.handle):
                    found[process.pid] = max(found.get(process.pid, 0), process.usedGpuMemory or 0)
            except nvml.NVMLError:
                continue
        return [GpuProcess(pid, used) for pid, used in sorted(found.items())]


def first_card_name() -> str | None:
    """Of the first card that CUDA_VISIBLE_DEVICES leaves, as the driver spells it; None where there is none, or nobody
    to ask. NVML counts cards by their bus; so does CUDA with CUDA_DEVICE_ORDER=PCI_BUS_ID, and else the fastest first.
    """
    nvml = _started()
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
    """Empty where it is not known."""
    nvml = _started()
    return str(nvml.nvmlSystemGetDriverVersion()) if nvml is not None else ""


def _started() -> Any:
    """The module, initialised; None where it is not installed or there is no driver. Initialising again is counted."""
    if importlib.util.find_spec("pynvml") is None:
        return None
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    return pynvml
