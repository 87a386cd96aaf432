"""Correct a prediction by the memory of the sizes that ran. Pure: imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ..records import Trial
from .choose import LARGEST_TRIED, largest_that
from .limits import Limits, Prediction
from .policies import Policy

TOLERANCE = 0.05
"""Fraction of the device's memory: a prediction that is off by no more is corrected by an offset and still trusted."""

ExpectedBytes = Callable[[int], float]


def corrected(tried: Mapping[int, Trial], prediction: Prediction | None, limits: Limits) -> ExpectedBytes:
    """Return the prediction, corrected by its error at the sizes that ran: by a line, from two sizes on. After one
    size, a small error is an offset, a large one a factor. Without a prediction, memory is proportional to the size.
    """
    ran = sorted(size for size, trial in tried.items() if trial.has_whole_peak)
    used = {size: float(tried[size].used_bytes or 0) for size in ran}
    predicted = prediction.unlimited if prediction is not None else (lambda size: 0)
    if not ran:
        return predicted
    low, high = ran[0], ran[-1]
    expected = prediction.expected if prediction is not None else predicted
    error = {size: used[size] - expected(size) for size in ran}
    if low < high:
        slope = (error[high] - error[low]) / (high - low)
        return lambda size: predicted(size) + error[high] + slope * (size - high)
    if prediction is None:
        return lambda size: used[high] / high * size
    if abs(error[high]) <= TOLERANCE * limits.total_bytes:
        return lambda size: predicted(size) + error[high]
    return lambda size: predicted(size) * used[high] / max(1, expected(high))


def is_as_expected(trial: Trial, expected_bytes: float, limits: Limits) -> bool:
    """Return whether a run agrees with the prediction. An OOM says only that it needed more than the whole device."""
    if not trial.has_whole_peak:
        return expected_bytes > limits.total_bytes * (1 - TOLERANCE)
    return abs((trial.used_bytes or 0) - expected_bytes) <= TOLERANCE * limits.total_bytes


@dataclass(frozen=True)
class Expectation:
    """The sizes expected to fit after those that were tried."""

    tried: Mapping[int, Trial]
    limits: Limits
    policy: Policy
    prediction: Prediction | None
    used_bytes: ExpectedBytes

    def largest(self, fits: int, too_large: int) -> int:
        """Return the largest size from 1 to below ``too_large`` that is expected to fit, 0 if the expectation is
        refuted: it says that ``too_large`` fits.
        """
        extra = self._extra_bytes(too_large)

        def is_expected_to_fit(size: int) -> bool:
            used = self.used_bytes(size) + extra
            distance = self._distance(size, used)
            if self.prediction is not None and self.limits.is_whole_device:
                error = used - self.prediction.unlimited(size)
                return self.prediction.fits_within(size, self.limits.total_bytes - error - distance)
            return used + distance <= self.limits.limit_bytes

        if too_large <= LARGEST_TRIED and is_expected_to_fit(too_large):
            return 0
        return largest_that(is_expected_to_fit, guess=fits or too_large - 1, limit=too_large - 1)

    def _extra_bytes(self, too_large: int) -> float:
        """Return what ``too_large`` used beyond the expectation, if it ran."""
        trial = self.tried.get(too_large)
        if trial is None or not trial.has_whole_peak or not trial.used_bytes:
            return 0.0
        noise = self.policy.noise * self.limits.total_bytes
        return max(0.0, trial.used_bytes - self.used_bytes(too_large)) + noise

    def _distance(self, size: int, used: float) -> float:
        """Return the bytes to keep free, in proportion to how far the size is from one that ran."""
        ran = [other for other, trial in self.tried.items() if trial.has_whole_peak]
        policy = self.policy
        fraction = policy.distance_after_one_run if len(ran) < 2 else policy.distance_after_two_runs
        away = (abs(self.used_bytes(size) - self.used_bytes(other)) for other in ran)
        return fraction * min(away, default=used)
