"""Processes of one distributed run on this machine, without torchrun: each runs a function as its part.

    run(takes, 48, 32)  # rank 0 runs takes(48), rank 1 takes(32)

What a part returns, or the error that it ended with, is the answer of its rank.
"""

from __future__ import annotations

import datetime
import multiprocessing
import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

LONG_SECONDS = 120
_PROCESSES = multiprocessing.get_context("forkserver")
PRELOADED = ["torch.distributed", "accelerate.utils", "transformers.trainer", "hf_bsopt.api", "datasets"]
_PROCESSES.set_forkserver_preload(PRELOADED)  # imported once, and not by each process


@dataclass(frozen=True)
class Answer:
    """value: what the part returned. error: the type of what it raised; words: its message; cause: the type of what it
    was raised from. seconds: since the ranks had met. Nothing of it where the process ended without a word.
    """

    value: Any = None
    error: str = ""
    words: str = ""
    cause: str = ""
    seconds: float = 0.0


@dataclass
class _Store:
    """Where the ranks meet: in this process, as with torchrun in the agent's, or in that of rank 0."""

    is_apart: bool
    port: int = 0
    server: Any = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.is_apart:
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
        return {**address, "TORCHELASTIC_USE_AGENT_STORE": str(self.is_apart)}


def run(part: Callable[[Any], Any], *given: Any, store_is_apart: bool = True) -> list[Answer]:
    """The answers by rank."""
    store = _Store(store_is_apart)
    started = [_start(part, mine, {**store.variables, **_place(rank, len(given))}) for rank, mine in enumerate(given)]
    try:
        return [_heard(listener) for _, listener in started]
    finally:
        for process, listener in started:
            process.kill()
            process.join()
            process.close()
            listener.close()


def _place(rank: int, size: int) -> dict[str, str]:
    return {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}


def _start(part: Callable[[Any], Any], mine: Any, variables: dict[str, str]) -> tuple[Any, Connection]:
    listener, speaker = _PROCESSES.Pipe(duplex=False)
    process = _PROCESSES.Process(target=_play, args=(part, mine, variables, speaker))
    process.start()
    speaker.close()
    return process, listener


def _heard(listener: Connection) -> Answer:
    if not listener.poll(LONG_SECONDS):
        raise TimeoutError(f"no answer in {LONG_SECONDS} s")
    try:
        answer: Answer = listener.recv()
    except EOFError:
        return Answer()
    return answer


def _play(part: Callable[[Any], Any], mine: Any, variables: dict[str, str], speaker: Connection) -> None:
    import torch.distributed

    os.environ.update(variables)
    torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    torch.distributed.barrier()
    begun = time.monotonic()
    try:
        said: dict[str, Any] = {"value": part(mine)}
    except Exception as error:
        said = {"error": type(error).__name__, "words": str(error), "cause": type(error.__cause__).__name__}
    speaker.send(Answer(**said, seconds=time.monotonic() - begun))
    os._exit(0)  # without waiting for ranks that may be gone
