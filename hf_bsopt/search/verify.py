"""Which few sizes to run, so that the answer is proved. Pure: imports no torch.

    prove(probe, 48, limit_bytes=..., allowed=...)  # a prediction is there: probe(48) -> Trial, a real step
    grow(probe, 16)                                 # nothing is known but whether a size works

The size in the answer was itself run, whatever happens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from ..errors import UsageError
from ..options import MAX_ATTEMPTS
from ..records import Trial
from .choose import LARGEST_TRIED, Probe, largest_that

TRUSTED_ATTEMPTS = 3
"""Sizes that are run at most where what was believed came true each time."""
BELIEVED_ATTEMPTS = 4
"""Where belief came to nothing in so many, the interval is simply halved; after MAX_ATTEMPTS where that is dear."""
TRUST = 0.05
"""Of the device's memory: a prediction that is off by no more is corrected by what ran, and not doubted."""
DOUBT_OF_ONE, DOUBT_OF_A_LINE = 0.06, 0.03
"""Of the memory between a size that ran and one that is believed: kept free where another probe, or an out-of-memory
error, costs something. From two sizes on the error of the prediction is a line."""
GROWTH = 1.5
NOISE = 0.002
"""Of the device: what the same size may use more from one run to the next."""
WORTH = 0.015
"""A size that is larger by less than this is not worth another probe, where probes cost something."""
WITHIN = 0.02
"""Of the best throughput: less is not worth the memory, nor is it told apart from chance."""
CURVE = (1.0, 0.75, 0.5, 0.25, 0.125)

Allowed = Callable[[int], int]
Belief = Callable[[int], float]


@dataclass(frozen=True)
class Verification:
    """What real steps showed.

    batch_size: the largest that was run and held, 0 if none did. is_settled: nothing larger is believed to hold,
    otherwise the attempts ran out. failure: a probe that did not even end in out of memory.
    """

    batch_size: int
    trials: tuple[Trial, ...]
    is_settled: bool
    failure: Trial | None = None
    prediction_error: float | None = None


class Prediction(Protocol):
    """What is believed of a micro-batch before anything has run; in bytes of the device."""

    def expected(self, batch_size: int) -> int:
        """Used on this device, where a full one makes the allocator give its cache back."""
        ...

    def unlimited(self, batch_size: int) -> int:
        """Used on one that is never full."""
        ...

    def fits_within(self, batch_size: int, total_bytes: float) -> bool:
        """Would it still run if there were so much of the device?"""
        ...


@dataclass(frozen=True)
class Limits:
    """What a size must keep to. A size holds when it ran within ``limit_bytes`` of the device's ``total_bytes``; where
    they are the same, when it ran.

    allowed(n): the largest size that may be recommended at or under n, 0 if there is none; never falls as n grows.
    is_cautious: probes and out-of-memory errors cost something here: sizes stay away from where one is possible.
    """

    limit_bytes: float
    total_bytes: float
    allowed: Allowed
    is_cautious: bool = False

    @property
    def is_whole(self) -> bool:
        """Whether all of the device may be used, so that a size holds if it runs at all."""
        return self.limit_bytes >= self.total_bytes

    def hold(self, trial: Trial) -> bool:
        return trial.fits and (self.is_whole or (trial.used_bytes or 0) <= self.limit_bytes)

    def largest_held(self, tried: Mapping[int, Trial]) -> int:
        return max((size for size, trial in tried.items() if self.hold(trial)), default=0)

    def following(self, size: int) -> int:
        """The smallest size above it that may be recommended, 0 if there is none."""
        last = largest_that(lambda n: self.allowed(n) <= size, guess=max(1, size))
        return self.allowed(last + 1) if last < LARGEST_TRIED else 0


