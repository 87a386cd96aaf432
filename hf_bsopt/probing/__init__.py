"""Runs the real training step on a device, virtual or real, in a process of its own."""

from .devices import Device, VirtualCudaDevice
from .prober import Prober

__all__ = ["Device", "Prober", "VirtualCudaDevice"]
