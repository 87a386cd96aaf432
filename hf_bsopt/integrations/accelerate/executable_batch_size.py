"""Restarts a training with smaller batch sizes until it fits in memory, with the same size on every rank."""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

from ...errors import AgreementError, ReachedZeroError
from ...parallel.agreement import (
    TIMEOUT_SECONDS,
    agree,
    exchange,
    failures_logged,
    failures_reported,
    post_message,
    report_failure,
)
from ...parallel.collectives import collectives_started
from ...records import Peak
from .next_size import NextSize, OomFacts, next_size
from .oom_observer import OomObserver

PATIENT_SECONDS = 600.0
"""Timeout at the end of the first forward pass, which can take longer on one rank than on another."""
KEPT_AS = "_hf_bsopt_{}"
"""Attribute of an instance that has the state of a decorated method."""
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
        self._start = self._size = starting_batch_size
        self._name = getattr(function, "__name__", "")
        self._owner: tuple[Any, str] | None = None
        self._reduce = reduce_batch_size_fn
        self._attempts: tuple[Attempt, ...] = ()
        self._contradictions = 0
        self._observer: OomObserver | None = None

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, instance: Any, owner: type | None = None) -> Executable[Result]:
        """Return the method of ``instance``, with sizes of its own. The size comes after ``self``, or before it where
        the method is declared so: accelerate passes it first.
        """
        if instance is None:
            return self
        kept = getattr(instance, "__dict__", {})  # an instance without one begins anew each time
        bound: Executable[Result] | None = kept.get(KEPT_AS.format(self._name))
        if bound is None or bound._owner is None or bound._owner[0] is not instance:  # that of one it was copied from
            bound = Executable(_bound(self._function, instance), self._start, self._reduce)
            bound._owner = (instance, self._name)
            kept[KEPT_AS.format(self._name)] = bound
        return bound

    def __reduce__(self) -> str | tuple[Any, ...]:
        """Pickle by name, as functions are."""
        return self.__qualname__ if self._owner is None else (getattr, self._owner)

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
            with failures_reported():
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
        self._observer = OomObserver(after=self._observer, at_end_of_forward=self._synchronize_after_forward)
        ended: _Finished[Result] | _RankOutcomes | OomFacts
        with self._observer as observer, failures_logged(self._explain_stop):
            try:
                ended = _Finished(self._function(self._size, *args, **kwargs))
            except _OtherRankOutOfMemoryError as error:
                ended = error.outcomes
            except AgreementError:  # every rank has it already
                raise
            except Exception as error:
                facts = observer.oom_facts(error, self._size)
                if facts is None:
                    self._raise_first_failure(error)
                    raise
                ended = facts
            except BaseException as error:  # Ctrl-C and sys.exit too: the other ranks would wait
                report_failure(error)
                raise
            self._attempts += (Attempt(self._size, isinstance(ended, _Finished), observer.peak()),)
        if isinstance(ended, _Finished):
            with contextlib.suppress(AgreementError):  # nothing depends on it if the other ranks are gone
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
        agreed = self._exchange({"next": proposed, "cause": ended.message}).agreed(size)
        if agreed < proposed:
            logger.warning("trying %d next, the largest size for another rank", agreed)
        return agreed

    def _synchronize_after_forward(self) -> None:
        """Exchange outcomes before the backward pass, whose collectives would wait for a rank that never gets there."""
        outcomes = self._exchange({}, PATIENT_SECONDS)
        if outcomes.sizes:
            raise _OtherRankOutOfMemoryError(outcomes)

    def _exchange(self, outcome: dict[str, Any], timeout_seconds: float = TIMEOUT_SECONDS) -> _RankOutcomes:
        own = json.dumps({**outcome, "collectives": collectives_started()})
        try:
            return _RankOutcomes(tuple(map(json.loads, exchange(own, timeout_seconds=timeout_seconds))))
        except AgreementError as error:
            raise error.explained(self._explain_stop(error)) from error

    def _raise_first_failure(self, error: Exception) -> None:
        """Report the failure to the other ranks. Raise AgreementError if another rank failed first, the likely cause of
        this error.
        """
        failure = report_failure(error)
        if failure is None:
            return
        from torch import distributed

        own = distributed.get_rank()
        if (failure.reported_by, failure.ranks) != (own, (own,)):
            raise failure.explained(self._explain_stop(failure)) from error

    def _explain_stop(self, error: AgreementError) -> str:
        """Return the message of the error with what is known of the cause, and the size to start again with."""
        sent = {rank: json.loads(message) for rank, message in error.messages.items()}
        full = {rank: message for rank, message in sent.items() if "next" in message}
        if not full:
            return f"start again with {self._size}, on all ranks: {error}"
        rank = min(full, key=lambda rank: full[rank]["next"])
        advice = _restart_advice(self._size, full[rank]["next"], rank, full[rank]["cause"])
        return f"{advice}, on all ranks: {error}"

    def _explain(self, detail: str) -> None:
        *before, last = self._attempts
        self._attempts = (*before, replace(last, detail=detail))
        logger.warning("%d sequences: %s", last.batch_size, detail)

    def _check(self, args: tuple[Any, ...]) -> None:
        """Raise TypeError if the caller passed the batch size too."""
        parameters = inspect.signature(self._function).parameters
        if any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters.values()):
            return
        names = [name for name, parameter in parameters.items() if parameter.kind is not parameter.KEYWORD_ONLY]
        if len(names) < len(args) + 1:
            name = getattr(self._function, "__name__", "function")
            rest = ", ".join(f"{known}={value}" for known, value in zip(names[1:], args[1:], strict=False))
            raise TypeError(
                f"Batch size was passed into `{name}` as the first argument when called. The decorator passes it: "
                f"remove it, as in `{name}({rest})`"
            )


