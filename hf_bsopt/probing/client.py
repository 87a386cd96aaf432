"""The caller's side of the worker: one child process that runs every micro-batch size asked for.

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
from ..workloads.trainable import Phase, Trainable
from ..workloads.workload import Workload
from .devices import Device, with_timed_steps
from .preflight import Preflight
from .worker import READY, PreflightRequest, ProbeRequest, Request, command

TIMEOUT_SECONDS = 600.0
PREFLIGHT_SECONDS = 120.0
GRACE_SECONDS = 60.0
"""The probe's process ends itself at its timeout; if it does not, it is killed this many seconds later."""


class ProbeClient:
    """A callable that probes one device, one micro-batch size at a time."""

    def __init__(
        self, device: Device, *, timeout_seconds: float = TIMEOUT_SECONDS, expandable_segments: bool = False
    ) -> None:
        """Probe ``device``. ``timeout_seconds`` is the limit for one size."""
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
        """Start the worker. Its imports take some seconds, during which the caller may do something else.

        Raises RehearsalError if the device is not available.
        """
        if self._worker is None:
            self._worker = _Worker(self.device.environment(expandable_segments=self._expandable_segments))

    def preflight(self, workload: Trainable | None = None) -> Preflight:
        """Inspect the device for this workload; ``self.device`` has the spec that was found from here on.

        Raises DeviceError if nothing can run on it.
        """
        sends_workload = workload is not None and self.device.spec.kind == "cpu" and not isinstance(workload, Workload)
        packed = self._packed(workload) if workload is not None and sends_workload else b""
        with progress.task(f"inspecting {self.device.spec.name}"):
            found: Preflight = self._ask(PreflightRequest(self.device, PREFLIGHT_SECONDS, packed))
        if found.problem:
            raise DeviceError(found.problem)
        self.device = dataclasses.replace(self.device, spec=found.spec)  # type: ignore[type-var]
        return found

    def __call__(
        self, workload: Trainable, batch_size: int, phase: Phase = "training", *, timed_steps: int = 0
    ) -> Trial:
        """Run one micro-batch size, and time at least ``timed_steps`` steps.

        Raises ProbeError if the workload cannot be sent to another process.
        """
        device = with_timed_steps(self.device, steps=timed_steps)
        is_plain = isinstance(workload, Workload) and not (workload.lora_r or workload.load_in_4bit)
        packed = self._packed(workload)
        with progress.task(self._format_progress(batch_size, phase)):
            trial: Trial = self._ask(ProbeRequest(packed, is_plain, batch_size, phase, device, self._timeout_seconds))
        self._last = trial
        return trial

    def _packed(self, workload: Trainable) -> bytes:
        try:
            return pickled(workload.portable())
        except Exception as error:  # each class fails to pickle with an error of its own
            raise ProbeError(f"the model cannot be sent to another process: {error}") from error

    def _format_progress(self, batch_size: int, phase: Phase) -> str:
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
            answer = request.without_answer("error", worker.exit_message())
        worker.end()
        self._worker = None
        return answer


class _Worker:
    """The child process, in its own session so that its forks are killed with it."""

    def __init__(self, environment: dict[str, str]) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  closed in end()
        self._process = subprocess.Popen(
            command(sys.executable, os.getpid(), sys.path),
            env=with_package(environment),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            start_new_session=True,
        )
        self._answers: queue.Queue[Any] = queue.Queue()
        self._listener = threading.Thread(target=_listen, args=(self._process.stdout, self._answers), daemon=True)
        self._listener.start()

    def ask(self, request: bytes, timeout_seconds: float) -> Any:
        """Send a request and return the answer. Raise queue.Empty on a timeout, EOFError if the worker ended."""
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

    def exit_message(self) -> str:
        """Return how the worker ended and the last line that it wrote to standard error."""
        code = self._process.wait()
        self._errors.seek(0)
        lines = [line for line in self._errors.read().decode(errors="replace").splitlines() if line.strip()]
        ending = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return f"the worker {ending}" + (f": {lines[-1]}" if lines else "")

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
            except Exception:  # an incomplete answer: the worker ended
                answers.put(EOFError())
                return
