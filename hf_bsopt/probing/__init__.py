"""Run the real training step on a real or virtual device, in a separate process. Entry point: ProbeClient."""

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
