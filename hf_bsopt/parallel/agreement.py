"""Agreement between the processes of a distributed run, or a clear error in each of them; never a hang.

    agree(48)  # Agreement(batch_size=32, sizes=(48, 32)): at most 32 fits on rank 1

The ranks communicate through the key-value store of ``init_process_group`` and not through collectives: a collective
that one rank never joins leaves the process group unusable, and NCCL's run on a GPU that may just have run out of
memory. The store is on the host, and every wait has a timeout. Every call is one round, counted by each process, so all
ranks must call in the same order. The outcome of a round is decided once, by the first rank that writes it
(``compare_set``), so no two ranks leave it with different answers.
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
"""For ranks that work in step. A failed rank is reported at once, whatever the timeout."""
LINGER_SECONDS = 2.0
"""Time for which rank 0 waits for the others to read the outcome: its process may host the store."""
MAX_REASON_LENGTH = 400
_rounds = itertools.count()


@dataclass(frozen=True)
class Agreement:
    """batch_size: the size that every rank uses, the smallest of ``sizes``. sizes: the largest size of each rank, by
    rank.
    """

    batch_size: int
    sizes: tuple[int, ...]

    @property
    def rank(self) -> int:
        """The first rank that limits the size."""
        return self.sizes.index(self.batch_size)


def agree(size: int, *, timeout_seconds: float = TIMEOUT_SECONDS) -> Agreement:
    """Return the largest size that every rank can use, given the size of this rank. Alone, that is the size itself.

    Call it on every rank. Raises AgreementError on every rank if one failed (:func:`report_failure`) or did not arrive
    within ``timeout_seconds`` of another; UsageError, also on every rank, for a size under 1.
    """
    sizes = tuple(int(message) for message in exchange(str(size), timeout_seconds=timeout_seconds))
    if min(sizes) < 1:
        raise UsageError(f"the batch size must be at least 1; rank {sizes.index(min(sizes))} has {min(sizes)}")
    return Agreement(min(sizes), sizes)


def exchange(message: str, *, timeout_seconds: float = TIMEOUT_SECONDS) -> tuple[str, ...]:
    """Return the messages of all ranks, by rank. Outside a distributed run, only the own message.

    Call it on every rank. Raises AgreementError as :func:`agree` does.
    """
    current = _next_round()
    if current is None:
        return (message,)
    try:
        current.post(message)
        return current.outcome(timeout_seconds)
    except RuntimeError as error:
        raise _store_unreachable(error) from error


def post_message(message: str) -> None:
    """Post this rank's message of a round without waiting for the others."""
    current = _next_round()
    if current is None:
        return
    try:
        current.post(message)
    except RuntimeError as error:
        raise _store_unreachable(error) from error


def report_failure(error: BaseException) -> AgreementError | None:
    """Report in this round that this rank failed.

    Return the error that all ranks raise: this failure, or an earlier one of another rank, its likely cause. Return
    None outside a distributed run.
    """
    current = _next_round()
    if current is None:
        return None
    try:
        return current.fail(f"rank {current.rank} failed: {_one_line(error)}", (current.rank,))
    except RuntimeError as unreachable:
        return _store_unreachable(unreachable)


def collectives_started() -> dict[str, int]:
    """Return how many collectives this rank has started, by process group. If two ranks have started different numbers,
    one of them waits for the other, or will, and the group is no longer usable.
    """
    if not _is_distributed():
        return {}
    from torch.distributed import distributed_c10d

    groups = distributed_c10d._world.pg_names  # the groups of this rank; there is no public list
    return {str(name): int(group._get_sequence_number_for_group()) for group, name in groups.items()}


