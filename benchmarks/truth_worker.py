"""The worker that benchmarks/record_truth.py starts for each GPU. It imports everything once and forks for each case.

Each line of standard input is a request, {"case", "gpu", "device", "timeout"}; each line of standard output its answer,
{"row", "error"}. A fork of a process that has used CUDA cannot use it, so this process never does. bitsandbytes uses
CUDA while it is imported, so its cases run in a new interpreter.
"""

from __future__ import annotations

import importlib.util
import json
import os
import select
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cases import Case

from hf_bsopt.records import GpuSpec

Request = dict[str, Any]
Answer = dict[str, Any]


def serve() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # output of libraries goes to stderr
    sys.modules["bitsandbytes"] = None  # type: ignore[assignment]  # otherwise peft imports it
    _import_everything()
    for line in iter(sys.stdin.readline, ""):
        print(json.dumps(answer_of(json.loads(line))), file=answers, flush=True)


def _import_everything() -> None:
    import trainer_run  # noqa: F401

    if importlib.util.find_spec("peft") is not None:
        import peft  # noqa: F401


def answer_of(request: Request) -> Answer:
    """Run a request in a fork, which may time out, crash or print, and return its answer."""
    reader, writer = os.pipe()
    with tempfile.TemporaryFile() as printed:
        process = os.fork()
        if process == 0:
            os.close(reader)
            os.dup2(printed.fileno(), 1)
            os.dup2(printed.fileno(), 2)
            _answer_and_exit(request, writer)
        os.close(writer)
        text = _read_within(reader, request["timeout"])
        os.close(reader)
        if text is None:
            os.kill(process, signal.SIGKILL)
        _, status = os.waitpid(process, 0)
        printed.seek(0)
        last_line = (printed.read().decode(errors="replace").strip().splitlines() or [""])[-1]
    if text is None:
        return {"row": None, "error": f"not done after {request['timeout']} s"}
    if not text:
        return {"row": None, "error": f"died ({os.waitstatus_to_exitcode(status)}): {last_line}"}
    answer: Answer = json.loads(text)
    return answer


def _read_within(reader: int, seconds: float) -> str | None:
    """Read until the end of the stream; return None if it does not end in time."""
    parts: list[bytes] = []
    end = time.monotonic() + seconds
    while select.select([reader], [], [], max(0.0, end - time.monotonic()))[0]:
        part = os.read(reader, 2**16)
        if not part:
            return b"".join(parts).decode()
        parts.append(part)
    return None


def _answer_and_exit(request: Request, writer: int) -> NoReturn:
    case = Case(**request["case"])
    if "bitsandbytes" in case.needs and "bitsandbytes" in sys.modules:  # in the fork, where it is None
        os.set_inheritable(writer, True)
        os.execv(sys.executable, [sys.executable, __file__, json.dumps(request), str(writer)])
    try:
        from trainer_run import record

        answer: Answer = {"row": record(case, GpuSpec(**request["gpu"]), request["device"])}
    except BaseException as error:
        answer = {"row": None, "error": f"{type(error).__name__}: {error}".splitlines()[0]}
    os.write(writer, json.dumps(answer).encode())
    os._exit(0)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        _answer_and_exit(json.loads(sys.argv[1]), int(sys.argv[2]))
    serve()
