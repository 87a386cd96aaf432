"""Where a probe runs: how its process is started, and what is made of the device there.

What a device says of its memory is in :mod:`hf_bsopt.probing.memory`.
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

WITHOUT_THE_DRIVER = {
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # a question whether there is a card must not start the driver (worker.py)
}
FEW_SEQUENCES = 2


@dataclass(frozen=True)
class Schedule:
    """Which optimizer steps a probe takes.

    first_at: the micro-batch of the first step, in which the optimizer's state appears; None is the full size.
    stepped: full steps before any is timed. timed: those that are, fewer where they take more than ``timed_seconds``.
    unpadded: one step more without padding, where the kernels may be other ones. calibration: shares of the size
    that is believed to hold, to run before it.
    """

    first_at: int | None = None
    stepped: int = 3
    timed: int = 0
    timed_seconds: float = 20.0
    unpadded: bool = True
    calibration: tuple[float, ...] = ()


class Device(Protocol):
    """spec: what is known of it. source: what a Trial on it is worth. schedule: of a probe on it."""

    @property
    def spec(self) -> GpuSpec: ...
    @property
    def source(self) -> Source: ...
    @property
    def schedule(self) -> Schedule: ...
    @property
    def needs_fresh_process(self) -> bool:
        """Whether a process that is already in touch with the device's driver can't be forked; asked in the worker."""
        ...

    def environment(self, *, expandable_segments: bool) -> dict[str, str]:
        """Of a process in which the device is the first of its kind. Raises RehearsalError where it can't be had."""
        ...

    def prepare(self) -> None:
        """In the probe's process, once torch is imported there and before anything is on the device."""
        ...

    def memory(self) -> DeviceMemory:
        """What it says of its memory, in the probe's process."""
        ...

    def preflight(self) -> Preflight:
        """What it is like before anything runs, in a process of its own. Raises DeviceError where nothing can run."""
        ...


@dataclass(frozen=True)
class VirtualCudaDevice:
    """A card of this size and compute capability, with memory and no arithmetic."""

    spec: GpuSpec
    source: Source = "rehearsed"
    schedule: Schedule = Schedule(unpadded=False)  # what the mask holds can't be read there
    needs_fresh_process: bool = False

    def environment(self, *, expandable_segments: bool) -> dict[str, str]:
        return with_allocator(virtual_gpu.environment(self.spec), expandable_segments)

    def prepare(self) -> None:
        processes.check_device()
        data_dependent_ops.install()

    def memory(self) -> DeviceMemory:
        return CudaMemory()

    def preflight(self) -> Preflight:
        return Preflight("the card is virtual: nothing else is on it", self.spec)


@dataclass(frozen=True)
class CudaDevice:
    """The first CUDA card that this process sees, or ``memory_limit`` bytes of it in place of a smaller one."""

    spec: GpuSpec
    memory_limit: int | None = None
    source: Source = "measured"
    schedule: Schedule = Schedule(timed=5)

    @property
    def needs_fresh_process(self) -> bool:
        return driver_is_started()

    def environment(self, *, expandable_segments: bool) -> dict[str, str]:
        return with_allocator({**os.environ, **WITHOUT_THE_DRIVER}, expandable_segments)

    def prepare(self) -> None:
        import torch

        if self.memory_limit is None:
            return
        free, total = torch.cuda.mem_get_info()  # makes the context, which counts against the limit
        room = self.memory_limit - (total - free)
        if room <= 0:
            raise DeviceError(
                f"{(total - free) / 2**30:.1f} GiB of {self.spec.name} are gone before anything runs, and "
                f"{self.memory_limit / 2**30:.1f} GiB were to do; end what else uses the card, or give more --memory"
            )
        torch.cuda.set_per_process_memory_fraction(room / total)

    def memory(self) -> DeviceMemory:
        return CudaMemory(self.memory_limit)

    def preflight(self) -> Preflight:
        return cuda_preflight(self.spec, self.memory_limit)


@dataclass(frozen=True)
class MpsDevice:
    """The GPU of a Mac, whose memory is the machine's own. Its capacity is what Metal recommends at most."""

    spec: GpuSpec
    source: Source = "measured"
    schedule: Schedule = Schedule(timed=5, calibration=(1 / 100,))
    needs_fresh_process: bool = True  # Objective-C's runtime ends a fork that uses it

    def environment(self, *, expandable_segments: bool) -> dict[str, str]:
        return {**os.environ, "PYTORCH_MPS_HIGH_WATERMARK_RATIO": "1.0"}  # by default 1.7: memory is swapped before

    def prepare(self) -> None:
        pass

    def memory(self) -> DeviceMemory:
        return MpsMemory()

    def preflight(self) -> Preflight:
        return mps_preflight(self.spec)


@dataclass(frozen=True)
class CpuDevice:
    """The processor, with as much memory as ``spec.total_bytes`` says: what the process asks for beyond is refused."""

    spec: GpuSpec
    source: Source = "measured"
    schedule: Schedule = Schedule(
        first_at=FEW_SEQUENCES, stepped=0, timed=3, timed_seconds=5.0, unpadded=False, calibration=(1 / 100, 2 / 3)
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
    """Whether this process has initialised CUDA's driver, after which no fork of it may use a card. Starts nothing.

    Source: CUDA driver API, cuDeviceGetCount answers CUDA_ERROR_NOT_INITIALIZED where cuInit was not called.
    """
    try:
        driver = ctypes.CDLL("libcuda.so.1", mode=os.RTLD_NOLOAD | os.RTLD_NOW)
    except (OSError, AttributeError):  # nobody has loaded it, or no Linux
        return False
    count = ctypes.c_int()
    return bool(driver.cuDeviceGetCount(ctypes.byref(count)) == 0)


def with_timed_steps(device: Device, steps: int) -> Device:
    """The device with probes that time so many steps at least."""
    schedule = replace(device.schedule, timed=max(device.schedule.timed, steps))
    return replace(device, schedule=schedule)  # type: ignore[type-var]


def with_allocator(environment: dict[str, str], expandable_segments: bool) -> dict[str, str]:
    """The environment with the caching allocator set up as the user will; other settings of theirs are kept."""
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    asked = ",".join(os.environ[name] for name in names if os.environ.get(name))
    if not expandable_segments:
        return environment
    return {**environment, names[0]: ",".join(part for part in (asked, "expandable_segments:True") if part)}
