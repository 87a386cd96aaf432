"""Restarts a training with smaller batch sizes until it fits in memory, with the same size on every rank."""

from __future__ import annotations

import functools
import inspect
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

from ...errors import AgreementError, ReachedZeroError
from ...parallel.agreement import agree, collectives_started, exchange, post_message, report_failure
from ...records import Peak
from .next_size import NextSize, OomFacts, next_size
from .oom_observer import OomObserver

PATIENT_SECONDS = 600.0
"""Timeout at the end of the first forward pass, which can take longer on one rank than on another."""
logger = logging.getLogger(__name__)
Result = TypeVar("Result")


@dataclass(frozen=True)
class Attempt:
    """One batch size that the training was started with.

    peak: peak memory of the attempt if known: bytes held by PyTorch's allocator on a CUDA device, resident bytes of the
    process on a CPU. detail: why it ran out of memory, and which size follows.
    """

    batch_size: int
    fits: bool
    peak: Peak | None
    detail: str = ""


@dataclass(frozen=True)
class SearchReport:
    """The attempts so far. batch_size: the size that the training runs or ran with; 0 if no size was left."""

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
        self._contradictions = 0
        self._observer: OomObserver | None = None

    @property
    def report(self) -> SearchReport:
        """The report of the current or most recent call."""
        return SearchReport(self._size, self._attempts)

    def __call__(self, *args: Any, **kwargs: Any) -> Result:
        from accelerate.utils.memory import clear_device_cache

        clear_device_cache(garbage_collection=True)
        self._check(args)
        self._attempts = ()
        self._contradictions = 0
        self._observer = None
        if self._size >= 1:
            self._size = agree(self._size).batch_size
        while self._size >= 1:
            ended = self._attempt(args, kwargs)
            if isinstance(ended, _Finished):
                return ended.value
            # not in the except block: there the error still holds its tensors
            clear_device_cache(garbage_collection=True)
            self._size = self._smaller(ended)
        raise ReachedZeroError("No executable batch size found, reached zero.")

    def _attempt(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Finished[Result] | _RankOutcomes | OomFacts:
        self._observer = OomObserver(after=self._observer, at_end_of_forward=_synchronize_after_forward)
        ended: _Finished[Result] | _RankOutcomes | OomFacts
        with self._observer as observer:
            try:
                ended = _Finished(self._function(self._size, *args, **kwargs))
            except _OtherRankOutOfMemoryError as error:
                ended = error.outcomes
            except Exception as error:
                facts = observer.oom_facts(error, self._size)
                if facts is None:
                    _report_to_other_ranks(error)
                    raise
                ended = facts
            self._attempts += (Attempt(self._size, isinstance(ended, _Finished), observer.peak()),)
        if isinstance(ended, _Finished):
            post_message(json.dumps({"finished": True}))
        return ended

    def _smaller(self, ended: OomFacts | _RankOutcomes) -> int:
        """Return the largest size that every rank that ran out of memory would try next."""
        size = self._size
        if isinstance(ended, _RankOutcomes):
            agreed = ended.agreed(size)
            self._explain(f"another rank ran out of memory; trying {agreed} next")
            return agreed
        if self._reduce is not None:
            following = NextSize(self._reduce(), "from reduce_batch_size_fn")
        else:
            following = next_size(ended, len(self._attempts), self._contradictions)
        self._contradictions += following.contradicts_estimate
        proposed = following.batch_size
        self._explain(f"{ended.message}; {proposed}: {following.reason}")
        agreed = _exchange_proposals(size, proposed).agreed(size)
        if agreed < proposed:
            logger.warning("trying %d next, the largest size for another rank", agreed)
        return agreed

    def _explain(self, detail: str) -> None:
        *before, last = self._attempts
        self._attempts = (*before, replace(last, detail=detail))
        logger.warning("%d sequences: %s", last.batch_size, detail)

    def _check(self, args: tuple[Any, ...]) -> None:
        """Raise TypeError if the caller passed the batch size too."""
        parameters = inspect.signature(self._function).parameters
        if any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters.values()):
            return
        names = list(parameters)
        if len(names) < len(args) + 1:
            name = getattr(self._function, "__name__", "function")
            rest = ", ".join(f"{known}={value}" for known, value in zip(names[1:], args[1:], strict=False))
            raise TypeError(
                f"Batch size was passed into `{name}` as the first argument when called. The decorator passes it: "
                f"remove it, as in `{name}({rest})`"
            )


@dataclass(frozen=True)
class _Finished(Generic[Result]):
    value: Result


@dataclass(frozen=True)
class _RankOutcomes:
    """The messages of all ranks, by rank, after an attempt or at the end of its forward pass.

    Ranks that ran out of memory propose the "next" size.
    """

    messages: tuple[dict[str, Any], ...]

    @property
    def sizes(self) -> list[int]:
        return [message["next"] for message in self.messages if "next" in message]

    def agreed(self, failed: int) -> int:
        """Return the size to continue with. Raise AgreementError if the ranks cannot continue together."""
        size = min(self.sizes)
        finished = tuple(rank for rank, message in enumerate(self.messages) if "finished" in message)
        if finished:
            reason = f"rank {finished[0]} finished, and all ranks must use the same size"
            raise AgreementError(f"{_restart_advice(failed, size)}: {reason}", finished)
        counts: dict[str, set[int]] = {}
        for message in self.messages:
            for group, count in message["collectives"].items():
                counts.setdefault(group, set()).add(count)
        if any(len(different) > 1 for different in counts.values()):
            reason = "the ranks did not stop at the same point: one has started a collective that another has not"
            raise AgreementError(
                f"{_restart_advice(failed, size)}: {reason}, so their process group is no longer usable"
            )
        return size


class _OtherRankOutOfMemoryError(RuntimeError):
    """Raised out of a training whose forward pass fits when another rank's does not."""

    def __init__(self, outcomes: _RankOutcomes) -> None:
        super().__init__("another rank ran out of memory in its forward pass")
        self.outcomes = outcomes


def _synchronize_after_forward() -> None:
    """Exchange outcomes before the backward pass, whose collectives would wait for a rank that never gets there."""
    messages = exchange(json.dumps({"collectives": collectives_started()}), timeout_seconds=PATIENT_SECONDS)
    outcomes = _RankOutcomes(tuple(json.loads(message) for message in messages))
    if outcomes.sizes:
        raise _OtherRankOutOfMemoryError(outcomes)


def _exchange_proposals(failed: int, proposed: int) -> _RankOutcomes:
    own = json.dumps({"next": proposed, "collectives": collectives_started()})
    try:
        return _RankOutcomes(tuple(json.loads(message) for message in exchange(own)))
    except AgreementError as error:
        message = f"{_restart_advice(failed, proposed)}, on all ranks: {error}"
        raise AgreementError(message, error.ranks, error.reported_by) from error


def _restart_advice(failed: int, following: int) -> str:
    return f"{failed} sequences ran out of memory; start again with {following}" if following else "nothing fits"


def _report_to_other_ranks(error: Exception) -> None:
    """Report the failure to the other ranks. Raise AgreementError if another rank failed first, the likely cause of
    this error.
    """
    if isinstance(error, AgreementError):  # every rank has it already
        return
    failure = report_failure(error)
    if failure is None:
        return
    from torch import distributed

    if failure.reported_by != distributed.get_rank():
        raise failure from error
