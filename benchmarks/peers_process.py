"""The processes of benchmarks/peers.py: one for each search, and one for each run that checks whether a size fits."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from peers_cases import Case, RunDevice, Search
from peers_contenders import OURS, PEERS, Entry, import_everything, our_search, trainer
from peers_monitor import Monitor

from hf_bsopt.probing.oom import out_of_memory
from hf_bsopt.virtual_gpu.processes import end_with_parent

SIZES_ABOVE = 4  # also tried: a larger size can fit where a smaller one does not
OUTPUT = "output.txt"
MOST_CHARACTERS = 300
"""Length of an error message in the table."""
SCRIPT = Path(__file__).with_name("peers.py")


# ---- a search, in a process of its own -------------------------------------------------------------------------------


def run_our_search(case: Case, device: RunDevice) -> Search:
    request = {"job": "ours", "case": asdict(case), "device": asdict(device)}
    return _timed(OURS[device.kind], os.environ, device.timeout_seconds, request)


def run_peer_search(entry: Entry, case: Case, device: RunDevice) -> Search:
    request = {"job": "peer", "entry": asdict(entry), "case": asdict(case), "device": asdict(device)}
    return _timed(entry.name, device.environment(), device.timeout_seconds, request)


def _timed(name: str, environment: Mapping[str, str], timeout_seconds: float, request: dict[str, Any]) -> Search:
    """Run a search and take its wall time, from the start of the process, with its imports, to its answer."""
    started = time.monotonic()
    answer, failure = call_worker(environment, timeout_seconds, request)
    seconds = time.monotonic() - started
    search = Search(name, failure=failure) if answer is None else Search.of(answer)
    search.wall_seconds = seconds
    return search


def call_worker(
    environment: Mapping[str, str], seconds: float, request: dict[str, Any]
) -> tuple[dict[str, Any] | None, str]:
    """Run :func:`worker` in a process with this environment. Return (answer, "") or (None, why there is none)."""
    command = [sys.executable, str(SCRIPT), "--worker", json.dumps(request)]
    is_late = threading.Event()
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as errors:
        child = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=errors, cwd=folder, start_new_session=True
        )

        def end() -> None:
            is_late.set()
            os.killpg(child.pid, signal.SIGKILL)

        timer = threading.Timer(seconds, end)
        timer.start()
        assert child.stdout is not None
        line = child.stdout.readline()
        timer.cancel()
        child.stdout.close()
        child.wait()
        if line and not is_late.is_set():
            return json.loads(line), ""
        errors.seek(0)
        words = f"the process died: {_last_line(errors.read())}"
    return None, f"not done after {seconds:g} s" if is_late.is_set() else words


def worker(request: dict[str, Any]) -> None:
    """Do the job of a request and print the answer as one line of JSON. Output of libraries goes to stderr."""
    end_with_parent()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    warnings.filterwarnings("ignore")
    case = Case(**{**request["case"], "starts": tuple(request["case"]["starts"])})
    device = RunDevice(**request["device"])
    answer = JOBS[request["job"]](case, device, request)
    print(json.dumps(answer), file=answers, flush=True)


def _ours(case: Case, device: RunDevice, _: dict[str, Any]) -> dict[str, Any]:
    try:
        return asdict(our_search(case, device))
    except Exception as error:
        return asdict(Search(OURS[device.kind], failure=_error_text(error)))


def _peer(case: Case, device: RunDevice, request: dict[str, Any]) -> dict[str, Any]:
    entry = Entry(**request["entry"])
    peer = PEERS[entry.peer]
    import_everything(peer.package)
    device.prepare()
    monitor = Monitor(device)
    try:
        return asdict(monitor.search(entry.name, peer.search(case, monitor, entry.start)))
    except Exception as error:  # a contender may fail in any way; that is its result
        return asdict(monitor.search(entry.name, None, _error_text(error)))


def _last_line(output: str) -> str:
    """Return the last line that is not empty, shortened."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return lines[-1][-MOST_CHARACTERS:] if lines else "no output"


def _error_text(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:MOST_CHARACTERS]


# ---- the true largest ------------------------------------------------------------------------------------------------


