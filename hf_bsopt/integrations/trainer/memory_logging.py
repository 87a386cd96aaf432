"""Memory and speed of a training that runs, for its log."""

from __future__ import annotations

import logging
import time

from ...report.wording import HIGH_UTILIZATION, LOW_UTILIZATION
from ...search.device_choice import memory_bytes
from ..memory_gauges import device_use

GIB = 2**30
logger = logging.getLogger(__name__)


class GaugeLog:
    """From the first optimizer step on, since the optimizer's state and the allocator's cache appear in it."""

    def __init__(self, target: tuple[float, float], memory: str | None = None) -> None:
        """``memory``: such as "15GiB", of which the share is told where it is not the whole device."""
        self._target = target
        self._limit = None if memory is None else memory_bytes(memory)
        self._has_warned: set[str] = set()
        self._started = 0.0
        self._samples = 0

    def begin(self) -> None:
        self._started, self._samples = time.monotonic(), 0

    def step(self, samples: int) -> None:
        """An optimizer step of so many sequences is done."""
        self._samples += samples

    def figures(self) -> dict[str, float]:
        """memory_used_gib (gone from the device, as the driver sees it), memory_utilization (its share),
        alloc_retries (how often the allocator had to give its cache back) and samples_per_second, since the last time.
        Empty where the device can't be asked.
        """
        use = device_use(self._limit)
        if use is None:
            return {}
        seconds = time.monotonic() - self._started
        figures = {
            "memory_used_gib": round(use.used_bytes / GIB, 3),
            "memory_utilization": round(use.share, 4),
            "alloc_retries": float(use.alloc_retries),
            "samples_per_second": round(self._samples / seconds, 2) if seconds > 0 else 0.0,
        }
        self._warn(use.share, is_shared=use.is_host and self._limit is None)
        self.begin()
        return figures

    def _warn(self, share: float, *, is_shared: bool) -> None:
        """Once each. ``is_shared``: the memory is there for others too, so that none of it is wasted."""
        low, high = self._target
        if share < min(low, LOW_UTILIZATION) and not is_shared:
            self._once(
                "low",
                f"{share:.0%} of the memory is used, under {LOW_UTILIZATION:.0%}: a larger effective batch "
                f"(effective_batch_size=…, or fill=True) or longer sequences would use the rest",
            )
        elif share > max(high, HIGH_UTILIZATION):
            self._once(
                "high",
                f"{share:.0%} of the memory is used, over {HIGH_UTILIZATION:.0%}: a longer batch can run out of it; "
                f"BatchSizeCallback(recover=True) survives that",
            )

    def _once(self, which: str, message: str) -> None:
        if which not in self._has_warned:
            self._has_warned.add(which)
            logger.warning(message)
