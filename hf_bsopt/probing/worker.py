"""The process in which probes run, started by start_worker.py.

It reads pickled requests from standard input and writes pickled answers to standard output; all other output goes to
standard error. The process imports what a training step needs and never touches the device: each request runs in a
fork, which therefore starts with an unused device, and a crash, kill, timeout or out-of-memory error ends only the
fork. The workload is unpickled in the fork, since its imports may use the device, as bitsandbytes does. If a fork
cannot use the device, it replaces itself by a new Python process.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import pickle
import signal
import sys
import sysconfig
import tempfile
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, Protocol

from .._utils.pickling import unpickled
from ..errors import DeviceError
from ..records import Outcome, Trial
from ..virtual_gpu.processes import end_with_parent
from ..workloads.meta_device import META
from ..workloads.trainable import Phase
from .devices import Device
from .preflight import Preflight

READY = "ready"
FULL_DEVICE_HINT = "not even an empty process fits on the device; end the other processes on it (nvidia-smi lists them)"
TAIL_BYTES = 4096
IMPORTED_EARLY = ("transformers.modeling_utils", "accelerate.utils.operations", "hf_bsopt.probing.probe")
"""Imported while the caller still traces."""
_callers_path: list[str] = []


class Request(Protocol):
    """A request to the worker."""

    @property
    def device(self) -> Device: ...
    @property
    def timeout_seconds(self) -> float: ...
    def answer(self) -> Any:
        """Compute the answer; called in the fork."""
        ...

    def without_answer(self, outcome: Outcome, why: str) -> Any:
        """Return the answer to give if the fork ended without one."""
        ...


@dataclass(frozen=True)
class ProbeRequest:
    """workload: pickled. is_plain: its imports do not use the device."""

    workload: bytes
    is_plain: bool
    batch_size: int
    phase: Phase
    device: Device
    timeout_seconds: float

    def answer(self) -> Trial:
        from .oom import out_of_memory
        from .probe import probe

        self.device.prepare()
        try:
            workload = unpickled(self.workload)
        except Exception as error:
            if out_of_memory(error) is None:
                raise
            return self.without_answer("oom", f"loading the model and its data, before any step: {error}")
        return probe(workload, self.batch_size, self.device, self.phase)

    def without_answer(self, outcome: Outcome, why: str) -> Trial:
        return Trial(self.batch_size, outcome, None, None, self.device.source, detail=why)


@dataclass(frozen=True)
class PreflightRequest:
    """A request to inspect the device. workload: pickled, for a device on which its imports take memory too."""

    device: Device
    timeout_seconds: float
    workload: bytes = b""

    def answer(self) -> Preflight:
        if self.workload:
            with contextlib.suppress(Exception):  # the probe reports it
                unpickled(self.workload)
        try:
            return self.device.preflight()
        except DeviceError as error:
            return replace(self.without_answer("error", ""), problem=str(error))
        except RuntimeError as error:
            from .oom import out_of_memory

            if out_of_memory(error) is None:
                raise
            return replace(self.without_answer("error", ""), problem=f"{self.device.spec.name}: {FULL_DEVICE_HINT}")

    def without_answer(self, outcome: Outcome, why: str) -> Preflight:
        return Preflight("", self.device.spec, problem=f"{self.device.spec.name} cannot be inspected: {why}")


def serve(requests: BinaryIO, answers: BinaryIO) -> None:
    """Answer requests until their stream ends."""
    _send(answers, READY)
    while True:
        try:
            request: Request = pickle.load(requests)
        except EOFError:
            return
        if isinstance(request, ProbeRequest) and request.is_plain:
            _import_model(request.workload)
        _send(answers, run_in_fork(request))


def _import_model(pickled: bytes) -> None:
    """Import the model's module here once, not in each fork: transformers imports it when a model is first built."""
    with contextlib.suppress(Exception), META:  # the probe reports it
        unpickled(pickled).build()


