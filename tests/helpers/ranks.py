"""Run a function as each rank of a distributed run on this machine, without torchrun.

    run(takes, 48, 32)  # rank 0 runs takes(48), rank 1 takes(32)

The answer of a rank is what its function returned or the error that it raised.
"""

from __future__ import annotations

import datetime
import gc
import multiprocessing
import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

TIMEOUT_SECONDS = 120
_PROCESSES = multiprocessing.get_context("forkserver")
PRELOADED = ["torch.distributed", "accelerate.utils", "transformers.trainer", "hf_bsopt.api", "datasets"]
_PROCESSES.set_forkserver_preload(PRELOADED)  # imported once instead of by each process


@dataclass(frozen=True)
class Answer:
    """The outcome of one rank; empty if its process ended without an answer.

    value: what the function returned. error: the type of what it raised; message: its text; cause: the type of what it
    was raised from. seconds: since the process group was ready.
    """

    value: Any = None
    error: str = ""
    message: str = ""
    cause: str = ""
    seconds: float = 0.0


@dataclass
class _Store:
    """The store of the process group: in this process, as torchrun's agent has it, or in that of rank 0."""

    is_separate: bool
    port: int = 0
    server: Any = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.is_separate:
            from torch.distributed import TCPStore

            self.server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            self.port = self.server.port
        else:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                self.port = free.getsockname()[1]

    @property
    def variables(self) -> dict[str, str]:
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self.port)}
        return {**address, "TORCHELASTIC_USE_AGENT_STORE": str(self.is_separate)}


def run(
    part: Callable[[Any], Any], *given: Any, store_is_separate: bool = True, answers: int | None = None
) -> list[Answer]:
    """Run ``part`` with one of the arguments on each rank, and return the answers by rank. ``answers``: only the first
    ranks are waited for; the others have an empty one.
    """
    store = _Store(store_is_separate)
    started = [
        _start(part, argument, {**store.variables, **_rank_variables(rank, len(given))})
        for rank, argument in enumerate(given)
    ]
    try:
        received = [_receive(receiver) for _, receiver in started[:answers]]
        return received + [Answer()] * (len(started) - len(received))
    finally:
        for process, receiver in started:
            process.kill()
            process.join()
            process.close()
            receiver.close()


def _rank_variables(rank: int, size: int) -> dict[str, str]:
    return {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}


def _start(part: Callable[[Any], Any], argument: Any, variables: dict[str, str]) -> tuple[Any, Connection]:
    receiver, sender = _PROCESSES.Pipe(duplex=False)
    process = _PROCESSES.Process(target=_run_rank, args=(part, argument, variables, sender))
    process.start()
    sender.close()
    return process, receiver


def _receive(receiver: Connection) -> Answer:
    if not receiver.poll(TIMEOUT_SECONDS):
        raise TimeoutError(f"no answer in {TIMEOUT_SECONDS} s")
    try:
        answer: Answer = receiver.recv()
    except EOFError:
        return Answer()
    return answer


def _run_rank(part: Callable[[Any], Any], argument: Any, variables: dict[str, str], sender: Connection) -> None:
    import torch.distributed

    gc.freeze()  # collections of the tested code skip what was preloaded
    os.environ.update(variables)
    torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    torch.distributed.barrier()
    started_at = time.monotonic()
    try:
        outcome: dict[str, Any] = {"value": part(argument)}
    except BaseException as error:
        outcome = {"error": type(error).__name__, "message": str(error), "cause": type(error.__cause__).__name__}
    sender.send(Answer(**outcome, seconds=time.monotonic() - started_at))
    os._exit(0)  # without waiting for ranks that may be gone
