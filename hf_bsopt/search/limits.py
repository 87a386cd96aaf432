"""The limits that a verified size keeps to, and the protocol of a prediction. Pure: imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from ..records import Trial
from .choose import LARGEST_TRIED, largest_that

Allowed = Callable[[int], int]


class Prediction(Protocol):
    """The memory that a micro-batch is predicted to use, in bytes of the device."""

    def expected(self, batch_size: int) -> int:
        """Return the bytes used on this device, where the allocator gives its cache back when memory runs out."""
        ...

    def unlimited(self, batch_size: int) -> int:
        """Return the bytes used on a device whose memory never runs out."""
        ...

    def fits_within(self, batch_size: int, total_bytes: float) -> bool:
        """Return whether the size would run on a device with so much memory."""
        ...


@dataclass(frozen=True)
class Limits:
    """Limits of a verified size: it ran within ``limit_bytes`` of the device's ``total_bytes``.

    allowed(n): the largest size at or under n that may be recommended, 0 if there is none; never falls as n grows.
    """

    limit_bytes: float
    total_bytes: float
    allowed: Allowed

    @property
    def is_whole_device(self) -> bool:
        return self.limit_bytes >= self.total_bytes

    def fits(self, trial: Trial) -> bool:
        """Return whether the size ran within the limits, whatever slack the limit of its process had."""
        return trial.fits and (trial.used_bytes or 0) <= self.limit_bytes

    def largest_that_fits(self, tried: Mapping[int, Trial]) -> int:
        """Return the largest size run within the limits, 0 if there is none."""
        return max((size for size, trial in tried.items() if self.fits(trial)), default=0)

    def following(self, size: int) -> int:
        """Return the smallest allowed size above ``size``, 0 if there is none."""
        last = largest_that(lambda n: self.allowed(n) <= size, guess=max(1, size))
        return self.allowed(last + 1) if last < LARGEST_TRIED else 0