def verify(
    probe: Probe,
    first: int,
    *,
    limits: Limits,
    prediction: Prediction | None = None,
    calibration: Sequence[float] = (),
    max_attempts: int = MAX_ATTEMPTS,
    smallest: int = 1,
) -> Verification:
    """Runs ``first``, then whatever the answers require, at most ``max_attempts`` sizes.

    ``prediction``, where there is one, is corrected by every size that ran; where there is none, a
    line through those that ran takes its place. While what ran was what was believed (:data:`TRUST`), the search ends
    where the next size is believed not to hold, after :data:`TRUSTED_ATTEMPTS` sizes at the latest. Once it was
    not, it ends where the next size was run and did not hold. ``calibration``: shares of the size that is believed to
    hold, run before it, where small sizes are cheaper and the prediction knows the device less well. ``smallest``: that
    can be trained.
    """
    if max_attempts < 1:
        raise UsageError(f"max_attempts is at least 1, not {max_attempts}")
    tried: dict[int, Trial] = {}
    is_trusted, is_surprised = prediction is not None, False
    while len(tried) < max_attempts:
        belief = _corrected(tried, prediction, limits)
        if not tried:
            share = calibration[0] if calibration else None
            size = _first_size(max(first, smallest), limits, prediction, share, smallest)
        elif len(tried) == max_attempts - 1 and not limits.largest_held(tried):
            size = limits.allowed(smallest)  # an answer, if there is one at all
        else:
            share = calibration[len(tried)] if len(tried) < min(len(calibration), max_attempts - 1) else 0
            size = _calibrating(tried, limits, belief, prediction, share)
            size = size or _next_size(tried, limits, belief, prediction, is_trusted, is_surprised)
        if not size or size in tried:
            return Verification(limits.largest_held(tried), tuple(tried.values()), True)
        foretold = belief(size)
        if prediction is not None:  # what is believed of a device without a limit, and how a full one differs from it
            foretold += prediction.expected(size) - prediction.unlimited(size)
        trial = tried[size] = probe(size)
        if not trial.is_about_memory:
            return Verification(limits.largest_held(tried), tuple(tried.values()), False, trial)
        is_trusted = is_trusted and _came_true(trial, foretold, limits)
        is_surprised = limits.hold(trial) and foretold > limits.limit_bytes
    good = limits.largest_held(tried)
    return Verification(good, tuple(tried.values()), bool(good) and not _open_above(tried, limits))


def _first_size(first: int, limits: Limits, prediction: Prediction | None, share: float | None, smallest: int) -> int:
    """``share``: of it, that is run in its place."""
    size = max(1, first)
    if limits.is_cautious and prediction is not None:
        room = limits.total_bytes / (1 + TRUST)
        size = largest_that(lambda n: prediction.fits_within(n, room), guess=size, limit=size)
    return limits.allowed(max(1, size) if share is None else max(smallest, round(size * share)))


def _calibrating(
    tried: Mapping[int, Trial], limits: Limits, belief: Belief, prediction: Prediction | None, share: float
) -> int:
    """So large a share of what is believed to hold, 0 where that is no larger size than those that ran."""
    good = limits.largest_held(tried)
    if not share or not good:
        return 0
    size = limits.allowed(round(share * _believed(tried, limits, belief, prediction, good, LARGEST_TRIED + 1)))
    return size if size > good else 0


def _came_true(trial: Trial, foretold: float, limits: Limits) -> bool:
    """An out-of-memory error says only that more than the whole device was needed."""
    if not trial.fits:
        return foretold > limits.total_bytes * (1 - TRUST)
    return abs((trial.used_bytes or 0) - foretold) <= TRUST * limits.total_bytes


