"""Sizes at which to measure throughput, and the smallest that trains about as fast as any. Pure: imports no torch."""

from __future__ import annotations

from collections.abc import Sequence

from ..records import Trial
from .limits import Allowed

WITHIN = 0.02
"""Fraction of the best throughput: a smaller gain is not worth the memory, and cannot be distinguished from noise."""
CURVE = (1.0, 0.75, 0.5, 0.25, 0.125)


def curve_sizes(largest: int, allowed: Allowed) -> tuple[int, ...]:
    """Return at most five sizes up to ``largest``, in descending order, at which to measure throughput."""
    sizes = {allowed(max(1, round(largest * fraction))) for fraction in CURVE}
    return tuple(sorted((size for size in sizes if size), reverse=True))


def plateau(trials: Sequence[Trial]) -> Trial | None:
    """Return the smallest size within :data:`WITHIN` of the best samples per second, None if nothing was timed."""
    timed = [trial for trial in trials if trial.fits and trial.samples_per_second]
    if not timed:
        return None
    best = max(trial.samples_per_second or 0 for trial in timed)
    return min(
        (trial for trial in timed if (trial.samples_per_second or 0) >= (1 - WITHIN) * best),
        key=lambda trial: trial.batch_size,
    )
