"""A training that is started with smaller and smaller batch sizes until memory suffices, on every rank alike."""

from __future__ import annotations

import functools
import inspect
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

from ...errors import AgreementError, ReachedZeroError
from ...parallel.agreement import agree, collectives_begun, exchange, leave_word, report_failure
from ...records import Peak
from .next_size import Next, Shortage, next_size
from .oom_observer import Watch

PATIENT_SECONDS = 600.0
"""For ranks whose first forward pass takes longer than another's, as long as none of them has failed."""
logger = logging.getLogger(__name__)
Result = TypeVar("Result")


@dataclass(frozen=True)
class Attempt:
    """One size with which the training was started. peak: of the memory in it, where it is known: what PyTorch's
    allocator held on a CUDA card, what of the process was resident on a CPU. detail: why it failed, and what was made
    of it.
    """

    batch_size: int
    fits: bool
    peak: Peak | None
    detail: str = ""


@dataclass(frozen=True)
class SearchReport:
    """What was tried so far. batch_size: the size that the training runs with, or ran; 0 where none was left."""

    batch_size: int
    attempts: tuple[Attempt, ...]


class Executable(Generic[Result]):
    """A training that finds its batch size when it is called; see :func:`find_executable_batch_size`."""

    def __init__(
        self,
        function: Callable[..., Result],
        starting_batch_size: int,
        reduce_batch_size_fn: Callable[[], int] | None,
    ) -> None:
        functools.update_wrapper(self, function)
        self._function = function
        self._size = starting_batch_size
        self._reduce = reduce_batch_size_fn
        self._attempts: tuple[Attempt, ...] = ()
        self._doubts = 0
        self._watch: Watch | None = None

    @property
    def report(self) -> SearchReport:
        """Of the call that runs or ran last."""
        return SearchReport(self._size, self._attempts)

    def __call__(self, *args: Any, **kwargs: Any) -> Result:
        from accelerate.utils.memory import clear_device_cache

        clear_device_cache(garbage_collection=True)
        self._check(args)
        self._attempts = ()
        self._doubts = 0
        self._watch = None
        if self._size >= 1:
            self._size = agree(self._size).batch_size
        while self._size >= 1:
            ended = self._attempt(args, kwargs)
            if isinstance(ended, _Through):
                return ended.value
            clear_device_cache(garbage_collection=True)  # only here: an error that is being handled holds its tensors
            self._size = self._smaller(ended)
        raise ReachedZeroError("No executable batch size found, reached zero.")

    def _attempt(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Through[Result] | _Shortages | Shortage:
        self._watch = Watch(after=self._watch, at_end_of_forward=_meet_after_forward)
        ended: _Through[Result] | _Shortages | Shortage
        with self._watch as watch:
            try:
                ended = _Through(self._function(self._size, *args, **kwargs))
            except _OthersRanOutError as error:
                ended = error.shortages
            except Exception as error:
                shortage = watch.shortage(error, self._size)
                if shortage is None:
                    _tell_others(error)
                    raise
                ended = shortage
            self._attempts += (Attempt(self._size, isinstance(ended, _Through), watch.peak()),)
        if isinstance(ended, _Through):
            leave_word(json.dumps({"through": True}))
        return ended

    def _smaller(self, ended: Shortage | _Shortages) -> int:
        """The largest size that every rank that ran out of memory would try next."""
        size = self._size
        if isinstance(ended, _Shortages):
            agreed = ended.agreed(size)
            self._explain(f"another rank ran out of memory; {agreed} is tried next")
            return agreed
        if self._reduce is not None:
            following = Next(self._reduce(), "as reduce_batch_size_fn says")
        else:
            following = next_size(ended, len(self._attempts), self._doubts)
        self._doubts += following.is_doubted
        proposed = following.batch_size
        self._explain(f"{ended.message}; {proposed}: {following.reason}")
        agreed = _told_and_heard(size, proposed).agreed(size)
        if agreed < proposed:
            logger.warning("%d is tried next, as another rank can take no more", agreed)
        return agreed

    def _explain(self, detail: str) -> None:
        *before, last = self._attempts
        self._attempts = (*before, replace(last, detail=detail))
        logger.warning("%d sequences: %s", last.batch_size, detail)

    def _check(self, args: tuple[Any, ...]) -> None:
        """Raises TypeError where the batch size was given by the caller too."""
        parameters = inspect.signature(self._function).parameters
        if any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters.values()):
            return
        names = list(parameters)
        if len(names) < len(args) + 1:
            name = getattr(self._function, "__name__", "function")
            rest = ", ".join(f"{known}={value}" for known, value in zip(names[1:], args[1:], strict=False))
            raise TypeError(
                f"Batch size was passed into `{name}` as the first argument when called. The decorator does that: "
                f"remove it, as in `{name}({rest})`"
            )


@dataclass(frozen=True)
class _Through(Generic[Result]):
    value: Result


@dataclass(frozen=True)
class _Shortages:
    """What every rank said after an attempt, or at the end of its forward pass, by rank. A size to try "next" is from
    those that ran out of memory.
    """

    heard: tuple[dict[str, Any], ...]

    @property
    def sizes(self) -> list[int]:
        return [word["next"] for word in self.heard if "next" in word]

    def agreed(self, failed: int) -> int:
        """The size to go on with. Raises AgreementError where the ranks can't go on together."""
        size = min(self.sizes)
        through = tuple(rank for rank, word in enumerate(self.heard) if "through" in word)
        if through:
            reason = f"rank {through[0]} came through, and all ranks take the same size"
            raise AgreementError(f"{_instead(failed, size)}: {reason}", through)
        counts: dict[str, set[int]] = {}
        for word in self.heard:
            for group, count in word["collectives"].items():
                counts.setdefault(group, set()).add(count)
        if any(len(different) > 1 for different in counts.values()):
            reason = "the ranks did not stop in the same place: one has begun a collective that another has not"
            raise AgreementError(f"{_instead(failed, size)}: {reason}, and their group can't be used any more")
        return size


class _OthersRanOutError(RuntimeError):
    """Raised out of a training whose forward pass came through where another rank's did not."""

    def __init__(self, shortages: _Shortages) -> None:
        super().__init__("another rank ran out of memory in its forward pass")
        self.shortages = shortages


def _meet_after_forward() -> None:
    """Before the backward pass, whose collectives would wait for a rank that never gets there."""
    words = exchange(json.dumps({"collectives": collectives_begun()}), timeout_seconds=PATIENT_SECONDS)
    shortages = _Shortages(tuple(json.loads(word) for word in words))
    if shortages.sizes:
        raise _OthersRanOutError(shortages)


def _told_and_heard(failed: int, proposed: int) -> _Shortages:
    word = json.dumps({"next": proposed, "collectives": collectives_begun()})
    try:
        return _Shortages(tuple(json.loads(said) for said in exchange(word)))
    except AgreementError as error:
        message = f"{_instead(failed, proposed)}, since all ranks have to: {error}"
        raise AgreementError(message, error.ranks, error.told_by) from error


def _instead(failed: int, following: int) -> str:
    return f"{failed} sequences ran out of memory; start again with {following}" if following else "nothing fits"


def _tell_others(error: Exception) -> None:
    """Raises AgreementError where another rank had given up before, which may well be the cause."""
    if isinstance(error, AgreementError):  # all ranks have it
        return
    told = report_failure(error)
    if told is None:
        return
    from torch import distributed

    if told.told_by != distributed.get_rank():
        raise told from error
