"""Memory use and speed of a running training, for its log."""

from __future__ import annotations

import logging
import time

from ...report.wording import HIGH_UTILIZATION, LOW_UTILIZATION
from ...search.device_choice import memory_bytes
from ..memory_usage import device_usage

GIB = 2**30
logger = logging.getLogger(__name__)


class MemoryLogger:
    """A logger of memory and speed from the first optimizer step on, when optimizer state and allocator cache exist."""

    def __init__(self, target: tuple[float, float], memory: str | None = None) -> None:
        """Log utilization of ``memory``, a size such as "15GiB", or of the whole device if None."""
        self._target = target
        self._limit = None if memory is None else memory_bytes(memory)
        self._has_warned: set[str] = set()
        self._started = 0.0
        self._samples = 0

    def begin(self) -> None:
        self._started, self._samples = time.monotonic(), 0

    def step(self, samples: int) -> None:
        """Count the sequences of a finished optimizer step."""
        self._samples += samples

    def figures(self) -> dict[str, float]:
        """Return memory_used_gib (in use on the device, as the driver reports it), memory_utilization (used ÷ total),
        alloc_retries (how often the allocator had to release its cache) and samples_per_second since the last call.
        Return an empty dict if the device cannot be queried.
        """
        usage = device_usage(self._limit)
        if usage is None:
            return {}
        seconds = time.monotonic() - self._started
        figures = {
            "memory_used_gib": round(usage.used_bytes / GIB, 3),
            "memory_utilization": round(usage.utilization, 4),
            "alloc_retries": float(usage.alloc_retries),
            "samples_per_second": round(self._samples / seconds, 2) if seconds > 0 else 0.0,
        }
        self._warn(usage.utilization, is_shared=usage.is_host and self._limit is None)
        self.begin()
        return figures

    def _warn(self, utilization: float, *, is_shared: bool) -> None:
        """Warn once about low and once about high utilization. ``is_shared``: the memory also serves other processes,
        so unused memory is not wasted.
        """
        low, high = self._target
        if utilization < min(low, LOW_UTILIZATION) and not is_shared:
            self._warn_once(
                "low",
                f"{utilization:.0%} of the memory is used, under {LOW_UTILIZATION:.0%}: a larger effective batch "
                f"(effective_batch_size=…, or fill=True) or longer sequences would use the rest",
            )
        elif utilization > max(high, HIGH_UTILIZATION):
            self._warn_once(
                "high",
                f"{utilization:.0%} of the memory is used, over {HIGH_UTILIZATION:.0%}: a batch of longer sequences "
                f"may run out of memory; BatchSizeCallback(recover=True) recovers from that",
            )

    def _warn_once(self, which: str, message: str) -> None:
        if which not in self._has_warned:
            self._has_warned.add(which)
            logger.warning(message)
