"""Choose the next size after a prediction was refuted. Pure: imports no torch.

A size ran out of memory although it was expected to fit. If memory is affine in the size (a + b·n, a ≥ 0), two sizes
that ran give the line, and n · limit / used(n) certainly fits for any n that ran. If the bytes carry no information,
only bisection is left, on a geometric scale: the truth is as likely half as large as a quarter.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from ..records import Trial
from .limits import Limits

WELL_SEPARATED = 1.5
"""Ratio of two sizes from which a line through their memory can be trusted."""


def after_nothing_fitted(tried: Mapping[int, Trial], limits: Limits, smallest: int) -> int:
    """Return half the smallest size that ran out of memory, then the smallest size at all: it gives the bytes."""
    half = limits.allowed(min(tried) // 2)
    return half if len(tried) == 1 and half >= smallest else limits.allowed(smallest)


def between(fits: int, too_large: int, tried: Mapping[int, Trial], limits: Limits, attempts_left: int) -> int:
    """Return a size strictly between the two, 0 if there is no allowed one."""
    following = limits.following(fits)
    if not fits < following < too_large:
        return 0
    middle = max(following, limits.allowed(math.isqrt(fits * too_large)))
    if not fits or sum(trial.fits for trial in tried.values()) != 1:
        return middle
    used = tried[fits].used_bytes or 0
    certain = limits.allowed(int(fits * limits.limit_bytes / used)) if used else too_large
    if certain >= too_large:  # the bytes of the one that ran carry no information
        return middle
    if certain < WELL_SEPARATED * fits and attempts_left > 2:
        return middle
    return max(certain, following)
