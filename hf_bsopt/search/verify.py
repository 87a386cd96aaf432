"""Verify a predicted size by running it and a few others. Pure: imports no torch.

    verify(probe, 48, limits=..., policy=REAL_GPU, prediction=...)  # probe(48) -> Trial, a real step

The size in the answer was itself run, whatever happens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import UsageError
from ..options import MAX_ATTEMPTS
from ..records import Trial
from .choose import LARGEST_TRIED, Probe, largest_that
from .correction import TOLERANCE, Expectation, corrected, is_as_expected
from .limits import Limits, Prediction
from .policies import FREE, Policy
from .recovery import after_nothing_fitted, between

TRUSTED_ATTEMPTS = 3
"""Most sizes that are run while each run agrees with the prediction."""
MOST_GROWTH = 4
"""Times the predicted size, or the largest that fits: no larger size is run next, whatever a correction says."""
RECOVERY_ATTEMPTS = 8
"""Attempts after which a refuted prediction is no longer corrected: what is left is bisected."""
GROWTH = 1.5


@dataclass(frozen=True)
class Verification:
    """The result of running a few sizes.

    batch_size: the largest that was run and fits, 0 if none did.
    is_settled: no larger size is expected to fit; False if the attempts ran out.
    failure: a probe that failed for another reason than memory.
    predicted_size: the size that was predicted to fit, 0 without a prediction.
    refuted: a size ran out of memory, or over the limit, that was predicted to fit, by more than 5 % of the device.
    memory_factor: used memory measured ÷ predicted at the largest size that ran; None without a prediction or a run.
    """

    batch_size: int
    trials: tuple[Trial, ...]
    is_settled: bool
    failure: Trial | None = None
    predicted_size: int = 0
    refuted: bool = False
    memory_factor: float | None = None


def verify(
    probe: Probe,
    first: int,
    *,
    limits: Limits,
    policy: Policy = FREE,
    prediction: Prediction | None = None,
    max_attempts: int = MAX_ATTEMPTS,
    smallest: int = 1,
) -> Verification:
    """Run ``first``, then whatever sizes the results require, at most ``max_attempts``.

    The prediction is corrected by every size that ran; without one, a line through those that ran takes its place.
    While every run agrees with it, the search ends when the next size is not expected to fit, after
    :data:`TRUSTED_ATTEMPTS` sizes at the latest. Once one did not, it ends when the next size was run and does not fit.
    ``smallest``: the smallest size that can be trained.
    """
    if max_attempts < 1:
        raise UsageError(f"max_attempts is at least 1, not {max_attempts}")
    search = _Search(limits, policy, prediction, first, max_attempts, smallest, {}, prediction is not None)
    failure: Trial | None = None
    is_settled = False
    while len(search.tried) < max_attempts and failure is None and not is_settled:
        size = search.next_size()
        if not size or size in search.tried:
            is_settled = True
        else:
            trial = probe(size)
            search.record(trial, size)
            failure = None if trial.is_about_memory else trial
    batch_size = limits.largest_that_fits(search.tried)
    is_settled = is_settled or (failure is None and bool(batch_size) and search.is_next_size_known())
    trials = tuple(search.tried.values())
    if prediction is None:
        return Verification(batch_size, trials, is_settled, failure)
    refuted, factor = _compare(trials, prediction, limits)
    return Verification(batch_size, trials, is_settled, failure, first, refuted, factor)


def _compare(trials: Sequence[Trial], prediction: Prediction, limits: Limits) -> tuple[bool, float | None]:
    """Return (whether a size that was predicted to fit did not, used memory measured ÷ predicted)."""
    refuted = any(
        not limits.fits(trial)
        and trial.is_about_memory
        and prediction.expected(trial.batch_size) <= limits.limit_bytes
        and not is_as_expected(trial, prediction.expected(trial.batch_size), limits)
        for trial in trials
    )
    ran = [trial for trial in trials if trial.fits and trial.used_bytes]
    if not ran:
        return refuted, None
    largest = max(ran, key=lambda trial: trial.batch_size)
    return refuted, (largest.used_bytes or 0) / max(1, prediction.expected(largest.batch_size))


@dataclass
class _Search:
    """The sizes that were tried, and the choice of the next one.

    is_trusted: every run agreed with the prediction. is_surprised: the last size fits, and was not expected to.
    """

    limits: Limits
    policy: Policy
    prediction: Prediction | None
    first: int
    max_attempts: int
    smallest: int
    tried: dict[int, Trial]
    is_trusted: bool
    is_surprised: bool = False

    def record(self, trial: Trial, size: int) -> None:
        expected = corrected(self.tried, self.prediction, self.limits)(size)
        if self.prediction is not None:  # a device that runs full differs from one whose memory never runs out
            expected += self.prediction.expected(size) - self.prediction.unlimited(size)
        self.tried[size] = trial
        self.is_trusted = self.is_trusted and is_as_expected(trial, expected, self.limits)
        self.is_surprised = self.limits.fits(trial) and expected > self.limits.limit_bytes

    def next_size(self) -> int:
        """Return the size to run next, 0 if there is nothing left to learn."""
        calibration, attempt = self.policy.calibration, len(self.tried)
        if not self.tried:
            return self._first_size(max(self.first, self.smallest))
        if attempt == self.max_attempts - 1 and not self.limits.largest_that_fits(self.tried):
            return self.limits.allowed(self.smallest)  # an answer, if there is one at all
        if attempt < min(len(calibration), self.max_attempts - 1):
            return self._calibration_size(calibration[attempt]) or self._next_size()
        return self._next_size()

    def is_next_size_known(self) -> bool:
        """Return whether the size above the largest that fits was run, or does not exist."""
        following = self.limits.following(self.limits.largest_that_fits(self.tried))
        return following == 0 or following in self.tried

    def _first_size(self, size: int) -> int:
        prediction = self.prediction
        if self.policy.keeps_distance and prediction is not None:
            total = self.limits.total_bytes / (1 + TOLERANCE)
            size = largest_that(lambda n: prediction.fits_within(n, total), guess=size, limit=size)
        if self.policy.calibration:
            return self.limits.allowed(max(self.smallest, round(size * self.policy.calibration[0])))
        return self.limits.allowed(max(1, size))

    def _calibration_size(self, fraction: float) -> int:
        """Return the fraction of the size expected to fit, 0 unless it is larger than those that ran."""
        fits = self.limits.largest_that_fits(self.tried)
        if not fits:
            return 0
        expected = self._expectation().largest(fits, LARGEST_TRIED + 1)
        size = self.limits.allowed(round(fraction * min(expected, self._most(fits))))
        return size if size > fits else 0

    def _expectation(self) -> Expectation:
        used_bytes = corrected(self.tried, self.prediction, self.limits)
        return Expectation(self.tried, self.limits, self.policy, self.prediction, used_bytes)

    def _next_size(self) -> int:
        fits = self.limits.largest_that_fits(self.tried)
        too_large = min((size for size in self.tried if size > fits), default=LARGEST_TRIED + 1)
        following = self.limits.following(fits)
        is_last = next(reversed(self.tried)) == fits
        if not fits < following < too_large:
            return 0
        if is_last and self.is_trusted and len(self.tried) >= TRUSTED_ATTEMPTS:
            return 0
        gain = self.policy.smallest_gain if self.prediction is not None else 0.0
        worth = max(fits + 1, fits * (1 + gain))
        if self._needs_second_size(too_large):
            return self._bisected(fits, too_large)
        if self.is_trusted or len(self.tried) < self._corrected_attempts(too_large):
            expected = self._expectation().largest(fits, too_large)
            size = self.limits.allowed(min(expected, self._most(fits)))
            if size >= worth:
                return size
            is_refuted = expected == 0 and too_large <= LARGEST_TRIED
            if fits and not self.is_surprised and not is_refuted:
                return 0 if self.is_trusted else self._confirming_size(following, too_large, worth)
        size = self._bisected(fits, too_large)
        return size if size >= worth else following if following >= worth else 0

    def _most(self, fits: int) -> int:
        return LARGEST_TRIED if self.prediction is None else MOST_GROWTH * max(self.first, fits)

    def _needs_second_size(self, too_large: int) -> bool:
        """Return whether the prediction was refuted by an OOM and cannot be corrected: nothing ran, or one size did and
        only enough attempts are left to draw a line through two.
        """
        if self.is_trusted or self.prediction is None or not self._is_oom(too_large):
            return False
        ran = sum(trial.fits for trial in self.tried.values())
        return ran == 0 or (ran == 1 and self.max_attempts - len(self.tried) <= 2)

    def _confirming_size(self, following: int, too_large: int, worth: float) -> int:
        """Return the size above the largest that fits, or after an OOM the smallest that is worth a probe."""
        if following < worth and self._is_oom(too_large):
            following = self.limits.following(math.ceil(worth) - 1)
        return following if worth <= following < too_large else 0

    def _is_oom(self, size: int) -> bool:
        trial = self.tried.get(size)
        return trial is not None and not trial.has_whole_peak

    def _corrected_attempts(self, too_large: int) -> int:
        """Return the number of attempts up to which the prediction is corrected; more after an OOM."""
        if self._is_oom(too_large):
            return RECOVERY_ATTEMPTS
        return self.policy.corrected_attempts if self.prediction is not None else FREE.corrected_attempts

    def _bisected(self, fits: int, too_large: int) -> int:
        if too_large > LARGEST_TRIED:
            grown = self.limits.allowed(round(fits * GROWTH))
            return grown if grown > fits else self.limits.following(fits)
        if not fits:
            return after_nothing_fitted(self.tried, self.limits, self.smallest)
        return between(fits, too_large, self.tried, self.limits, self.max_attempts - len(self.tried))
