"""Run the real training step on a real or virtual device, in a separate process. Entry point: ProbeClient."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._utils.lazy_names import lazy_names

if TYPE_CHECKING:
    from .client import ProbeClient
    from .devices import CpuDevice, CudaDevice, Device, MpsDevice, VirtualCudaDevice, with_timed_steps
    from .preflight import Preflight

__all__ = [
    "CpuDevice",
    "CudaDevice",
    "Device",
    "MpsDevice",
    "Preflight",
    "ProbeClient",
    "VirtualCudaDevice",
    "with_timed_steps",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "CpuDevice": "devices",
        "CudaDevice": "devices",
        "Device": "devices",
        "MpsDevice": "devices",
        "Preflight": "preflight",
        "ProbeClient": "client",
        "VirtualCudaDevice": "devices",
        "with_timed_steps": "devices",
    },
)