def run_in_fork(request: Request) -> Any:
    """Answer the request in a fork. If the fork ends without an answer, describe how it ended."""
    reading, writing = os.pipe()
    stderr_start = _standard_error_bytes()
    worker = os.getpid()
    child = os.fork()
    if child == 0:
        end_with_parent(worker)
        os.close(reading)
        if request.device.needs_fresh_process:
            _start_again(request, writing)
        _run(request, writing)
    os.close(writing)
    with os.fdopen(reading, "rb") as stream:
        answer = stream.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return request.without_answer(*_killed_by(os.WTERMSIG(status), request, _last_line(stderr_start)))
    try:
        return pickle.loads(answer)
    except (EOFError, pickle.UnpicklingError):
        code = os.waitstatus_to_exitcode(status)
        return request.without_answer("error", f"the process ended with exit code {code}{_last_line(stderr_start)}")


def _start_again(request: Request, writing: int) -> NoReturn:
    """Replace the fork by a new Python process, which has to repeat the imports."""
    with tempfile.TemporaryFile() as file:
        pickle.dump(request, file)
        file.seek(0)
        os.dup2(file.fileno(), 0)
        os.set_inheritable(writing, True)
        os.execv(sys.executable, [*command(sys.executable, os.getppid(), _callers_path), str(writing)])


def _run(request: Request, writing: int) -> NoReturn:
    """Answer the request in the fork and exit. SIGALRM keeps its default action, which ends the process."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, request.timeout_seconds)
    try:
        answer = request.answer()
    except Exception as error:  # whatever the model's own code raises
        traceback.print_exc()
        answer = request.without_answer("error", _describe(error))
    with os.fdopen(writing, "wb") as stream:
        pickle.dump(answer, stream)
    os._exit(0)


def _describe(error: Exception) -> str:
    where = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({Path(where.filename).name}, line {where.lineno})"


def _killed_by(number: int, request: Request, last_line: str) -> tuple[Outcome, str]:
    if number == signal.SIGALRM:
        return "timeout", f"no answer in {request.timeout_seconds:g} s"
    if number in (signal.SIGKILL, signal.SIGTERM):
        name = signal.Signals(number).name
        return "killed", f"the process was killed ({name}); the system does this if host memory runs out"
    return "crash", f"the process crashed ({signal.Signals(number).name}){last_line}"


def _standard_error_bytes() -> int:
    """Return the current size of standard error; 0 if it is not a file."""
    try:
        return os.lseek(2, 0, os.SEEK_CUR)
    except OSError:
        return 0


def _last_line(since: int) -> str:
    """Return the last line written to standard error after byte ``since``, if it is a readable file."""
    try:
        end = os.lseek(2, 0, os.SEEK_CUR)
        text = os.pread(2, TAIL_BYTES, max(since, end - TAIL_BYTES)).decode(errors="replace")
    except OSError:
        return ""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return f": {lines[-1]}" if lines else ""


def _send(stream: BinaryIO, value: object) -> None:
    pickle.dump(value, stream)
    stream.flush()


def _import_everything() -> None:
    import warnings

    warnings.filterwarnings("ignore")
    for module in IMPORTED_EARLY:
        importlib.import_module(module)
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def command(python: str, parent: int, path: Sequence[str]) -> list[str]:
    """Return the command of a worker. -P: nothing is imported from the working folder, whatever lies there."""
    return [python, "-P", str(Path(__file__).with_name("start_worker.py")), str(parent), json.dumps(list(path))]


def use_path_of_caller(path: Sequence[str]) -> None:
    """Import from where the caller does, since the model's class may be in a file next to its script; the standard
    library comes first.
    """
    standard = sysconfig.get_paths()["stdlib"]
    own = [place for place in sys.path if place.startswith(standard) and "site-packages" not in place]
    others = [place or os.getcwd() for place in path]  # noqa: PTH109
    sys.path[:] = dict.fromkeys([*own, *others, *sys.path])


def main(arguments: Sequence[str]) -> None:
    """Serve requests on the standard streams; given a pipe's number, answer one request there and exit."""
    path, *pipe = arguments
    _callers_path.extend(json.loads(path))
    if pipe:
        _import_everything()
        use_path_of_caller(_callers_path)
        _run(pickle.load(sys.stdin.buffer), int(pipe[0]))
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    _import_everything()
    use_path_of_caller(_callers_path)
    serve(sys.stdin.buffer, answers)
