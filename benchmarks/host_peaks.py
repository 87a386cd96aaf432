"""Compare the measured peak memory of a training process on this machine's CPU with the prediction.

    python benchmarks/host_peaks.py --model bert-mini --max_length 128 2 4 16 32 64 128

Each size is trained in its own fork: one step with two sequences, then two of the full size, as a probe on a CPU does
(hf_bsopt/probing/devices.py). ``base``: resident memory of the fork before anything runs. ``files``: pages of library
files that the steps made resident. ``peak``: VmHWM of /proc/self/status. ``unexplained``: the part of the peak that is
not in the base, in files or in the replay of the traced step.
"""

from __future__ import annotations

import argparse
import gc
import os
import pickle
import re
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from hf_bsopt.memory import Predictor  # noqa: E402
from hf_bsopt.probing.devices import FEW_SEQUENCES  # noqa: E402
from hf_bsopt.probing.host_memory import ProcessStatus, limit_this_process  # noqa: E402
from hf_bsopt.records import GpuSpec  # noqa: E402
from hf_bsopt.workloads.meta_device import initialized  # noqa: E402
from hf_bsopt.workloads.training_step import TrainingStep  # noqa: E402
from hf_bsopt.workloads.workload import Workload, describe  # noqa: E402

CPU = GpuSpec("CPU", None, 0, 0, 0, kind="cpu")
FULL_STEPS = 2
ENOUGH_BYTES = 1 << 40
MIB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="bert-mini")
    parser.add_argument("--task", default="sequence-classification")
    parser.add_argument("--max_length", type=int, default=128)
    parser.add_argument("sizes", type=int, nargs="+")
    arguments = parser.parse_args()
    workload = describe(arguments.model, task=arguments.task, max_length=arguments.max_length, precision="fp32")
    with torch.device("meta"):
        workload.build()  # transformers imports the model's module at the first build: do it here, not in each fork
    print(f"{arguments.model}, {workload.task}, {arguments.max_length} tokens, fp32, torch {torch.__version__}; MiB")
    predictor = Predictor(workload, CPU)
    print("batch size    base   files    peak    live  replay  unexplained")
    for size in arguments.sizes:
        run = in_fork(workload, size)
        live, replayed = predictor.timeline.live_bytes(size, CPU), predictor.unlimited(size)
        rest = run.peak - run.base - run.files - replayed
        cells = "".join(f"{amount / MIB:8.0f}" for amount in (run.base, run.files, run.peak, live, replayed))
        print(f"{size:10}{cells}{rest / MIB:7.0f} {rest / run.peak:5.1%}", flush=True)


@dataclass(frozen=True)
class Run:
    """Bytes of one run, as the module's docstring defines them."""

    base: int
    files: int
    peak: int


def in_fork(workload: Workload, batch_size: int) -> Run:
    """Train this micro-batch in a fork of its own."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        with os.fdopen(writing, "wb") as stream:
            pickle.dump(train(workload, batch_size), stream)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as stream:
        run: Run = pickle.load(stream)
    os.waitpid(child, 0)
    return run


def train(workload: Workload, batch_size: int) -> Run:
    base, files = ProcessStatus.read().resident_bytes, resident_files()
    limit_this_process(ENOUGH_BYTES)  # starts the threads, as in a probe
    with torch.device("cpu"):
        model = initialized(workload.build(), "cpu")
    gc.collect()
    step = TrainingStep(model, workload.settings, "cpu")
    step.worst_case(workload, min(FEW_SEQUENCES, batch_size), "cpu", padded=False)
    for _ in range(FULL_STEPS):
        step.worst_case(workload, batch_size, "cpu")
    return Run(base, resident_files() - files, ProcessStatus.read().peak_resident_bytes)


def resident_files() -> int:
    match = re.search(r"^RssFile:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(match[1]) * 1024 if match else 0


if __name__ == "__main__":
    main()
