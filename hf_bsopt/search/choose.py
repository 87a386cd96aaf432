"""Which batch size to choose, given a probe that answers for any one size at no cost. Pure: imports no torch.

    decide(probe, total_bytes=gpu.total_bytes)  # probe(32) -> Trial, a prediction

The choice is the largest multiple of 8 at or under the upper end of the target; below 8, the largest size that is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from ..errors import NothingFitsError
from ..options import MAX_BATCH_SIZE, MULTIPLE_OF, TARGET, check_target
from ..records import Bound, Decision, Trial

Probe = Callable[[int], Trial]
Guess = Callable[[float], int]

SAFE_UTILIZATION = 0.70
"""The safe size uses at most this: memory is left for a desktop, a second notebook, an evaluation between steps."""
LARGEST_TRIED = 1 << 20


def _no_guess(fraction: float) -> int:
    return 1


def largest_that(holds: Callable[[int], bool], *, guess: int = 1, limit: int = LARGEST_TRIED) -> int:
    """Return the largest size from 1 to ``limit`` for which ``holds``, 0 if there is none.

    Gallops away from ``guess`` by doubling steps, then bisects: a good guess costs few calls. If ``holds`` is not
    monotone, the result is a size for which it holds while it does not for the next one.
    """
    guess = max(1, min(guess, limit))
    step = 1
    if holds(guess):
        good = guess
        while good < limit and holds(min(good + step, limit)):
            good, step = min(good + step, limit), step * 2
        if good == limit:
            return limit
        bad = min(good + step, limit)
    else:
        bad = guess
        while bad > 1 and not holds(max(bad - step, 1)):
            bad, step = max(bad - step, 1), step * 2
        if bad == 1:
            return 0
        good = max(bad - step, 1)
    while bad - good > 1:
        middle = (good + bad) // 2
        if holds(middle):
            good = middle
        else:
            bad = middle
    return good


def round_down(size: int, multiple_of: int) -> int:
    """Return the largest multiple at or under ``size``; below the first multiple, the size itself."""
    return size // multiple_of * multiple_of or size


def largest_under(
    probe: Probe,
    fraction: float,
    *,
    total_bytes: int,
    multiple_of: int = MULTIPLE_OF,
    limit: int = LARGEST_TRIED,
    guess: Guess = _no_guess,
) -> tuple[int, int]:
    """Return the largest size that uses at most ``fraction`` of the device, and the multiple under it to recommend.

    Both are 0 if not even one sequence fits.
    """

    def fits(size: int) -> bool:
        trial = probe(size)
        return trial.fits and (trial.used_bytes or 0) <= fraction * total_bytes

    ceiling = largest_that(fits, guess=guess(fraction), limit=limit)
    return ceiling, _step_down(fits, round_down(ceiling, multiple_of), multiple_of)


def decide(
    probe: Probe,
    *,
    total_bytes: int,
    target: tuple[float, float] = TARGET,
    multiple_of: int = MULTIPLE_OF,
    limit: int | None = None,
    limit_bound: Bound = "limit",
    guess: Guess = _no_guess,
) -> Decision:
    """Choose the size to train with, and find the largest that fits at all and a safe one.

    ``total_bytes`` is the memory of the whole device: ``target`` is a fraction of it, and each Trial's ``used_bytes``
    counts against it. ``limit`` is the largest size that is wanted, :data:`~hf_bsopt.options.MAX_BATCH_SIZE` if None;
    ``guess(fraction)`` is about the number of sequences that fill this fraction of the device. Raises NothingFitsError
    if not even one sequence stays under the target.
    """
    check_target(target)
    probe = functools.cache(probe)
    if limit is None:
        limit, limit_bound = MAX_BATCH_SIZE, "default maximum"
    under = functools.partial(largest_under, probe, total_bytes=total_bytes, multiple_of=multiple_of, guess=guess)
    ceiling, size = under(target[1], limit=limit)
    if ceiling == 0:
        raise NothingFitsError("not even one sequence stays under the target")
    _, safe = under(min(SAFE_UTILIZATION, target[1]), limit=size)
    largest = largest_that(lambda n: probe(n).fits, guess=max(guess(1.0), ceiling))
    is_limited = ceiling == limit
    return Decision(
        batch_size=size,
        bound=limit_bound if is_limited else "memory",
        utilization=(probe(size).used_bytes or 0) / total_bytes,
        largest=largest,
        safe=safe or 1,
        limit=limit if is_limited else None,
    )


def _step_down(fits: Callable[[int], bool], size: int, multiple_of: int) -> int:
    """Return the next recommended size that fits: a cache of freed segments can make a smaller size need more."""
    while size > 1 and not fits(size):
        size = size - multiple_of if size > multiple_of else size - 1
    return size
