"""The processes of benchmarks/peers.py: one for each search, and one for each training run that tells the truth."""

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

from peers_cases import Case, Place, Search
from peers_contenders import OURS, PEERS, Entry, import_everything, our_search, trainer
from peers_watch import Watch

from hf_bsopt.probing.oom import out_of_memory
from hf_bsopt.virtual_gpu.processes import end_with_parent

SIZES_ABOVE = 4  # tried too, since a larger size can fit where a smaller one does not
OUTPUT = "output.txt"
LAST_WORDS = 300
SCRIPT = Path(__file__).with_name("peers.py")


# ---- a search, in a process of its own -------------------------------------------------------------------------------


def our_turn(case: Case, place: Place) -> Search:
    request = {"job": "ours", "case": asdict(case), "place": asdict(place)}
    return _timed(OURS[place.kind], os.environ, place.timeout_seconds, request)


def turn_of(entry: Entry, case: Case, place: Place) -> Search:
    request = {"job": "peer", "entry": asdict(entry), "case": asdict(case), "place": asdict(place)}
    return _timed(entry.name, place.environment(), place.timeout_seconds, request)


def _timed(name: str, environment: Mapping[str, str], timeout_seconds: float, request: dict[str, Any]) -> Search:
    """From the start of the process, its imports included, to its answer."""
    started = time.monotonic()
    answer, failure = ask(environment, timeout_seconds, request)
    seconds = time.monotonic() - started
    search = Search(name, failure=failure) if answer is None else Search.of(answer)
    search.wall_seconds = seconds
    return search


def ask(environment: Mapping[str, str], seconds: float, request: dict[str, Any]) -> tuple[dict[str, Any] | None, str]:
    """What `worker` answers in a process with that environment, or why there is no answer."""
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
        words = f"the process died: {_end_of(errors.read())}"
    return None, f"not done after {seconds:g} s" if is_late.is_set() else words


def worker(request: dict[str, Any]) -> None:
    """What `ask` started: its answer is one line of JSON. What libraries print is no answer."""
    end_with_parent()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    warnings.filterwarnings("ignore")
    case = Case(**{**request["case"], "starts": tuple(request["case"]["starts"])})
    place = Place(**request["place"])
    answer = JOBS[request["job"]](case, place, request)
    print(json.dumps(answer), file=answers, flush=True)


def _ours(case: Case, place: Place, _: dict[str, Any]) -> dict[str, Any]:
    try:
        return asdict(our_search(case, place))
    except Exception as error:
        return asdict(Search(OURS[place.kind], failure=_told(error)))


def _peer(case: Case, place: Place, request: dict[str, Any]) -> dict[str, Any]:
    entry = Entry(**request["entry"])
    peer = PEERS[entry.peer]
    import_everything(peer.package)
    place.prepare()
    watch = Watch(place)
    try:
        return asdict(watch.search(entry.name, peer.search(case, watch, entry.start)))
    except Exception as error:  # any contender may fail in a way of its own, and that is its result
        return asdict(watch.search(entry.name, None, _told(error)))