class GroundTruth:
    """Sizes at which Trainer runs three steps in a fresh process; each size is run once."""

    def __init__(self, fits: Callable[[int], bool]) -> None:
        self._run = fits
        self.known: dict[int, bool] = {}

    def fits(self, size: int) -> bool:
        if size not in self.known:
            self.known[size] = self._run(size)
        return self.known[size]

    def largest(self, start: int) -> int:
        """Return the largest size that fits; 0 if none does.

        Search from ``start`` in growing strides, bisect, then try the next SIZES_ABOVE sizes.
        """
        low, high = self._around(max(1, start))
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.fits(middle) else (low, middle)
        return max([low, *(size for size in range(high, high + SIZES_ABOVE) if self.fits(size))])

    def _around(self, start: int) -> tuple[int, int]:
        """Return (a size that fits, or 0; a larger one that does not)."""
        stride = max(1, start // 32)
        if self.fits(start):
            low = start
            while self.fits(low + stride):
                low, stride = low + stride, 2 * stride
            return low, low + stride
        high = start
        while high > 1:
            low = max(1, high - stride)
            if self.fits(low):
                return low, high
            high, stride = low, 2 * stride
        return 0, 1

    def confirm(self, largest: int) -> str:
        """Return why ``largest`` is not the largest size that fits; an empty string if it is."""
        if not self.fits(largest):
            return f"{largest} does not fit"
        return f"{largest + 1} fits too" if self.fits(largest + 1) else ""


def truth(
    case: Case, device: RunDevice, start: int, sizes: list[int], largest: int | None
) -> tuple[int, dict[int, bool]]:
    """Return the true largest size, and for each of ``sizes`` whether Trainer trains at it.

    ``largest`` is confirmed if it is given; otherwise the search starts at ``start``. Raise SystemExit if ``largest``
    is wrong, or if training fails for another reason than memory.
    """
    asked = {"start": start, "sizes": sizes, "largest": largest}
    request = {"job": "truth", **asked, "case": asdict(case), "device": asdict(device)}
    answer, failure = call_worker(device.environment(), 100 * device.timeout_seconds, request)
    failure = failure or (answer or {})["failure"]
    if answer is None or failure:
        raise SystemExit(f"{case.name}: {failure}")
    return answer["largest"], {int(size): fits for size, fits in answer["fits"].items()}


def _truth(case: Case, device: RunDevice, request: dict[str, Any]) -> dict[str, Any]:
    sys.modules["bitsandbytes"] = None  # type: ignore[assignment]  # its import uses CUDA, after which no fork can
    import_everything("transformers")
    if not device.computes:
        import torch

        torch.set_num_threads(1)  # a thread pool does not survive a fork

    def fits(size: int) -> bool:
        search = in_a_fork(train_with_trainer, case, device, size)
        if search.failure:
            raise RuntimeError(f"training at {size}: {search.failure}")
        return search.size is not None

    known = GroundTruth(fits)
    largest: int | None = request["largest"]
    try:
        failure = "" if largest is None else known.confirm(largest)
        failure = failure and f"--largest: {failure}"
        found = known.largest(request["start"]) if largest is None else largest
        return {"largest": found, "fits": {size: known.fits(size) for size in request["sizes"]}, "failure": failure}
    except RuntimeError as error:
        return {"failure": str(error)}


def train_with_trainer(case: Case, monitor: Monitor, batch_size: int) -> Search:
    """Train with Trainer at this size. If it runs out of memory, the result's ``size`` is None; the error, whose
    traceback holds tensors, is dropped.
    """
    try:
        trainer(case, monitor, batch_size, auto_find=False).train()
    except Exception as error:
        found = out_of_memory(error)
        if found is None:
            raise
        return monitor.search("truth", None)
    return monitor.search("truth", batch_size)


def in_a_fork(function: Callable[[Case, Monitor, int], Search], case: Case, device: RunDevice, size: int) -> Search:
    """Run ``function(case, monitor, size)`` in a fork of this process, which has imported everything but not yet used
    the device. The fork's output is dropped, except for the last line if it dies.
    """
    forking = multiprocessing.get_context("fork")
    receiver, sender = forking.Pipe(duplex=False)
    with tempfile.TemporaryDirectory() as folder:
        child = forking.Process(target=_child, args=(sender, Path(folder), function, case, device, size))
        child.start()
        sender.close()
        try:
            answer: Search | None = receiver.recv() if receiver.poll(device.timeout_seconds) else None
            failure = "" if answer else f"not done after {device.timeout_seconds:g} s"
        except EOFError:
            answer, failure = None, f"the process died: {_last_line((Path(folder) / OUTPUT).read_text())}"
        if answer is None:
            child.kill()
        child.join()
        return answer or Search("truth", failure=failure)


def _child(
    sender: Connection,
    folder: Path,
    function: Callable[[Case, Monitor, int], Search],
    case: Case,
    device: RunDevice,
    size: int,
) -> None:
    end_with_parent()
    os.chdir(folder)
    with (folder / OUTPUT).open("w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    try:
        device.prepare()
        sender.send(function(case, Monitor(device), size))
    except Exception as error:
        sender.send(Search("truth", failure=_error_text(error)))


JOBS: dict[str, Callable[[Case, RunDevice, dict[str, Any]], dict[str, Any]]] = {
    "ours": _ours,
    "peer": _peer,
    "truth": _truth,
}
