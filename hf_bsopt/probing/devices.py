"""The devices on which a probe can run: the environment of its process, and how the device is prepared there.

The memory counters of each device are in :mod:`hf_bsopt.probing.memory`.
"""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass, replace
from typing import Protocol

from .. import virtual_gpu
from ..errors import DeviceError
from ..records import GpuSpec, Source
from ..virtual_gpu import data_dependent_ops, processes
from .memory import CpuMemory, CudaMemory, DeviceMemory, MpsMemory
from .preflight import Preflight, cpu_preflight, cuda_preflight, mps_preflight

NVML_BASED_CHECK = {
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # torch.cuda.is_available() must not initialize the driver (worker.py)
}
FEW_SEQUENCES = 2


@dataclass(frozen=True)
class Schedule:
    """The optimizer steps that a probe runs.

    first_batch_size: the micro-batch of the first step, which creates the optimizer's state; None is the full size.
    warmup_steps: full steps before the timed ones.
    timed_steps: steps that are timed, fewer if they take more than ``timed_seconds``.
    unpadded: run one more step without padding, for which PyTorch may choose other kernels.
    calibration: fractions of the predicted size to run before it.
    """

    first_batch_size: int | None = None
    warmup_steps: int = 3
    timed_steps: int = 0
    timed_seconds: float = 20.0
    unpadded: bool = True
    calibration: tuple[float, ...] = ()


class Device(Protocol):
    """spec: the known properties. source: the source of a Trial on it. schedule: the steps of a probe on it."""

    @property
    def spec(self) -> GpuSpec: ...
    @property
    def source(self) -> Source: ...
    @property
    def schedule(self) -> Schedule: ...
    @property
    def needs_fresh_process(self) -> bool:
        """True if a fork of the worker cannot use the device, for example since its driver is initialized."""
        ...

    def environment(self, *, expandable_segments: bool) -> dict[str, str]:
        """Return the environment of a process whose first device is this one.

        Raises RehearsalError if the device is not available.
        """
        ...

    def prepare(self) -> None:
        """Prepare the probe's process, after torch is imported and before anything is on the device."""
        ...

    def memory(self) -> DeviceMemory:
        """Return the device's memory counters; called in the probe's process."""
        ...

    def preflight(self) -> Preflight:
        """Inspect the device before anything runs, in a separate process. Raise DeviceError if nothing can run."""
        ...


@dataclass(frozen=True)
class VirtualCudaDevice:
    """An emulated GPU of this size and compute capability: it has memory but computes nothing."""

    spec: GpuSpec
    source: Source = "rehearsed"
    schedule: Schedule = Schedule(unpadded=False)  # the values of the attention mask cannot be read there
    needs_fresh_process: bool = False

    def environment(self, *, expandable_segments: bool) -> dict[str, str]:
        return with_allocator(virtual_gpu.environment(self.spec), expandable_segments)

    def prepare(self) -> None:
        processes.check_device()
        data_dependent_ops.install()

    def memory(self) -> DeviceMemory:
        return CudaMemory()

    def preflight(self) -> Preflight:
        return Preflight("the GPU is virtual: no other process uses it", self.spec)


@dataclass(frozen=True)
class CudaDevice:
    """The first CUDA device that this process sees, or ``memory_limit`` bytes of it, to emulate a smaller one."""

    spec: GpuSpec
    memory_limit: int | None = None
    source: Source = "measured"
    schedule: Schedule = Schedule(timed_steps=5)

    @property
    def needs_fresh_process(self) -> bool:
        return driver_is_started()

    def environment(self, *, expandable_segments: bool) -> dict[str, str]:
        return with_allocator({**os.environ, **NVML_BASED_CHECK}, expandable_segments)

    def prepare(self) -> None:
        import torch

        if self.memory_limit is None:
            return
        free, total = torch.cuda.mem_get_info()  # creates the context, which counts against the limit
        left = self.memory_limit - (total - free)
        if left <= 0:
            raise DeviceError(
                f"cannot use {self.memory_limit / 2**30:.1f} GiB of {self.spec.name}: {(total - free) / 2**30:.1f} GiB "
                "are in use before anything runs; end the other processes on the GPU or raise --memory"
            )
        torch.cuda.set_per_process_memory_fraction(left / total)

    def memory(self) -> DeviceMemory:
        return CudaMemory(self.memory_limit)

    def preflight(self) -> Preflight:
        return cuda_preflight(self.spec, self.memory_limit)


@dataclass(frozen=True)
class MpsDevice:
    """The GPU of a Mac, which shares the machine's memory. Its capacity is the maximum that Metal recommends."""

    spec: GpuSpec
    source: Source = "measured"
    schedule: Schedule = Schedule(timed_steps=5, calibration=(1 / 100,))
    needs_fresh_process: bool = True  # the Objective-C runtime aborts a fork that uses it

    def environment(self, *, expandable_segments: bool) -> dict[str, str]:
        return {**os.environ, "PYTORCH_MPS_HIGH_WATERMARK_RATIO": "1.0"}  # the default, 1.7, lets the machine swap

    def prepare(self) -> None:
        pass

    def memory(self) -> DeviceMemory:
        return MpsMemory()

    def preflight(self) -> Preflight:
        return mps_preflight(self.spec)


@dataclass(frozen=True)
class CpuDevice:
    """The CPU, with memory limited to ``spec.total_bytes``: allocations beyond it fail."""

    spec: GpuSpec
    source: Source = "measured"
    schedule: Schedule = Schedule(
        first_batch_size=FEW_SEQUENCES,
        warmup_steps=0,
        timed_steps=3,
        timed_seconds=5.0,
        unpadded=False,
        calibration=(1 / 100, 2 / 3),
    )
    needs_fresh_process: bool = False

    def environment(self, *, expandable_segments: bool) -> dict[str, str]:
        return {**os.environ, "CUDA_VISIBLE_DEVICES": ""}

    def prepare(self) -> None:
        from .host_memory import limit_this_process

        limit_this_process(self.spec.total_bytes or 0)

    def memory(self) -> DeviceMemory:
        return CpuMemory()

    def preflight(self) -> Preflight:
        return cpu_preflight(self.spec)


def driver_is_started() -> bool:
    """Return True if this process has initialized the CUDA driver, after which its forks cannot use a GPU.

    The check itself does not initialize it. Source: CUDA driver API, cuDeviceGetCount returns
    CUDA_ERROR_NOT_INITIALIZED before cuInit.
    """
    try:
        driver = ctypes.CDLL("libcuda.so.1", mode=os.RTLD_NOLOAD | os.RTLD_NOW)
    except (OSError, AttributeError):  # not loaded, or not Linux
        return False
    count = ctypes.c_int()
    return bool(driver.cuDeviceGetCount(ctypes.byref(count)) == 0)


def with_timed_steps(device: Device, steps: int) -> Device:
    """Return the device with a schedule that times at least ``steps`` steps."""
    schedule = replace(device.schedule, timed_steps=max(device.schedule.timed_steps, steps))
    return replace(device, schedule=schedule)  # type: ignore[type-var]


def with_allocator(environment: dict[str, str], expandable_segments: bool) -> dict[str, str]:
    """Return ``environment`` with expandable segments if wanted; the user's other allocator settings are kept."""
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    settings = ",".join(os.environ[name] for name in names if os.environ.get(name))
    if not expandable_segments:
        return environment
    return {**environment, names[0]: ",".join(part for part in (settings, "expandable_segments:True") if part)}