def _end_of(output: str) -> str:
    """Its last line."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return lines[-1][-LAST_WORDS:] if lines else "without a word"


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:LAST_WORDS]


# ---- the true largest ------------------------------------------------------------------------------------------------


class Truth:
    """Whether Trainer trains at a size: three steps in a fresh process, each size once."""

    def __init__(self, fits: Callable[[int], bool]) -> None:
        self._run = fits
        self.known: dict[int, bool] = {}

    def fits(self, size: int) -> bool:
        if size not in self.known:
            self.known[size] = self._run(size)
        return self.known[size]

    def largest(self, start: int) -> int:
        """From ``start`` in growing strides, bisection, and then the sizes right above; 0 where nothing fits."""
        low, high = self._around(max(1, start))
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.fits(middle) else (low, middle)
        return max([low, *(size for size in range(high, high + SIZES_ABOVE) if self.fits(size))])

    def _around(self, start: int) -> tuple[int, int]:
        """(a size that fits, or 0; one that does not)"""
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
        """What is wrong with ``largest`` as the true largest; empty if nothing is."""
        if not self.fits(largest):
            return f"{largest} does not fit"
        return f"{largest + 1} fits too" if self.fits(largest + 1) else ""


def truth(case: Case, place: Place, start: int, sizes: list[int], largest: int | None) -> tuple[int, dict[int, bool]]:
    """The true largest size, found from ``start`` where it is not given, and whether Trainer trains at ``sizes``.

    Raises SystemExit where ``largest`` is not it, or where training ends otherwise than by memory.
    """
    asked = {"start": start, "sizes": sizes, "largest": largest}
    request = {"job": "truth", **asked, "case": asdict(case), "place": asdict(place)}
    answer, failure = ask(place.environment(), 100 * place.timeout_seconds, request)
    failure = failure or (answer or {})["failure"]
    if answer is None or failure:
        raise SystemExit(f"{case.name}: {failure}")
    return answer["largest"], {int(size): fits for size, fits in answer["fits"].items()}


def _truth(case: Case, place: Place, request: dict[str, Any]) -> dict[str, Any]:
    sys.modules["bitsandbytes"] = None  # type: ignore[assignment]  # it uses CUDA as it is imported: no fork could then
    import_everything("transformers")
    if not place.computes:
        import torch

        torch.set_num_threads(1)  # a pool of threads would not survive the fork

    def fits(size: int) -> bool:
        search = in_a_fork(train_for_real, case, place, size)
        if search.failure:
            raise RuntimeError(f"training at {size}: {search.failure}")
        return search.size is not None

    known = Truth(fits)
    largest: int | None = request["largest"]
    try:
        failure = "" if largest is None else known.confirm(largest)
        failure = failure and f"--largest: {failure}"
        found = known.largest(request["start"]) if largest is None else largest
        return {"largest": found, "fits": {size: known.fits(size) for size in request["sizes"]}, "failure": failure}
    except RuntimeError as error:
        return {"failure": str(error)}


def train_for_real(case: Case, watch: Watch, batch_size: int) -> Search:
    """Without traces of the errors: what they hold is of no use any more."""
    try:
        trainer(case, watch, batch_size, auto_find=False).train()
    except Exception as error:
        found = out_of_memory(error)
        if found is None:
            raise
        return watch.search("truth", None)
    return watch.search("truth", batch_size)


def in_a_fork(function: Callable[[Case, Watch, int], Search], case: Case, place: Place, size: int) -> Search:
    """``function(case, watch, size)`` in a fork of this process, which has imported everything and not yet touched the
    device. What it prints is dropped, but for the end of it where it dies.
    """
    forking = multiprocessing.get_context("fork")
    receiver, sender = forking.Pipe(duplex=False)
    with tempfile.TemporaryDirectory() as folder:
        child = forking.Process(target=_child, args=(sender, Path(folder), function, case, place, size))
        child.start()
        sender.close()
        try:
            answer: Search | None = receiver.recv() if receiver.poll(place.timeout_seconds) else None
            failure = "" if answer else f"not done after {place.timeout_seconds:g} s"
        except EOFError:
            answer, failure = None, f"the process died: {_end_of((Path(folder) / OUTPUT).read_text())}"
        if answer is None:
            child.kill()
        child.join()
        return answer or Search("truth", failure=failure)


def _child(
    sender: Connection,
    folder: Path,
    function: Callable[[Case, Watch, int], Search],
    case: Case,
    place: Place,
    size: int,
) -> None:
    end_with_parent()
    os.chdir(folder)
    with (folder / OUTPUT).open("w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    try:
        place.prepare()
        sender.send(function(case, Watch(place), size))
    except Exception as error:
        sender.send(Search("truth", failure=_told(error)))


JOBS: dict[str, Callable[[Case, Place, dict[str, Any]], dict[str, Any]]] = {
    "ours": _ours,
    "peer": _peer,
    "truth": _truth,
}
