"""Which batch size to choose, given a probe that answers for any one size at no cost. Pure: imports no torch.

    decide(probe, total_bytes=gpu.total_bytes)  # probe(32) -> Trial, a prediction

The choice is the largest multiple of 8 at or under the upper end of the target; below 8, the largest size that is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from ..errors import NothingFitsError, UsageError
from ..records import Bound, Decision, Trial

Probe = Callable[[int], Trial]
Guess = Callable[[float], int]

TARGET = (0.80, 0.90)
MULTIPLE_OF = 8
SAFE_UTILIZATION = 0.70
"""The safe fallback stays at or under it: room for a desktop, a second notebook, an evaluation between steps."""
LARGEST_TRIED = 1 << 20


def _no_idea(share: float) -> int:
    return 1


def check_target(target: tuple[float, float]) -> None:
    """Raises UsageError unless 0 <= lower end <= upper end <= 1."""
    low, high = target
    if not 0 <= low <= 1 or not 0 < high <= 1:
        raise UsageError(f"the target is two shares of the memory between 0 and 1, such as 0.8 0.9, not {low} {high}")
    if low > high:
        raise UsageError(f"the ends of the target are swapped: {low} {high}; did you mean {high} {low}?")


def largest_that(holds: Callable[[int], bool], *, guess: int = 1, limit: int = LARGEST_TRIED) -> int:
    """The largest size from 1 to ``limit`` for which ``holds``, 0 if there is none.

    Gallops away from ``guess`` by doubling steps, then bisects: a good guess costs few questions. Where ``holds`` is
    not monotone, a size that holds and whose successor does not.
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
    """The largest multiple at or under ``size``; below the first multiple, the size itself."""
    return size // multiple_of * multiple_of or size


def largest_under(
    probe: Probe,
    share: float,
    *,
    total_bytes: int,
    multiple_of: int = MULTIPLE_OF,
    limit: int = LARGEST_TRIED,
    guess: Guess = _no_idea,
) -> tuple[int, int]:
    """(the largest size that uses at most ``share`` of the device, the multiple at or under it to recommend).

    Both 0 where not even one sequence does.
    """

    def holds(size: int) -> bool:
        trial = probe(size)
        return trial.fits and (trial.used_bytes or 0) <= share * total_bytes

    ceiling = largest_that(holds, guess=guess(share), limit=limit)
    return ceiling, _step_down(holds, round_down(ceiling, multiple_of), multiple_of)


def decide(
    probe: Probe,
    *,
    total_bytes: int,
    target: tuple[float, float] = TARGET,
    multiple_of: int = MULTIPLE_OF,
    limit: int | None = None,
    limit_bound: Bound = "limit",
    limit_told: str = "",
    guess: Guess = _no_idea,
) -> Decision:
    """The size to train with, the largest that runs at all, and a safe one.

    ``total_bytes`` is the device's whole memory, of which ``target`` is a share and which each Trial's ``used_bytes``
    counts against. ``limit`` is the largest size wanted, ``limit_told`` what it is in words; ``guess(share)``
    says about how many sequences fill a share of the device. Raises NothingFitsError if not even one sequence stays
    under the target.
    """
    check_target(target)
    if multiple_of < 1:
        raise UsageError(f"multiple_of is at least 1, not {multiple_of}")
    if limit is not None and limit < 1:
        raise UsageError(f"the batch size's upper limit is at least 1, not {limit}")
    probe = functools.cache(probe)
    upper = limit or LARGEST_TRIED
    under = functools.partial(largest_under, probe, total_bytes=total_bytes, multiple_of=multiple_of, guess=guess)
    ceiling, size = under(target[1], limit=upper)
    if ceiling == 0:
        raise NothingFitsError("not even one sequence stays under the target")
    _, safe = under(min(SAFE_UTILIZATION, target[1]), limit=size)
    largest = largest_that(lambda n: probe(n).fits, guess=max(guess(1.0), ceiling))
    utilization = (probe(size).used_bytes or 0) / total_bytes
    if ceiling == limit:
        within = f"largest multiple of {multiple_of} within" if size < limit else "at"
        reason, bound = f"{within} {limit_told or f'the {limit_bound} of {limit}'}", limit_bound
    else:
        reason, bound = _reason(size, ceiling, target[1], multiple_of)
    reason = f"{size}: {reason} {shown_share(utilization)}"
    return Decision(size, reason, bound, largest, safe or round_down(1, multiple_of))


def shown_share(share: float) -> str:
    """As a reason ends with it: (79 %)."""
    return f"({share * 100:.0f} %)"


def _step_down(holds: Callable[[int], bool], size: int, multiple_of: int) -> int:
    """A cache of freed segments can make a smaller size need more: the size that is recommended must itself hold."""
    while size > 1 and not holds(size):
        size = size - multiple_of if size > multiple_of else size - 1
    return size


def _reason(size: int, ceiling: int, high: float, multiple_of: int) -> tuple[str, Bound]:
    if ceiling == LARGEST_TRIED:
        return "no larger size is tried", "limit"
    if size % multiple_of == 0 and multiple_of > 1:
        what = f"largest multiple of {multiple_of}"
    else:
        what = "largest size" if multiple_of == 1 else f"largest size, since no multiple of {multiple_of} is"
    return f"{what} under {high * 100:.0f} %", "memory"
