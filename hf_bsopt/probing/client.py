"""The caller's side of the worker: one child process that answers for any size.

with ProbeClient(VirtualCudaDevice(catalog.gpu("T4"))) as client:
    client.preflight()  # Preflight
    client(workload, 48)  # Trial
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pickle
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from types import TracebackType
from typing import IO, Any

from .._utils import progress
from .._utils.pickling import pickled
from ..errors import DeviceError, ProbeError
from ..records import VERDICTS, Trial
from ..virtual_gpu.processes import with_package
from ..workloads.workload import Phase, Trainable, Workload
from .devices import Device, with_timed_steps
from .preflight import Preflight
from .worker import READY, PreflightRequest, ProbeRequest, Request

TIMEOUT_SECONDS = 600.0
PREFLIGHT_SECONDS = 120.0
GRACE_SECONDS = 60.0
"""The probe's process ends itself when its time is over; what does not even do that is ended after this."""


class ProbeClient:
    """Probes on one device, one size at a time."""

    def __init__(
        self, device: Device, *, timeout_seconds: float = TIMEOUT_SECONDS, expandable_segments: bool = False
    ) -> None:
        """``timeout_seconds`` is for one size."""
        self.device = device
        self._timeout_seconds = timeout_seconds
        self._expandable_segments = expandable_segments
        self._worker: _Worker | None = None
        self._last: Trial | None = None

    def __enter__(self) -> ProbeClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._worker is not None:
            self._worker.end()
            self._worker = None

    def start(self) -> None:
        """Starts the worker, which needs some seconds for its imports: the caller may do something else meanwhile.

        Raises RehearsalError where the device can't be had.
        """
        if self._worker is None:
            self._worker = _Worker(self.device.environment(expandable_segments=self._expandable_segments))

    def preflight(self, workload: Trainable | None = None) -> Preflight:
        """What the device is like now, for this workload; it is taken as that from here on. Raises DeviceError where
        nothing can run.
        """
        brings_imports = workload is not None and self.device.spec.kind == "cpu" and not isinstance(workload, Workload)
        packed = self._packed(workload) if workload is not None and brings_imports else b""
        with progress.task(f"looking at {self.device.spec.name}"):
            found: Preflight = self._ask(PreflightRequest(self.device, PREFLIGHT_SECONDS, packed))
        if found.problem:
            raise DeviceError(found.problem)
        self.device = dataclasses.replace(self.device, spec=found.spec)  # type: ignore[type-var]
        return found

    def __call__(
        self, workload: Trainable, batch_size: int, phase: Phase = "training", *, timed_steps: int = 0
    ) -> Trial:
        """Raises ProbeError for a workload that can't be handed to another process. ``timed_steps``: at least so many
        steps are timed.
        """
        device = with_timed_steps(self.device, steps=timed_steps)
        is_plain = isinstance(workload, Workload) and not (workload.lora_r or workload.load_in_4bit)
        packed = self._packed(workload)
        with progress.task(self._told(batch_size, phase)):
            trial: Trial = self._ask(ProbeRequest(packed, is_plain, batch_size, phase, device, self._timeout_seconds))
        self._last = trial
        return trial

    def _packed(self, workload: Trainable) -> bytes:
        try:
            return pickled(workload.portable())
        except Exception as error:  # every class refuses in its own way
            raise ProbeError(f"the model can't be handed to another process: {error}") from error

    def _told(self, batch_size: int, phase: Phase) -> str:
        """What is going on, for whoever waits."""
        last = self._last
        known = "" if last is None else f" ({last.batch_size}: {VERDICTS[last.outcome]})"
        where = f"{'virtual ' if self.device.source == 'rehearsed' else ''}{self.device.spec.name}"
        return f"batch size {batch_size}: {phase} steps on {where}{known}"

    def _ask(self, request: Request) -> Any:
        self.start()
        worker = self._worker
        assert worker is not None
        try:
            return worker.ask(pickle.dumps(request), request.timeout_seconds + GRACE_SECONDS)
        except queue.Empty:
            answer = request.without_answer("timeout", f"no answer in {request.timeout_seconds:g} s")
        except EOFError:
            answer = request.without_answer("error", worker.last_words())
        worker.end()
        self._worker = None
        return answer


class _Worker:
    """The child process, in a session of its own so that its forks can be ended with it."""

    def __init__(self, environment: dict[str, str]) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  closed in end()
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore::RuntimeWarning:runpy", "-m", "hf_bsopt.probing.worker"],
            env=with_package(environment, sys.path),  # a module's class may lie beside the caller's script
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            start_new_session=True,
        )
        self._answers: queue.Queue[Any] = queue.Queue()
        self._listener = threading.Thread(target=_listen, args=(self._process.stdout, self._answers), daemon=True)
        self._listener.start()

    def ask(self, request: bytes, timeout_seconds: float) -> Any:
        """Raises queue.Empty when it takes too long, EOFError when the worker ended."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(request)
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise EOFError from error
        while True:
            answer = self._answers.get(timeout=timeout_seconds)
            if isinstance(answer, EOFError):
                raise answer
            if answer != READY:
                return answer

    def last_words(self) -> str:
        """How it ended, and the end of what it wrote to standard error."""
        code = self._process.wait()
        self._errors.seek(0)
        lines = [line for line in self._errors.read().decode(errors="replace").splitlines() if line.strip()]
        how = f"died of {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return f"the worker {how}" + (f": {lines[-1]}" if lines else "")

    def end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._listener.join(timeout=GRACE_SECONDS)
        self._errors.close()
        if self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()


def _listen(stream: IO[bytes], answers: queue.Queue[Any]) -> None:
    with stream:
        while True:
            try:
                answers.put(pickle.load(stream))
            except Exception:  # whatever is no whole answer: the worker is at its end
                answers.put(EOFError())
                return
