"""One answer for all processes of a distributed run, or a clear error in each of them; never a hang.

    agree(48)  # Agreement(batch_size=32, sizes=(48, 32)): rank 1 takes no more than 32

The ranks meet in the key-value store through which they found each other (``init_process_group``), and not in a
collective: a collective that one rank never joins leaves the group unusable behind it, and NCCL's runs on a card that
may just have run out of memory. The store is on the host and its waits have a timeout each. Every call is a round of
its own, counted by each process, so that all ranks call in the same order. What comes of a round is decided once, by
the first who writes it (``compare_set``), so that no two ranks leave it with different answers.
"""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from ..errors import AgreementError, UsageError

if TYPE_CHECKING:
    from torch.distributed import Store

TIMEOUT_SECONDS = 20.0
"""Of ranks that work in step. A rank that fails is told of at once, whatever the timeout."""
LINGER_SECONDS = 2.0
"""Rank 0 stays so long, where the others have not read the outcome: its end may be the end of the store."""
LONGEST_REASON = 400
_rounds = itertools.count()


@dataclass(frozen=True)
class Agreement:
    """batch_size: what every rank takes, the smallest of ``sizes``. sizes: what each rank can take, by rank."""

    batch_size: int
    sizes: tuple[int, ...]

    @property
    def rank(self) -> int:
        """The first one that can take no more."""
        return self.sizes.index(self.batch_size)


def agree(size: int, *, timeout_seconds: float = TIMEOUT_SECONDS) -> Agreement:
    """The largest size that every rank can take, given the one that this rank can. Outside a distributed run, that.

    Called by every rank. Raises AgreementError, on every rank, where one failed (:func:`report_failure`) or did not
    come within ``timeout_seconds`` of another; UsageError, on every rank too, for a size under 1.
    """
    sizes = tuple(int(word) for word in exchange(str(size), timeout_seconds=timeout_seconds))
    if min(sizes) < 1:
        raise UsageError(f"a batch size is at least 1, not {min(sizes)}, as rank {sizes.index(min(sizes))} has it")
    return Agreement(min(sizes), sizes)


def exchange(word: str, *, timeout_seconds: float = TIMEOUT_SECONDS) -> tuple[str, ...]:
    """What every rank says, by rank. Outside a distributed run, only this one's word.

    Called by every rank. Raises AgreementError as :func:`agree` does.
    """
    meeting = _next_meeting()
    if meeting is None:
        return (word,)
    try:
        meeting.say(word)
        return meeting.outcome(timeout_seconds)
    except RuntimeError as error:
        raise _unreachable(error) from error


def leave_word(word: str) -> None:
    """This rank's part in a round for which it does not wait: others learn that it was through."""
    meeting = _next_meeting()
    if meeting is None:
        return
    try:
        meeting.say(word)
    except RuntimeError as error:
        raise _unreachable(error) from error


def report_failure(error: BaseException) -> AgreementError | None:
    """This rank's part in a round in which it has nothing to say but that it failed.

    What all ranks raise now: that it did, or what another one told before, which may well be the cause. None outside
    a distributed run.
    """
    meeting = _next_meeting()
    if meeting is None:
        return None
    try:
        return meeting.fail(f"rank {meeting.rank} failed: {_in_short(error)}", (meeting.rank,))
    except RuntimeError as unreachable:
        return _unreachable(unreachable)


def collectives_begun() -> dict[str, int]:
    """How many collectives this rank has begun, by group. Where two ranks have begun a different number, one of them
    waits for the other, or will: nothing further can be done in that group.
    """
    if not _is_distributed():
        return {}
    from torch.distributed import distributed_c10d

    groups = distributed_c10d._world.pg_names  # of which this rank is a member; there is no public list
    return {str(name): int(group._get_sequence_number_for_group()) for group, name in groups.items()}


@dataclass(frozen=True)
class _Meeting:
    """One round in the store."""

    store: Store
    number: int
    rank: int
    size: int

    def say(self, word: str) -> None:
        """The last one to speak closes the round."""
        self.store.set(self._of(self.rank), word)
        if self.store.add(self._key("count"), 1) == self.size:
            self._decide({"words": self._words()})

    def fail(self, reason: str, ranks: Sequence[int]) -> AgreementError:
        """What was told first, this or another rank's failure. Not once every rank has spoken."""
        decided = self._decide({"failure": reason, "ranks": list(ranks), "by": self.rank})
        self._leave()
        return _failure(decided)

    def outcome(self, timeout_seconds: float) -> tuple[str, ...]:
        try:
            self.store.wait([self._key("outcome")], timedelta(seconds=timeout_seconds))
        except RuntimeError:  # each kind of store has its own for a wait that was too long
            self._close(timeout_seconds)
        decided = json.loads(self.store.get(self._key("outcome")))
        self._leave()
        if "words" not in decided:
            raise _failure(decided)
        return tuple(decided["words"])

    def _close(self, timeout_seconds: float) -> None:
        """Nobody decided in time: whoever is missing is the reason."""
        missing = [rank for rank in range(self.size) if not self.store.check([self._of(rank)])]
        if not missing:  # the last one ended before it could close the round
            self._decide({"words": self._words()})
            return
        who = f"rank {missing[0]}" if len(missing) == 1 else f"ranks {', '.join(map(str, missing))}"
        reason = (
            f"{who} of {self.size} did not come to an agreement within {timeout_seconds:g} s: ended, still at work, or "
            f"waiting in a collective for a rank that came here"
        )
        self._decide({"failure": reason, "ranks": missing, "by": self.rank})

    def _leave(self) -> None:
        if self.store.add(self._key("readers"), 1) == self.size:
            self.store.set(self._key("read"), "by all")
        if self.rank == 0:
            with contextlib.suppress(RuntimeError):
                self.store.wait([self._key("read")], timedelta(seconds=LINGER_SECONDS))

    def _decide(self, outcome: dict[str, Any]) -> dict[str, Any]:
        """What was decided: this, unless something was before."""
        decided: dict[str, Any] = json.loads(self.store.compare_set(self._key("outcome"), "", json.dumps(outcome)))
        return decided

    def _words(self) -> list[str]:
        return [self.store.get(self._of(rank)).decode() for rank in range(self.size)]

    def _of(self, rank: int) -> str:
        return self._key(f"rank/{rank}")

    def _key(self, name: str) -> str:
        return f"hf_bsopt/agreement/{self.number}/{name}"


def _is_distributed() -> bool:
    from torch import distributed

    return bool(distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1)


def _next_meeting() -> _Meeting | None:
    """None where there is nobody to meet."""
    if not _is_distributed():
        return None
    from torch import distributed
    from torch.distributed import distributed_c10d

    store = distributed_c10d._get_default_store()  # there is no public name for it
    if store is None:
        raise AgreementError(f"the backend {distributed.get_backend()} has no store for the ranks to meet in")
    return _Meeting(store, next(_rounds), distributed.get_rank(), distributed.get_world_size())


def _failure(decided: dict[str, Any]) -> AgreementError:
    return AgreementError(decided["failure"], tuple(decided["ranks"]), decided["by"])


def _unreachable(error: RuntimeError) -> AgreementError:
    return AgreementError(
        f"the store in which the ranks meet does not answer; the process that keeps it, without torchrun that of rank "
        f"0, has probably ended: {_in_short(error)}"
    )


def _in_short(error: BaseException) -> str:
    line = next(iter(str(error).splitlines()), "")
    said = f"{type(error).__name__}: {line}" if line else type(error).__name__
    return said if len(said) <= LONGEST_REASON else said[: LONGEST_REASON - 1] + "…"