def _bound(function: Callable[..., Result], instance: Any) -> Callable[..., Result]:
    """Return a method as a function whose first argument is the batch size."""
    signature = inspect.signature(function)
    names = list(signature.parameters)
    is_self_first = names[:1] in (["self"], ["cls"])
    others = [signature.parameters[name] for name in (names[1:] if is_self_first else names[:1] + names[2:])]

    def method(batch_size: int, *args: Any, **kwargs: Any) -> Result:
        first = (instance, batch_size) if is_self_first else (batch_size, instance)
        return function(*first, *args, **kwargs)

    functools.update_wrapper(method, function)
    method.__signature__ = signature.replace(parameters=others)  # type: ignore[attr-defined]
    return method


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
        limiting = next(rank for rank, message in enumerate(self.messages) if message.get("next") == size)
        advice = _restart_advice(failed, size, limiting, self.messages[limiting]["cause"])
        finished = tuple(rank for rank, message in enumerate(self.messages) if "finished" in message)
        if finished:
            reason = f"rank {finished[0]} finished, and all ranks must use the same size"
            raise AgreementError(f"{advice}: {reason}", finished)
        counts: dict[str, set[int]] = {}
        for message in self.messages:
            for group, count in message["collectives"].items():
                counts.setdefault(group, set()).add(count)
        if any(len(different) > 1 for different in counts.values()):
            reason = "the ranks did not stop at the same point: one has started a collective that another has not"
            raise AgreementError(f"{advice}: {reason}, so their process group is no longer usable")
        return size


class _OtherRankOutOfMemoryError(RuntimeError):
    """Raised out of a training whose forward pass fits when another rank's does not."""

    def __init__(self, outcomes: _RankOutcomes) -> None:
        super().__init__("another rank ran out of memory in its forward pass")
        self.outcomes = outcomes


def _restart_advice(failed: int, following: int, rank: int, cause: str) -> str:
    where = f"{failed} sequences ran out of memory on rank {rank} ({cause})"
    return f"{where}; start again with {following}" if following else f"{where}; nothing fits"