@dataclass(frozen=True)
class _Round:
    """One round in the store."""

    store: Store
    number: int
    rank: int
    size: int

    def post(self, message: str) -> None:
        """Post a message; the last rank to post closes the round."""
        self.store.set(self._rank_key(self.rank), message)
        if self.store.add(self._key("count"), 1) == self.size:
            self._decide({"messages": self._messages()})

    def fail(self, reason: str, ranks: Sequence[int]) -> AgreementError:
        """Return the first failure reported in this round, this or another rank's. It has no effect once every rank has
        posted.
        """
        decided = self._decide({"failure": reason, "ranks": list(ranks), "reported_by": self.rank})
        self._mark_read()
        return _failure(decided)

    def outcome(self, timeout_seconds: float) -> tuple[str, ...]:
        """Return the messages of all ranks, or raise AgreementError."""
        try:
            self.store.wait([self._key("outcome")], timedelta(seconds=timeout_seconds))
        except RuntimeError:  # each kind of store raises its own error for a timeout
            self._close(timeout_seconds)
        decided = json.loads(self.store.get(self._key("outcome")))
        self._mark_read()
        if "messages" not in decided:
            raise _failure(decided)
        return tuple(decided["messages"])

    def _close(self, timeout_seconds: float) -> None:
        """Close a round that timed out; the missing ranks are the reason."""
        missing = [rank for rank in range(self.size) if not self.store.check([self._rank_key(rank)])]
        if not missing:  # the last rank ended before it could close the round
            self._decide({"messages": self._messages()})
            return
        who = f"rank {missing[0]}" if len(missing) == 1 else f"ranks {', '.join(map(str, missing))}"
        reason = (
            f"{who} of {self.size} did not respond within {timeout_seconds:g} s: ended, still working, or "
            f"waiting in a collective for a rank that is waiting here"
        )
        self._decide({"failure": reason, "ranks": missing, "reported_by": self.rank})

    def _mark_read(self) -> None:
        if self.store.add(self._key("readers"), 1) == self.size:
            self.store.set(self._key("read"), "by all ranks")
        if self.rank == 0:
            with contextlib.suppress(RuntimeError):
                self.store.wait([self._key("read")], timedelta(seconds=LINGER_SECONDS))

    def _decide(self, outcome: dict[str, Any]) -> dict[str, Any]:
        """Decide the outcome unless it is decided already; return the decided one."""
        decided: dict[str, Any] = json.loads(self.store.compare_set(self._key("outcome"), "", json.dumps(outcome)))
        return decided

    def _messages(self) -> list[str]:
        return [self.store.get(self._rank_key(rank)).decode() for rank in range(self.size)]

    def _rank_key(self, rank: int) -> str:
        return self._key(f"rank/{rank}")

    def _key(self, name: str) -> str:
        return f"hf_bsopt/agreement/{self.number}/{name}"


def _is_distributed() -> bool:
    from torch import distributed

    return bool(distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1)


def _next_round() -> _Round | None:
    """Return the next round, or None outside a distributed run."""
    if not _is_distributed():
        return None
    from torch import distributed
    from torch.distributed import distributed_c10d

    store = distributed_c10d._get_default_store()  # there is no public accessor
    if store is None:
        raise AgreementError(
            f"the backend {distributed.get_backend()} has no store through which the ranks could agree"
        )
    return _Round(store, next(_rounds), distributed.get_rank(), distributed.get_world_size())


def _failure(decided: dict[str, Any]) -> AgreementError:
    return AgreementError(decided["failure"], tuple(decided["ranks"]), decided["reported_by"])


def _store_unreachable(error: RuntimeError) -> AgreementError:
    return AgreementError(
        f"the store of the process group does not respond; the process that hosts it (rank 0, unless torchrun started "
        f"the ranks) has probably ended: {_one_line(error)}"
    )


def _one_line(error: BaseException) -> str:
    line = next(iter(str(error).splitlines()), "")
    text = f"{type(error).__name__}: {line}" if line else type(error).__name__
    return text if len(text) <= MAX_REASON_LENGTH else text[: MAX_REASON_LENGTH - 1] + "…"
