"""What a device says of its memory, asked in the process that uses it. Sizes are in bytes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Protocol

from ..records import Peak
from .host_memory import ProcessStatus

SAMPLE_SECONDS = 0.002
SPILL_BYTES = 64 * 2**20
"""Less than this beyond the device, or swapped, is the granularity of the counters, or another process's doing."""


class DeviceMemory(Protocol):
    """Counted from :meth:`start` to :meth:`end`."""

    def start(self) -> None:
        """Everything that is free goes back to the device; peaks count from here on."""
        ...

    def synchronize(self) -> None:
        """Returns when the device has done its work."""
        ...

    def peak(self) -> Peak: ...
    def used_bytes(self) -> int:
        """At the peak, as the driver saw it: reserved, and whatever else is gone from the device."""
        ...

    def retries(self) -> int:
        """How often the allocator had to give its cache back before a request could be met."""
        ...

    def spilled(self) -> str:
        """In words, how memory of the host was used in place of the device's; empty where it was not."""
        ...

    def end(self) -> None: ...


class CudaMemory:
    """The caching allocator and the driver."""

    def __init__(self, memory_limit: int | None = None) -> None:
        self._memory_limit = memory_limit
        self._outside = 0
        self._room = 0

    def start(self) -> None:
        import torch

        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.reset_accumulated_memory_stats()
        free, total = torch.cuda.mem_get_info()
        self._outside = total - free - torch.cuda.memory_reserved()
        self._room = total - self._outside

    def synchronize(self) -> None:
        import torch

        torch.cuda.synchronize()

    def peak(self) -> Peak:
        import torch

        torch.cuda.synchronize()
        return Peak(torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved())

    def used_bytes(self) -> int:
        """What else is gone from the device is asked now: libraries that a step loads take their memory late."""
        import torch

        free, total = torch.cuda.mem_get_info()
        outside = max(self._outside, total - free - torch.cuda.memory_reserved())
        return torch.cuda.max_memory_reserved() + outside

    def retries(self) -> int:
        import torch

        return int(torch.cuda.memory_stats().get("num_alloc_retries", 0))

    def spilled(self) -> str:
        """On Windows and under WSL the driver moves to the host's memory what no longer fits, without an error."""
        import torch

        beyond = torch.cuda.max_memory_reserved() - self._room
        if beyond <= SPILL_BYTES:
            return ""
        return f"{beyond / 2**30:.2f} GiB more were reserved than the device had: the driver took the host's memory"

    def end(self) -> None:
        pass


class MpsMemory:
    """Metal's allocator keeps no peaks: it is asked all the time, by a thread."""

    def __init__(self) -> None:
        self._allocated, self._driver = _Highest(_mps_allocated), _Highest(_mps_driver)

    def start(self) -> None:
        import torch

        torch.mps.synchronize()
        torch.mps.empty_cache()
        self._allocated.start()
        self._driver.start()

    def synchronize(self) -> None:
        import torch

        torch.mps.synchronize()

    def peak(self) -> Peak:
        return Peak(self._allocated.look(), self._driver.look())

    def used_bytes(self) -> int:
        return self._driver.look()

    def retries(self) -> int:
        return 0

    def spilled(self) -> str:
        import torch

        beyond = self._driver.look() - torch.mps.recommended_max_memory()
        if beyond <= SPILL_BYTES:
            return ""
        return f"{beyond / 2**30:.2f} GiB more than Metal recommends were taken: the machine swaps from there on"

    def end(self) -> None:
        self._allocated.end()
        self._driver.end()


class CpuMemory:
    """The process: what it has in memory at most, and what of it was there before the model."""

    def __init__(self) -> None:
        self._before = ProcessStatus(0, 0, 0, 0)

    def start(self) -> None:
        self._before = ProcessStatus.read()

    def synchronize(self) -> None:
        pass

    def peak(self) -> Peak:
        """Both are what came on top of the libraries: there is no caching allocator between."""
        grown = max(0, ProcessStatus.read().peak_resident_bytes - self._before.resident_bytes)
        return Peak(grown, grown)

    def used_bytes(self) -> int:
        return ProcessStatus.read().peak_resident_bytes

    def retries(self) -> int:
        return 0

    def spilled(self) -> str:
        swapped = ProcessStatus.read().swapped_bytes - self._before.swapped_bytes
        return f"{swapped / 2**30:.2f} GiB were swapped to the disk" if swapped > SPILL_BYTES else ""

    def end(self) -> None:
        pass


def _mps_allocated() -> int:
    import torch

    return torch.mps.current_allocated_memory()


def _mps_driver() -> int:
    import torch

    return torch.mps.driver_allocated_memory()


class _Highest:
    """The highest value of a counter that keeps no peak itself."""

    def __init__(self, read: Callable[[], int]) -> None:
        self._read = read
        self._highest = 0
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def start(self) -> None:
        self._highest = 0
        self._thread.start()

    def look(self) -> int:
        self._highest = max(self._highest, self._read())
        return self._highest

    def end(self) -> None:
        self._is_over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._is_over.wait(SAMPLE_SECONDS):
            self.look()
