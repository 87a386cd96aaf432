"""Agreement between the processes of a distributed run, or a clear error in each of them; never a hang.

    agree(48)  # Agreement(batch_size=32, sizes=(48, 32)): at most 32 fits on rank 1

The ranks communicate through the key-value store of ``init_process_group`` and not through collectives: a collective
that one rank never joins leaves the process group unusable, and NCCL's run on a GPU that may just have run out of
memory. The store is on the host, and every wait has a timeout. Every call is one round, counted by each process, so all
ranks must call in the same order. The outcome of a round is decided once, by the first rank that writes it
(``compare_set``), so no two ranks leave it with different answers. A rank that ended or is silent (heartbeat.py) is
named by all others within a minute, whatever the timeout.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ..errors import AgreementError, UsageError
from .collectives import is_distributed
from .heartbeat import BEAT_SECONDS, SILENT_SECONDS, Heartbeat
from .round import Round, failure_of

TIMEOUT_SECONDS = 20.0
"""For ranks that work in step. A failed rank is reported at once, whatever the timeout."""
MAX_REASON_LENGTH = 400
OF_COLLECTIVES = ("gloo", "NCCL", "nccl", "Connection closed by peer", "Connection reset by peer", "Broken pipe")
"""Words in the errors of collectives that another rank did not join, or left."""
logger = logging.getLogger(__name__)


@dataclass
class _State:
    """The state of this process: the number of the next round, its heartbeat, and whether it waits in a round."""

    next_round: int = 0
    heartbeat: Heartbeat | None = None
    is_waiting: bool = False


_state = _State()


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
        _state.is_waiting = True
        return current.outcome(timeout_seconds)
    except RuntimeError as error:
        raise _store_unreachable(error) from error
    finally:
        _state.is_waiting = False


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

    Return the error that all ranks raise: this failure, or an earlier one of another rank, its likely cause. An error
    of a collective is taken for the failure of a rank that ended or is silent, if there is one. Return None outside a
    distributed run.
    """
    current = _next_round()
    if current is None:
        return None
    try:
        lost = _lost_behind(error, current)
        if lost:
            return current.fail("; ".join(lost.values()), tuple(lost), is_stopped=True)
        reason = f"rank {current.rank} failed: {_one_line(error)}"
        return current.fail(reason, (current.rank,), is_stopped=not isinstance(error, Exception))
    except RuntimeError as unreachable:
        return _store_unreachable(unreachable)


@contextlib.contextmanager
def failures_reported() -> Iterator[None]:
    """Report whatever leaves the context to the other ranks, Ctrl-C and sys.exit too, and raise it unchanged. An
    AgreementError is known to all of them already.
    """
    start_heartbeat()
    try:
        yield
    except AgreementError:
        raise
    except BaseException as error:
        report_failure(error)
        raise


@contextlib.contextmanager
def failures_logged(explain: Callable[[AgreementError], str]) -> Iterator[None]:
    """Log an error, ``explain``ed, if another rank ends, falls silent or reports a failure while this one computes or
    waits in a collective of the training: there it would hear of it only when the collective times out. A rank that
    hangs is named in a warning, since it may as well be saving a checkpoint.
    """
    start_heartbeat()
    heartbeat = _state.heartbeat
    if heartbeat is None:
        yield
        return

    is_warned = False

    def look() -> bool:
        nonlocal is_warned
        if _state.is_waiting:
            return False
        failure = _failure_so_far(heartbeat)
        if failure is not None:
            logger.error("%s", explain(failure))
        elif not is_warned and (hang := heartbeat.awaited()):
            is_warned = True
            logger.warning("%s", explain(AgreementError(hang)))
        return failure is not None

    before = heartbeat.watch(look)
    try:
        yield
    finally:
        heartbeat.watch(before)


def start_heartbeat() -> None:
    """Let the other ranks know from here on that this one is alive. Every exchange does so too."""
    with contextlib.suppress(RuntimeError, AgreementError):
        _this_round()


def _next_round() -> Round | None:
    """Begin the next round, and return it; None outside a distributed run."""
    current = _this_round()
    if current is not None:
        _state.next_round += 1
    return current


def _this_round() -> Round | None:
    """Return the round that comes next, or None outside a distributed run. Its heartbeat is started."""
    if not is_distributed():
        return None
    from torch import distributed
    from torch.distributed import distributed_c10d

    store = distributed_c10d._get_default_store()  # there is no public accessor
    if store is None:
        raise AgreementError(
            f"the backend {distributed.get_backend()} has no store through which the ranks could agree"
        )
    rank, size = distributed.get_rank(), distributed.get_world_size()
    if _state.heartbeat is None or _state.heartbeat.store is not store:
        if _state.heartbeat is not None:
            _state.heartbeat.end()
        _state.heartbeat = Heartbeat(store, rank, size)
    return Round(store, _state.next_round, rank, size, _state.heartbeat)


def _failure_so_far(heartbeat: Heartbeat) -> AgreementError | None:
    """Return the failure of another rank that ended, is silent, or reported it in the round that comes next."""
    lost = heartbeat.lost(heartbeat.others)
    if lost:
        return AgreementError("; ".join(lost.values()), tuple(lost), is_stopped=True)
    current = _this_round()
    decided = None if current is None else current.outcome_so_far(heartbeat.connection)
    return failure_of(decided) if decided is not None and "failure" in decided else None


def _lost_behind(error: BaseException, current: Round) -> dict[int, str]:
    """Return the ranks that are lost, if ``error`` may come from that. After the error of a collective, the ranks of
    other machines are given the time to post a beat.
    """
    heartbeat, others = current.heartbeat, current.heartbeat.others
    if not isinstance(error, RuntimeError) or not any(word in str(error) for word in OF_COLLECTIVES):
        return {}
    began = time.monotonic()
    while time.monotonic() - began < SILENT_SECONDS + BEAT_SECONDS:
        lost = heartbeat.lost(others)
        if lost or heartbeat.has_beaten_since(began, others) or current.outcome_so_far(current.store) is not None:
            return lost
        time.sleep(BEAT_SECONDS / 10)
    return {}


def _store_unreachable(error: RuntimeError) -> AgreementError:
    return AgreementError(
        f"the store of the process group does not respond; the process that hosts it (rank 0, unless torchrun started "
        f"the ranks) has probably ended: {_one_line(error)}",
        is_stopped=True,
    )


def _one_line(error: BaseException) -> str:
    line = next(iter(str(error).splitlines()), "")
    text = f"{type(error).__name__}: {line}" if line else type(error).__name__
    return text if len(text) <= MAX_REASON_LENGTH else text[: MAX_REASON_LENGTH - 1] + "…"
