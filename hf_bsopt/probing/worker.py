"""The process in which probes run: ``python -m hf_bsopt.probing.worker``.

Requests come in on standard input and Trials go out on standard output, pickled; whatever else prints goes to standard
error. The process imports what a training step needs and never touches the device: each size is run in a fork of it,
which therefore starts with a device that nobody used, and whose crash, kill, timeout or out-of-memory error ends the
fork alone. The workload is unpacked in the fork, since what it brings along may use the device when it is imported, as
bitsandbytes does.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import pickle
import signal
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NoReturn

from ..meta import META
from ..records import Outcome, Trial
from ..rehearsal.processes import end_with_parent
from .devices import Device

READY = "ready"
TAIL_BYTES = 4096
IMPORTED_EARLY = ("dill", "transformers.modeling_utils", "accelerate.utils.operations", "hf_bsopt.probing.probe")
"""While the caller still traces."""


@dataclass(frozen=True)
class Request:
    """workload: pickled by dill. is_plain: it brings nothing along that uses the device when it is imported."""

    workload: bytes
    is_plain: bool
    batch_size: int
    device: Device
    timeout_seconds: float

    def without_answer(self, outcome: Outcome, why: str) -> Trial:
        return Trial(self.batch_size, outcome, None, None, self.device.source, detail=why)


def serve(requests: BinaryIO, answers: BinaryIO) -> None:
    """Answers until the requests end."""
    _send(answers, READY)
    while True:
        try:
            request: Request = pickle.load(requests)
        except EOFError:
            return
        if request.is_plain:
            _import_model(request.workload)
        _send(answers, run_in_fork(request))


def _import_model(pickled: bytes) -> None:
    """Once here rather than in each fork: transformers imports a model's module when it is first built."""
    import dill

    with contextlib.suppress(Exception), META:  # the probe will say it
        dill.loads(pickled).build()


def run_in_fork(request: Request) -> Trial:
    """The Trial of a process that is forked for it. What it does not come back from is told by how it ended."""
    reading, writing = os.pipe()
    said_before = _standard_error_bytes()
    child = os.fork()
    if child == 0:
        os.close(reading)
        _run(request, writing)
    os.close(writing)
    with os.fdopen(reading, "rb") as stream:
        answer = stream.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return request.without_answer(*_killed_by(os.WTERMSIG(status), request, _last_line(said_before)))
    try:
        return pickle.loads(answer)
    except (EOFError, pickle.UnpicklingError):
        code = os.waitstatus_to_exitcode(status)
        return request.without_answer("error", f"the process ended with exit code {code}{_last_line(said_before)}")


def _run(request: Request, writing: int) -> NoReturn:
    """In the fork. The alarm has its default action, which ends the process wherever it is."""
    import dill

    from .probe import probe

    end_with_parent()
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, request.timeout_seconds)
    try:
        request.device.prepare()
        trial = probe(dill.loads(request.workload), request.batch_size, request.device)
    except Exception as error:  # whatever the model's own code raises
        traceback.print_exc()
        trial = request.without_answer("error", _describe(error))
    with os.fdopen(writing, "wb") as stream:
        pickle.dump(trial, stream)
    os._exit(0)


def _describe(error: Exception) -> str:
    where = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({Path(where.filename).name}, line {where.lineno})"


def _killed_by(number: int, request: Request, said: str) -> tuple[Outcome, str]:
    if number == signal.SIGALRM:
        return "timeout", f"no answer in {request.timeout_seconds:g} s"
    if number in (signal.SIGKILL, signal.SIGTERM):
        name = signal.Signals(number).name
        return "killed", f"the process was killed ({name}); the system does so when the host's memory runs out"
    return "crash", f"the process died of {signal.Signals(number).name}{said}"


def _standard_error_bytes() -> int:
    """How much was written so far, where standard error is a file."""
    try:
        return os.lseek(2, 0, os.SEEK_CUR)
    except OSError:
        return 0


def _last_line(since: int) -> str:
    """The last line on standard error, where it is a file that can be read again."""
    try:
        end = os.lseek(2, 0, os.SEEK_CUR)
        said = os.pread(2, TAIL_BYTES, max(since, end - TAIL_BYTES)).decode(errors="replace")
    except OSError:
        return ""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    return f": {lines[-1]}" if lines else ""


def _send(stream: BinaryIO, value: object) -> None:
    pickle.dump(value, stream)
    stream.flush()


def main() -> None:
    """Serves on the standard streams."""
    import warnings

    end_with_parent()
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    warnings.filterwarnings("ignore")
    for module in IMPORTED_EARLY:
        importlib.import_module(module)
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    serve(sys.stdin.buffer, answers)


if __name__ == "__main__":
    main()