def _next_size(
    tried: Mapping[int, Trial],
    limits: Limits,
    belief: Belief,
    prediction: Prediction | None,
    is_trusted: bool,
    is_surprised: bool,
) -> int:
    """The size to run next, 0 when nothing is left to learn. ``is_surprised``: the last one held against belief."""
    good = limits.largest_held(tried)
    bad = min((size for size in tried if size > good), default=LARGEST_TRIED + 1)
    following = limits.following(good)
    last = next(reversed(tried), 0)
    if not good < following < bad or (last == good and is_trusted and len(tried) >= TRUSTED_ATTEMPTS):
        return 0
    is_dear = limits.is_cautious and prediction is not None
    worth = max(good + 1, good * (1 + WORTH)) if is_dear else good + 1
    if is_trusted or len(tried) < (MAX_ATTEMPTS if is_dear else BELIEVED_ATTEMPTS):
        size = limits.allowed(_believed(tried, limits, belief, prediction, good, bad))
        if size >= worth:
            return size
        if good and not is_surprised:
            return following if following >= worth and not is_trusted else 0
    middle = limits.allowed((good + bad) // 2 if bad <= LARGEST_TRIED else round(good * GROWTH))
    size = middle if good < middle < bad else following
    return size if size >= worth else 0


def _believed(
    tried: Mapping[int, Trial], limits: Limits, belief: Belief, prediction: Prediction | None, good: int, bad: int
) -> int:
    """The largest size between good and bad that is believed to hold; 0 where belief was already wrong there. Where the
    size that is bad ran, and used more than was believed, belief is moved by that much.
    """
    ran = [size for size, trial in tried.items() if trial.fits]
    above = tried.get(bad)
    too_little = 0.0
    if above is not None and above.fits and above.used_bytes:
        too_little = max(0.0, above.used_bytes - belief(bad)) + (
            NOISE * limits.total_bytes if limits.is_cautious else 0
        )
    doubt = 0.0 if not limits.is_cautious else DOUBT_OF_ONE if len(ran) < 2 else DOUBT_OF_A_LINE

    def holds(size: int) -> bool:
        used = belief(size) + too_little
        doubtful = doubt * min((abs(belief(size) - belief(other)) for other in ran), default=used)
        if prediction is not None and limits.is_whole:
            return prediction.fits_within(size, limits.total_bytes - (used - prediction.unlimited(size)) - doubtful)
        return used + doubtful <= limits.limit_bytes

    if bad <= LARGEST_TRIED and holds(bad):
        return 0
    return largest_that(holds, guess=good or bad - 1, limit=bad - 1)


def _corrected(tried: Mapping[int, Trial], prediction: Prediction | None, limits: Limits) -> Belief:
    """The prediction, moved by what it was off at the sizes that ran: by a line, from two of them on. One that is
    off by much is believed to be off everywhere in proportion; without one, memory is in proportion to the size.
    """
    ran = sorted(size for size, trial in tried.items() if trial.fits)
    used = {size: float(tried[size].used_bytes or 0) for size in ran}
    predicted = prediction.unlimited if prediction is not None else (lambda size: 0)
    if not ran:
        return predicted
    low, high = ran[0], ran[-1]
    expected = prediction.expected if prediction is not None else predicted
    off = {size: used[size] - expected(size) for size in ran}
    if low < high:
        each = (off[high] - off[low]) / (high - low)
        return lambda size: predicted(size) + off[high] + each * (size - high)
    if prediction is None:
        return lambda size: used[high] / high * size
    if abs(off[high]) <= TRUST * limits.total_bytes:
        return lambda size: predicted(size) + off[high]
    return lambda size: predicted(size) * used[high] / max(1, expected(high))


def _open_above(tried: Mapping[int, Trial], limits: Limits) -> bool:
    """Is there a size above the largest that held which was not run?"""
    following = limits.following(limits.largest_held(tried))
    return following != 0 and following not in tried


def grow(probe: Probe, first: int, *, limit: int = LARGEST_TRIED, max_attempts: int | None = None) -> Verification:
    """The largest size that works, for a probe of which nothing is known: no prediction, no bytes.

    From ``first`` half as much again while sizes work, half while they don't, then the middle between the largest
    that worked and the smallest that did not. It ends when these are neighbours, when ``limit`` itself worked, or
    after ``max_attempts`` sizes. Source: the algorithm of seeds/000, with the last step up cut to the limit.
    """
    if first < 1 or limit < 1 or (max_attempts is not None and max_attempts < 1):
        raise UsageError("first, limit and max_attempts are at least 1")
    tried: dict[int, Trial] = {}
    good, bad, size = 0, limit + 1, min(first, limit)
    while bad - good > 1 and (max_attempts is None or len(tried) < max_attempts):
        trial = tried[size] = probe(size)
        if not trial.is_about_memory:
            return Verification(good, tuple(tried.values()), False, trial)
        if trial.fits:
            good = size
        else:
            bad = size
        if good == 0:
            size = bad // 2
        elif bad > limit:
            size = min(limit, max(good + 1, int(good * GROWTH)))
        else:
            size = (good + bad) // 2
    return Verification(good, tuple(tried.values()), bad - good <= 1)


def curve_sizes(largest: int, allowed: Allowed) -> tuple[int, ...]:
    """At most five sizes up to ``largest``, from large to small, at which to measure throughput."""
    sizes = {allowed(max(1, round(largest * share))) for share in CURVE}
    return tuple(sorted((size for size in sizes if size), reverse=True))


def plateau(trials: Sequence[Trial]) -> Trial | None:
    """The smallest size within :data:`WITHIN` of the best samples per second; None where no time was measured."""
    timed = [trial for trial in trials if trial.fits and trial.samples_per_second]
    if not timed:
        return None
    best = max(trial.samples_per_second or 0 for trial in timed)
    return min(
        (trial for trial in timed if (trial.samples_per_second or 0) >= (1 - WITHIN) * best),
        key=lambda trial: trial.batch_size,
    )
