"""Run a table of cases with the real Trainer and record their memory in benchmarks/truth/<device>-<torch>.csv.

    python benchmarks/record_truth.py                                  # the virtual device: CUDA build, no GPU
    python benchmarks/record_truth.py --device cuda                    # the GPU of this machine, in place of each
    python benchmarks/record_truth.py --only "T4 dmis" --out some.csv  # cases whose line contains this
    python benchmarks/record_truth.py --cases benchmarks/truth/rehearsed.csv --out again.csv
    python benchmarks/record_truth.py --device cuda --cases benchmarks/on_gpu_cases.csv --seconds 150 --out gpu.csv

Every case runs in a process of its own (truth_worker.py, trainer_run.py). A case that fits or runs out of memory
becomes a row; one that fails otherwise is only printed. Rows are written as they arrive, so that they are kept if this
process is stopped. With --seconds no case starts in the last 15 seconds. The columns, and what a case runs:
truth/README.md. The exit code is 1 if nothing was recorded.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import dataclasses
import importlib.util
import io
import json
import math
import os
import re
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cases import CASES, Case, Row, by_gpu, cases_of

from hf_bsopt._utils.files import write_atomically
from hf_bsopt.data import catalog
from hf_bsopt.records import GpuSpec

HERE = Path(__file__).resolve().parent
COLUMNS = [
    *("kind", "model", "task", "precision", "attention", "batch_size", "max_length", "optimizer"),
    *("gradient_accumulation", "activation_checkpointing", "lora_r", "load_in_4bit", "gpu", "sm", "total_bytes"),
    *("status", "allocated_bytes", "reserved_bytes", "device_bytes", "alloc_retries", "torch", "transformers"),
    *("source", "expandable_segments", "context_bytes", "step_seconds"),
]
SHORTEST_SECONDS = 15.0
"""Least time for a case: three steps, and the imports if it is the first of a worker."""


@dataclass(frozen=True)
class Answer:
    """The outcome of a case: a row, or an error message."""

    case: Case
    row: Row | None
    error: str = ""


def environment_of(gpu: GpuSpec, device: str) -> dict[str, str]:
    """Return the environment of a process that sees this virtual GPU, or the GPU of this machine."""
    environment = {**os.environ, "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}  # is_available() must not initialize the driver
    if device == "virtual":
        from hf_bsopt.virtual_gpu import environment as virtual

        environment = virtual(gpu)
    return {**environment, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


class Worker:
    """A process that has imported everything and sees one GPU."""

    def __init__(self, gpu: GpuSpec, device: str) -> None:
        self.gpu = gpu
        self._device = device
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "truth_worker.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment_of(gpu, device),
        )

    def sees(self, gpu: GpuSpec) -> bool:
        return self._device == "cuda" or gpu == self.gpu

    def run(self, case: Case, gpu: GpuSpec, timeout: float) -> Answer:
        request = {"case": asdict(case), "gpu": asdict(gpu), "device": self._device, "timeout": timeout}
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # the worker died: the answer is empty
            print(json.dumps(request), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        if not line:
            return Answer(case, None, f"the worker for {self.gpu.name} died")
        return Answer(case, **json.loads(line))

    @property
    def is_running(self) -> bool:
        return self._process.poll() is None

    def close(self) -> None:
        self._process.communicate()


def run_all(cases: Sequence[Case], args: argparse.Namespace, save: Callable[[list[Answer]], None]) -> list[Answer]:
    """Run the cases and return their answers in the same order.

    ``save`` is called with all answers so far whenever one arrives. A worker is reused while the GPU is the same; with
    ``--device cuda`` one worker serves all cases.
    """
    waiting = deque(enumerate(cases))
    answers: dict[int, Answer] = {}
    saving = threading.Lock()
    end = time.monotonic() + args.seconds
    with tqdm(total=len(cases), disable=None, unit="case") as bar:

        def run_cases(_: int) -> None:
            worker: Worker | None = None
            while (left := end - time.monotonic()) >= SHORTEST_SECONDS or math.isinf(left):
                try:
                    index, case = waiting.popleft()
                except IndexError:
                    break
                gpu = gpu_of(case, args.memory)
                if worker is None or not worker.sees(gpu) or not worker.is_running:
                    if worker is not None:
                        worker.close()
                    worker = Worker(gpu, args.device)
                answer = worker.run(case, gpu, min(args.timeout, left))
                with saving:
                    answers[index] = answer
                    save([answers[index] for index in sorted(answers)])
                bar.update()
            if worker is not None:
                worker.close()

        with ThreadPoolExecutor(args.jobs) as pool:
            list(pool.map(run_cases, range(args.jobs)))
    return [answers[index] for index in sorted(answers)]


def gpu_of(case: Case, memory: int | None) -> GpuSpec:
    gpu = catalog.gpu(case.gpu)
    return gpu if memory is None else dataclasses.replace(gpu, total_bytes=memory)


def line_of(case: Case) -> str:
    """Describe a case in a line, without the options that have their default."""
    row = case.row()
    shape = f"{row['gpu']} {row['model']} {row['task']} {row['batch_size']}x{row['max_length']}"
    usual = Case(case.gpu, case.model, case.task, case.batch_size, case.max_length).row()
    options = [f"{name}={value}" for name, value in row.items() if value != usual[name]]
    return " ".join([shape, *options])


def runnable(cases: Sequence[Case]) -> tuple[list[Case], list[str]]:
    """Return the cases whose packages are installed, and a line for each of the others."""
    missing = {name for case in cases for name in case.needs if importlib.util.find_spec(name) is None}
    left_out = [f"{line_of(case)}: needs {name}" for case in cases for name in case.needs if name in missing]
    return [case for case in cases if not missing.intersection(case.needs)], left_out


def text_of(rows: list[Row]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def path_for(rows: list[Row], device: str) -> Path:
    name = "virtual" if device == "virtual" else re.sub(r"\W+", "-", rows[0]["source"].split(",")[0].lower())
    return HERE / "truth" / f"{name}-{rows[0]['torch']}.csv"


def save_to(path: Path | None, device: str) -> Callable[[list[Answer]], None]:
    """Return a function that writes the rows of answers to the path, by default to the file of their device."""

    def save(answers: list[Answer]) -> None:
        rows = rows_of(answers)
        if rows:
            write_atomically(path or path_for(rows, device), text_of(rows))

    return save


def rows_of(answers: list[Answer]) -> list[Row]:
    return [answer.row for answer in answers if answer.row is not None]


def memory_of(text: str) -> int:
    total = catalog.gpu(text).total_bytes
    assert total is not None
    return total


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["virtual", "cuda"], default="virtual")
    parser.add_argument(
        "--memory", type=memory_of, metavar="SIZE", help="memory such as 15GiB in place of each GPU's own"
    )
    parser.add_argument("--cases", type=Path, metavar="CSV", help="other cases, with the columns of benchmarks/truth")
    parser.add_argument("--only", default="", metavar="WORDS", help="only cases whose line contains this")
    parser.add_argument("--list", action="store_true", help="print the lines of the cases")
    parser.add_argument("--out", type=Path, metavar="CSV", help="required unless all cases are run")
    parser.add_argument(
        "--jobs",
        type=int,
        help="parallel processes (default: 1 on a GPU, so that it is not shared; 2 on the virtual device)",
    )
    parser.add_argument("--timeout", type=int, default=300, metavar="SECONDS", help="time limit of one case")
    parser.add_argument(
        "--seconds", type=float, default=math.inf, help="time limit of all cases; those that were not run are named"
    )
    args = parser.parse_args()
    args.jobs = args.jobs or (1 if args.device == "cuda" else 2)
    table = cases_of(args.cases) if args.cases else CASES
    cases, left_out = runnable([case for case in table if args.only in line_of(case)])
    cases = cases if args.device == "cuda" else by_gpu(cases)
    if args.list:
        print(*map(line_of, cases), sep="\n")
        return 0
    if args.out is None and (args.cases or args.only or args.memory or args.seconds != math.inf):
        parser.error("--out is required: the file of the whole table is not overwritten with other rows")
    started = time.monotonic()
    answers = run_all(cases, args, save_to(args.out, args.device))
    rows = rows_of(answers)
    errors = [f"{line_of(answer.case)}: {answer.error}" for answer in answers if answer.row is None]
    done = [answer.case for answer in answers]
    left_out += [f"{line_of(case)}: no time left" for case in cases if case not in done]
    for title, lines in (("left out", left_out), ("failed", errors)):
        print(f"{len(lines)} {title}", *lines, sep="\n  ")
    if not rows:
        print("nothing was recorded")
        return 1
    path = args.out or path_for(rows, args.device)
    out_of_memory = sum(row["status"] == "oom" for row in rows)
    print(f"{len(rows)} rows ({out_of_memory} out of memory) in {time.monotonic() - started:.0f} s: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
