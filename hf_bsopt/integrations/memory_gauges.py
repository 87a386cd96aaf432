"""How much memory a training has and how much it has taken, asked in its own process without a hand in it."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ..probing.host_memory import ProcessStatus, available_bytes
from ..probing.oom import Where
from ..records import Peak


class Gauge(Protocol):
    """The memory that a training is short of."""

    where: Where

    def start(self) -> None:
        """Peaks count from here on."""
        ...

    def in_use(self) -> int:
        """In live tensors, or as near to it as can be asked."""
        ...

    def held(self) -> int:
        """After an out-of-memory error: in use, or in pieces between what is in use that nothing else could have."""
        ...

    def capacity(self) -> int: ...
    def peak(self) -> Peak | None:
        """None where it was not counted."""
        ...


class CudaGauge:
    """The caching allocator of this process on its current card."""

    where: Where = "device"

    def start(self) -> None:
        import torch

        torch.cuda.reset_peak_memory_stats()

    def in_use(self) -> int:
        import torch

        return int(torch.cuda.memory_allocated())

    def held(self) -> int:
        """Before the error the allocator gave back what was wholly free."""
        import torch

        return int(torch.cuda.memory_reserved())

    def capacity(self) -> int:
        """What is free and what the allocator has, within the share of the card that this process may have."""
        import torch

        free, total = torch.cuda.mem_get_info()
        share = torch.cuda.get_per_process_memory_fraction()
        return int(min(free + torch.cuda.memory_reserved(), share * total))

    def peak(self) -> Peak:
        import torch

        return Peak(torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved())


class HostGauge:
    """This process on Linux, as far as it is limited: by RLIMIT_DATA, or by what the machine has to give."""

    where: Where = "host"

    def __init__(self) -> None:
        self._peak_counts = False

    def start(self) -> None:
        """Sets the peak of the resident memory back. Source: proc(5), /proc/pid/clear_refs."""
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
            self._peak_counts = True

    def in_use(self) -> int:
        status = ProcessStatus.read()
        return status.data_bytes if self._limit() is not None else status.resident_bytes

    def held(self) -> int:
        """Much is given back already where the error is caught: then the peak tells how much it was."""
        status = ProcessStatus.read()
        given_back = status.peak_resident_bytes - status.resident_bytes if self._peak_counts else 0
        return self.in_use() + given_back

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


def gauge() -> Gauge | None:
    """Of the memory that counts here: a card that is in use, else the host's; None where neither can be asked."""
    import torch

    if torch.cuda.is_initialized():
        return CudaGauge()
    return HostGauge() if sys.platform == "linux" and not _has_other_accelerator() else None


def _has_other_accelerator() -> bool:
    import torch

    found = torch.accelerator.current_accelerator()  # of this build of torch
    return found is not None and found.type != "cuda"


@dataclass(frozen=True)
class DeviceUse:
    """used_bytes: gone from the device as its driver sees it, of a CPU resident in this process, but for the pages of
    files (libraries): a probe, which is a fork, does not have them either. total_bytes: what there is. alloc_retries:
    how often the caching allocator had to give its cache back. is_host: of a CPU.
    """

    used_bytes: int
    total_bytes: int
    alloc_retries: int = 0
    is_host: bool = False

    @property
    def share(self) -> float:
        return self.used_bytes / self.total_bytes


def device_use(limit_bytes: int | None = None) -> DeviceUse | None:
    """Of the device that this process trains on; None where it can't be asked. ``limit_bytes``: what there is, where
    that is not the whole device.
    """
    import torch

    if torch.cuda.is_initialized():
        free, total = torch.cuda.mem_get_info()
        return DeviceUse(total - free, limit_bytes or total, int(torch.cuda.memory_stats().get("num_alloc_retries", 0)))
    if torch.backends.mps.is_available():
        used = int(torch.mps.driver_allocated_memory())
        return DeviceUse(used, limit_bytes or int(torch.mps.recommended_max_memory()))
    host = gauge()
    if host is None or not isinstance(host, HostGauge):
        return None
    status = ProcessStatus.read()
    used = status.resident_bytes - status.file_bytes
    return DeviceUse(used, limit_bytes or used + available_bytes()[0], is_host=True)
