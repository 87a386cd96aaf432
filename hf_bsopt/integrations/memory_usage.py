"""Memory that is available to a training and that it has used, read from inside its own process."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ..probing.host_memory import ProcessStatus, available_bytes
from ..probing.oom import Where
from ..records import Peak


class MemoryReader(Protocol):
    """Reads the kind of memory that limits a training."""

    where: Where

    def start(self) -> None:
        """Start counting peaks from here."""
        ...

    def in_use(self) -> int:
        """Return the bytes in live tensors, or the closest figure that can be read."""
        ...

    def held(self) -> int:
        """Return the bytes held after an out-of-memory error: in use, or fragments between live tensors."""
        ...

    def capacity(self) -> int:
        """Return the bytes that the training can have at most."""
        ...

    def peak(self) -> Peak | None:
        """Return the peak since :meth:`start`, or None if it was not counted."""
        ...


class CudaMemoryReader:
    """The caching allocator of this process on its current CUDA device."""

    where: Where = "device"

    def start(self) -> None:
        import torch

        torch.cuda.reset_peak_memory_stats()

    def in_use(self) -> int:
        import torch

        return int(torch.cuda.memory_allocated())

    def held(self) -> int:
        """Return the reserved bytes: before it raises, the allocator has released all unused blocks."""
        import torch

        return int(torch.cuda.memory_reserved())

    def capacity(self) -> int:
        """Return free plus reserved memory, capped by the fraction of the device that this process may use."""
        import torch

        free, total = torch.cuda.mem_get_info()
        fraction = torch.cuda.get_per_process_memory_fraction()
        return int(min(free + torch.cuda.memory_reserved(), fraction * total))

    def peak(self) -> Peak:
        import torch

        return Peak(torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved())


class HostMemoryReader:
    """This process on Linux, limited by RLIMIT_DATA or by the memory available on the machine."""

    where: Where = "host"

    def __init__(self) -> None:
        self._peak_counts = False

    def start(self) -> None:
        """Reset the peak of the resident memory. Source: proc(5), /proc/pid/clear_refs."""
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
            self._peak_counts = True

    def in_use(self) -> int:
        status = ProcessStatus.read()
        return status.data_bytes if self._limit() is not None else status.resident_bytes

    def held(self) -> int:
        """Return the bytes in use plus what was released before the error was caught, which only the peak shows."""
        status = ProcessStatus.read()
        released = status.peak_resident_bytes - status.resident_bytes if self._peak_counts else 0
        return self.in_use() + released

    def capacity(self) -> int:
        limit = self._limit()
        return limit if limit is not None else ProcessStatus.read().resident_bytes + available_bytes()[0]

    def peak(self) -> Peak | None:
        if not self._peak_counts:
            return None
        resident = ProcessStatus.read().peak_resident_bytes
        return Peak(resident, resident)

    def _limit(self) -> int | None:
        import resource

        soft, _ = resource.getrlimit(resource.RLIMIT_DATA)
        return None if soft == resource.RLIM_INFINITY else soft


def memory_reader() -> MemoryReader | None:
    """Return the reader for the memory that limits this process: a CUDA device in use, else the host; None if neither
    can be read.
    """
    import torch

    if torch.cuda.is_initialized():
        return CudaMemoryReader()
    return HostMemoryReader() if sys.platform == "linux" and not _has_other_accelerator() else None


def _has_other_accelerator() -> bool:
    import torch

    accelerator = torch.accelerator.current_accelerator()  # the one this build of torch supports
    return accelerator is not None and accelerator.type != "cuda"


@dataclass(frozen=True)
class DeviceUsage:
    """Memory of one device.

    used_bytes: memory in use on the device as its driver reports it; for a CPU, the resident memory of this process
    without file-backed pages (libraries), which a probe, being a fork, does not have either. total_bytes: the memory of
    the device. alloc_retries: how often the caching allocator had to release its cache. is_host: whether the device is
    a CPU.
    """

    used_bytes: int
    total_bytes: int
    alloc_retries: int = 0
    is_host: bool = False

    @property
    def utilization(self) -> float:
        return self.used_bytes / self.total_bytes


def device_usage(limit_bytes: int | None = None) -> DeviceUsage | None:
    """Return the usage of the device that this process trains on, or None if it cannot be read. ``limit_bytes``
    replaces the total when only a part of the device may be used.
    """
    import torch

    if torch.cuda.is_initialized():
        free, total = torch.cuda.mem_get_info()
        retries = int(torch.cuda.memory_stats().get("num_alloc_retries", 0))
        return DeviceUsage(total - free, limit_bytes or total, retries)
    if torch.backends.mps.is_available():
        used = int(torch.mps.driver_allocated_memory())
        return DeviceUsage(used, limit_bytes or int(torch.mps.recommended_max_memory()))
    if not isinstance(memory_reader(), HostMemoryReader):
        return None
    status = ProcessStatus.read()
    used = status.resident_bytes - status.file_bytes
    return DeviceUsage(used, limit_bytes or used + available_bytes()[0], is_host=True)
