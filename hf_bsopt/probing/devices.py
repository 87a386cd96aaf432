"""Where a probe runs: how its process is started, and what the device says of its memory there."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Protocol

from .. import rehearsal
from ..records import GpuSpec, Peak, Source
from ..rehearsal import processes, stand_ins


class Device(Protocol):
    """spec: what is known of it. kind: as ``torch.device`` calls it. source: what a Trial on it is worth."""

    @property
    def spec(self) -> GpuSpec: ...
    @property
    def kind(self) -> str: ...
    @property
    def source(self) -> Source: ...
    @property
    def tells_time(self) -> bool:
        """Whether the seconds of a step mean anything."""
        ...

    def prepare(self) -> None:
        """In that process, once torch is imported there and before anything is on the device."""
        ...

    def environment(self, *, expandable_segments: bool) -> dict[str, str]:
        """Of a process in which the device is the first of its kind. Raises RehearsalError where it can't be had."""
        ...


@dataclass(frozen=True)
class VirtualCudaDevice:
    """A card of this size and compute capability, with memory and no arithmetic."""

    spec: GpuSpec
    kind: str = "cuda"
    source: Source = "rehearsed"
    tells_time: bool = False

    def environment(self, *, expandable_segments: bool) -> dict[str, str]:
        return with_allocator(rehearsal.environment(self.spec), expandable_segments)

    def prepare(self) -> None:
        processes.check_device()
        stand_ins.install()


def with_allocator(environment: dict[str, str], expandable_segments: bool) -> dict[str, str]:
    """The environment with the caching allocator set up as the user will; other settings of theirs are kept."""
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    asked = ",".join(os.environ[name] for name in names if os.environ.get(name))
    if not expandable_segments:
        return environment
    return {**environment, names[0]: ",".join(part for part in (asked, "expandable_segments:True") if part)}


class CudaMemory:
    """The caching allocator and the driver, asked from inside the process that uses the device."""

    def start(self) -> None:
        """Everything that is free goes back to the device; peaks count from here on."""
        import torch

        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.reset_accumulated_memory_stats()

    def peak(self) -> Peak:
        """Since :meth:`start`."""
        import torch

        torch.cuda.synchronize()
        return Peak(torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved())

    def used_bytes(self) -> int:
        """At the peak, as the driver saw it: reserved, and whatever else is gone from the device now."""
        import torch

        free, total = torch.cuda.mem_get_info()
        outside = total - free - torch.cuda.memory_reserved()
        return torch.cuda.max_memory_reserved() + outside

    def retries(self) -> int:
        import torch

        return int(torch.cuda.memory_stats()["num_alloc_retries"])
