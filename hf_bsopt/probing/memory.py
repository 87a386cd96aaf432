"""Memory counters of each device, read in the process that uses it. Sizes are in bytes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Protocol

from ..records import Peak
from .host_memory import ProcessStatus

SAMPLE_SECONDS = 0.002
SPILL_BYTES = 64 * 2**20
"""A smaller excess is within the granularity of the counters, or caused by another process."""


class DeviceMemory(Protocol):
    """Counters that run from :meth:`start` to :meth:`end`."""

    def start(self) -> None:
        """Release cached memory to the device and reset the peaks."""
        ...

    def synchronize(self) -> None:
        """Wait until the device has finished its work."""
        ...

    def peak(self) -> Peak: ...
    def used_bytes(self) -> int:
        """Return what the driver saw in use at the peak: reserved memory and everything else on the device."""
        ...

    def retries(self) -> int:
        """Return how often the allocator had to release its cache to serve a request."""
        ...

    def spilled(self) -> str:
        """Return a description of the host memory that was used in place of the device's; empty if none was."""
        ...

    def end(self) -> None: ...


class CudaMemory:
    """Counters of the CUDA caching allocator and the driver."""

    def __init__(self, memory_limit: int | None = None) -> None:
        self._memory_limit = memory_limit
        self._outside = 0
        self._capacity = 0

    def start(self) -> None:
        import torch

        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.reset_accumulated_memory_stats()
        free, total = torch.cuda.mem_get_info()
        self._outside = total - free - torch.cuda.memory_reserved()
        self._capacity = total - self._outside

    def synchronize(self) -> None:
        import torch

        torch.cuda.synchronize()

    def peak(self) -> Peak:
        import torch

        torch.cuda.synchronize()
        return Peak(torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved())

    def used_bytes(self) -> int:
        """Return the peak of reserved memory plus what else is used now: libraries loaded in a step allocate late."""
        import torch

        free, total = torch.cuda.mem_get_info()
        outside = max(self._outside, total - free - torch.cuda.memory_reserved())
        return torch.cuda.max_memory_reserved() + outside

    def retries(self) -> int:
        import torch

        return int(torch.cuda.memory_stats().get("num_alloc_retries", 0))

    def spilled(self) -> str:
        """Detect spilling: on Windows and WSL the driver moves what does not fit to host memory without an error."""
        import torch

        beyond = torch.cuda.max_memory_reserved() - self._capacity
        if beyond <= SPILL_BYTES:
            return ""
        return f"{beyond / 2**30:.2f} GiB more were reserved than the device had: the driver used host memory"

    def end(self) -> None:
        pass


class MpsMemory:
    """Counters of Metal's allocator, which keeps no peaks: a thread samples it."""

    def __init__(self) -> None:
        self._allocated, self._driver = _SampledPeak(_mps_allocated), _SampledPeak(_mps_driver)

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
        return Peak(self._allocated.update(), self._driver.update())

    def used_bytes(self) -> int:
        return self._driver.update()

    def retries(self) -> int:
        return 0

    def spilled(self) -> str:
        import torch

        beyond = self._driver.update() - torch.mps.recommended_max_memory()
        if beyond <= SPILL_BYTES:
            return ""
        return f"{beyond / 2**30:.2f} GiB more than Metal recommends were allocated: the machine swaps beyond that"

    def end(self) -> None:
        self._allocated.end()
        self._driver.end()


class CpuMemory:
    """Peak resident memory of the process, less what was resident before the model was built."""

    def __init__(self) -> None:
        self._before = ProcessStatus(0, 0, 0, 0)

    def start(self) -> None:
        self._before = ProcessStatus.read()

    def synchronize(self) -> None:
        pass

    def peak(self) -> Peak:
        """Return the growth since start as both peaks: there is no caching allocator on the CPU."""
        grown = max(0, ProcessStatus.read().peak_resident_bytes - self._before.resident_bytes)
        return Peak(grown, grown)

    def used_bytes(self) -> int:
        return ProcessStatus.read().peak_resident_bytes

    def retries(self) -> int:
        return 0

    def spilled(self) -> str:
        swapped = ProcessStatus.read().swapped_bytes - self._before.swapped_bytes
        return f"{swapped / 2**30:.2f} GiB were swapped to disk" if swapped > SPILL_BYTES else ""

    def end(self) -> None:
        pass


def _mps_allocated() -> int:
    import torch

    return torch.mps.current_allocated_memory()


def _mps_driver() -> int:
    import torch

    return torch.mps.driver_allocated_memory()


class _SampledPeak:
    """The peak of a counter that keeps none itself, sampled by a thread."""

    def __init__(self, read: Callable[[], int]) -> None:
        self._read = read
        self._peak = 0
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def start(self) -> None:
        self._peak = 0
        self._thread.start()

    def update(self) -> int:
        self._peak = max(self._peak, self._read())
        return self._peak

    def end(self) -> None:
        self._stopped.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._stopped.wait(SAMPLE_SECONDS):
            self.update()
