"""Find the largest batch size without a prediction, for any training code in any framework.

    find_largest_batch_size(run)  # run(32) trains a step with 32 samples, and raises if memory runs out

From ``start`` it grows by half while sizes fit, halves while they don't, then tries the middle between the largest that
fits and the smallest that does not. The last step up is cut to the limit.

An estimate that is too small:

>>> def train_on(largest):
...     def run(batch_size):
...         if batch_size > largest:
...             raise MemoryError(f"{batch_size} samples do not fit")
...     return run
>>> found = find_largest_batch_size(train_on(1000), start=19, limit=64, max_attempts=4)
>>> found.batch_size, [attempt.batch_size for attempt in found.attempts], found.bound
(63, [19, 28, 42, 63], 'attempts')

With one more attempt it reaches the limit:

>>> found = find_largest_batch_size(train_on(1000), start=19, limit=64)
>>> found.batch_size, found.bound
(64, 'limit')

An estimate that is too large:

>>> found = find_largest_batch_size(train_on(16), start=19, limit=64, max_attempts=4)
>>> found.batch_size, [attempt.batch_size for attempt in found.attempts]
(16, [19, 9, 14, 16])

An estimate that is right:

>>> found = find_largest_batch_size(train_on(24), start=19, limit=64, max_attempts=3)
>>> found.batch_size, [attempt.batch_size for attempt in found.attempts], found.is_settled
(23, [19, 28, 23], False)
"""

from __future__ import annotations

import gc
import importlib.util
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from ..errors import UsageError
from ..probing.oom import out_of_memory
from .verify import GROWTH


@dataclass(frozen=True)
class Attempt:
    """A batch size that was run. detail: the error's message if it did not fit."""

    batch_size: int
    fits: bool
    detail: str = ""


@dataclass(frozen=True)
class LargestBatchSize:
    """The largest batch size that was run and fits, 0 if none did.

    is_settled: no larger size up to the limit fits. bound: what kept it from being larger: "memory", the "limit" that
    was given (larger sizes may fit), or the number of "attempts" (larger sizes up to the limit may fit).
    """

    batch_size: int
    attempts: tuple[Attempt, ...]
    is_settled: bool
    bound: Literal["memory", "limit", "attempts"]


@dataclass
class _Bracket:
    """The largest size that fits, and the smallest that does not; no size is given twice."""

    size: int
    limit: int
    fits: int = 0

    def __post_init__(self) -> None:
        self.too_large = self.limit + 1

    @property
    def is_closed(self) -> bool:
        return self.too_large - self.fits <= 1

    def record(self, does_fit: bool) -> None:
        """Take in the result of ``size``, and choose the next one."""
        if does_fit:
            self.fits = self.size
        else:
            self.too_large = self.size
        if self.fits == 0:
            self.size = self.too_large // 2
        elif self.too_large > self.limit:
            self.size = min(self.limit, max(self.fits + 1, int(self.fits * GROWTH)))
        else:
            self.size = (self.fits + self.too_large) // 2


def find_largest_batch_size(
    run: Callable[[int], object], *, limit: int = 8192, start: int = 16, max_attempts: int | None = None
) -> LargestBatchSize:
    """Return the largest batch size up to ``limit`` for which ``run(batch_size)`` does not run out of memory.

    ``run`` trains at least one step, with the optimizer's; its return value is ignored. At most ``max_attempts`` sizes
    are run, by default as many as it takes. Errors other than out of memory propagate. Raises UsageError for invalid
    arguments.
    """
    _check_at_least_one(limit=limit, start=start, max_attempts=max_attempts)
    attempts: list[Attempt] = []
    bracket = _Bracket(min(start, limit), limit)
    while not bracket.is_closed and (max_attempts is None or len(attempts) < max_attempts):
        attempt = _attempt(run, bracket.size)
        attempts.append(attempt)
        bracket.record(attempt.fits)
    bound: Literal["memory", "limit", "attempts"] = "memory" if bracket.is_closed else "attempts"
    if bracket.fits == limit:
        bound = "limit"
    return LargestBatchSize(bracket.fits, tuple(attempts), bracket.is_closed, bound)


def _check_at_least_one(**numbers: int | None) -> None:
    for name, value in numbers.items():
        if value is None and name == "max_attempts":
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UsageError(f"{name} is invalid: {value!r}; it must be an integer of at least 1")


def _attempt(run: Callable[[int], object], batch_size: int) -> Attempt:
    detail: str | None = None
    try:
        run(batch_size)
    except Exception as error:
        found = out_of_memory(error)
        if found is None:
            raise
        detail = found.message
        for raised in _chain(error):  # their tracebacks hold the step's tensors
            raised.__traceback__ = None
    if detail is None:
        return Attempt(batch_size, True)
    _free_memory()
    return Attempt(batch_size, False, detail)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    pending = [error]
    while pending:
        raised = pending.pop()
        if raised is not None and id(raised) not in seen:
            seen.add(id(raised))
            yield raised
            pending += [raised.__cause__, raised.__context__]


def _free_memory() -> None:
    """Collect garbage and empty the device's cache. Neither imports torch nor initialises CUDA."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return
    if importlib.util.find_spec("accelerate") is None:
        torch.cuda.empty_cache()
        return
    from accelerate.utils.memory import clear_device_cache

    clear_device_cache(garbage_collection=True)
