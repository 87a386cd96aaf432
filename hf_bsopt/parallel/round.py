"""One round of an agreement in the store of the process group: each rank posts a message, all read the same outcome."""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from ..errors import AgreementError
from .heartbeat import Heartbeat

if TYPE_CHECKING:
    from torch.distributed import Store

LINGER_SECONDS = 2.0
"""Time for which rank 0 waits for the others to read the outcome: its process may host the store."""
SLICE_SECONDS = 1.0
"""A wait is interrupted so often, to look for ranks that ended and for Ctrl-C."""
LATE_SECONDS = 30.0
"""A rank that is awaited for longer is named in a warning."""
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Round:
    """One round in the store."""

    store: Store
    number: int
    rank: int
    size: int

    heartbeat: Heartbeat

    def post(self, message: str) -> None:
        """Post a message; the last rank to post closes the round."""
        self.store.set(self._rank_key(self.rank), message)
        if self.store.add(self._key("count"), 1) == self.size:
            self._decide({"messages": self._messages()})

    def fail(self, reason: str, ranks: Sequence[int], *, is_stopped: bool) -> AgreementError:
        """Return the first failure reported in this round, this or another rank's. It has no effect once every rank has
        posted.
        """
        decided = self._decide(self._failed(reason, ranks, is_stopped=is_stopped))
        self._mark_read()
        return failure_of(decided)

    def outcome(self, timeout_seconds: float) -> tuple[str, ...]:
        """Return the messages of all ranks, or raise AgreementError."""
        self._wait(timeout_seconds)
        decided = json.loads(self.store.get(self._key("outcome")))
        self._mark_read()
        if "messages" not in decided:
            raise failure_of(decided)
        return tuple(decided["messages"])

    def outcome_so_far(self, store: Store) -> dict[str, Any] | None:
        """Return the outcome, read from this connection to the store; None if there is none yet."""
        return json.loads(store.get(self._key("outcome"))) if store.check([self._key("outcome")]) else None

    def _wait(self, timeout_seconds: float) -> None:
        """Wait until the round is decided; decide it if a missing rank is lost or the time is over."""
        began, is_warned = time.monotonic(), False
        while True:
            left = timeout_seconds - (time.monotonic() - began)
            try:
                self.store.wait([self._key("outcome")], timedelta(seconds=max(0.01, min(left, SLICE_SECONDS))))
                return
            except RuntimeError:  # each kind of store raises its own error for a timeout
                missing = self._missing()
            lost = self.heartbeat.lost(missing)
            if lost:
                self._decide(self._failed("; ".join(lost.values()), tuple(lost)))
            elif not missing or left <= SLICE_SECONDS:
                self._close(missing, timeout_seconds)
            elif not is_warned and timeout_seconds - left > LATE_SECONDS:
                is_warned = True
                logger.warning(
                    "waiting for %s of %d for %.0f s%s", format_ranks(missing), self.size, timeout_seconds - left,
                    self._places(missing),
                )  # fmt: skip

    def _close(self, missing: Sequence[int], timeout_seconds: float) -> None:
        """Close a round that timed out; the missing ranks are the reason."""
        if not missing:  # the last rank ended before it could close the round
            self._decide({"messages": self._messages()})
            return
        reason = (
            f"{format_ranks(missing)} of {self.size} did not respond within {timeout_seconds:g} s: ended, still "
            f"working, or waiting in a collective for a rank that is waiting here{self._places(missing)}"
        )
        self._decide(self._failed(reason, missing))

    def _missing(self) -> list[int]:
        return [rank for rank in range(self.size) if not self.store.check([self._rank_key(rank)])]

    def _places(self, ranks: Sequence[int]) -> str:
        return "".join(self.heartbeat.place(rank) for rank in ranks)

    def _failed(self, reason: str, ranks: Sequence[int], *, is_stopped: bool = True) -> dict[str, Any]:
        """Return the outcome of a failed round, with the messages of the ranks that posted one."""
        there = {rank: self._rank_key(rank) for rank in range(self.size) if self.store.check([self._rank_key(rank)])}
        messages = {rank: self.store.get(key).decode() for rank, key in there.items()}
        found = {"failure": reason, "ranks": list(ranks), "reported_by": self.rank}
        return {**found, "posted": messages, "is_stopped": is_stopped}

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


def format_ranks(numbers: Sequence[int]) -> str:
    return f"rank {numbers[0]}" if len(numbers) == 1 else f"ranks {', '.join(map(str, numbers))}"


def failure_of(decided: dict[str, Any]) -> AgreementError:
    messages = {int(rank): message for rank, message in decided["posted"].items()}
    return AgreementError(
        decided["failure"],
        tuple(decided["ranks"]),
        decided["reported_by"],
        messages,
        is_stopped=decided["is_stopped"],
    )
