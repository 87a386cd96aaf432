"""Processes that share a virtual GPU."""

from __future__ import annotations

import json
import select
import signal
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

from rehearsing import SCRIPTS

from hf_bsopt import virtual_gpu
from hf_bsopt.data import catalog

T4 = catalog.gpu("T4")
TOTAL, CONTEXT = T4.total_bytes or 0, T4.context_bytes
MIB = 2**20
LONG_SECONDS = 60


class Neighbour:
    """A process that runs scripts/neighbour.py on the virtual T4 whose table is ``device_file``."""

    def __init__(self, device_file: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(SCRIPTS / "neighbour.py")],
            env=virtual_gpu.environment(T4, shared=device_file),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._commands, self._answers = self._process.stdin, self._process.stdout

    def __enter__(self) -> Neighbour:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
        self._commands.close()
        self._answers.close()

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, *words: object) -> Any:
        self.send(*words)
        return self.answer()

    def free_bytes(self) -> int:
        """Return the free bytes of the GPU as this process sees them. It has a context from then on."""
        status, free, total = self.ask("info")
        assert (status, total) == (0, TOTAL)
        return int(free)

    def send(self, *words: object) -> None:
        """Send a command without waiting for the answer."""
        self._commands.write(" ".join(map(str, words)).encode() + b"\n")
        self._commands.flush()

    def has_answered(self, within_seconds: float) -> bool:
        return bool(select.select([self._answers], [], [], within_seconds)[0])

    def answer(self) -> Any:
        assert self.has_answered(LONG_SECONDS), "the process hangs"
        return json.loads(self._answers.readline())

    def read_dots(self, count: int) -> bytes:
        """Return ``count`` bytes of the output of allocate_and_free_forever."""
        return self._answers.read(count)

    def end(self) -> int:
        """Let the process end by closing its input; return its exit code."""
        self._commands.close()
        return self._process.wait(LONG_SECONDS)

    def kill(self) -> None:
        self._process.send_signal(signal.SIGKILL)
        self._process.wait(LONG_SECONDS)
