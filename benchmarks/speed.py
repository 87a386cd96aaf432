"""Measure how long the whole command takes, as a ratio to a baseline in the same run.

    python benchmarks/speed.py --repeat 3

The baseline of a prediction is the same imports and the same model built on meta; that of a rehearsal, where one is
possible, is the bare import of torch, transformers and its Trainer. Both run in turns, each in a process of its own;
the ratio is that of the medians. Peak memory is that of the command's largest process (ru_maxrss).
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from hf_bsopt import virtual_gpu  # noqa: E402

CASES: dict[str, tuple[list[str], float | None]] = {
    "BioBERT": (["--model", "dmis-lab/biobert-v1.1", "--gpu", "T4"], 1.7),
    "BioBERT, rehearsed": (["--model", "dmis-lab/biobert-v1.1", "--gpu", "T4"], 2.5),
    "Llama-3.2-3B, LoRA, 4-bit": (
        ["--model", "meta-llama/Llama-3.2-3B", "--gpu", "A100-40GB", "--bf16", "--lora_r", "16", "--load_in_4bit"],
        2.5,
    ),
    "Llama-3.1-70B": (
        ["--model", "meta-llama/Llama-3.1-70B", "--gpu", "H200", "--precision", "bf16-weights", "--advise", "False"],
        3.0,
    ),
    "Llama-3.1-405B": (
        ["--model", "meta-llama/Llama-3.1-405B", "--gpu", "H200", "--precision", "bf16-weights", "--advise", "False"],
        None,
    ),
}
"""(arguments, the limit of the ratio or None)"""

BASELINE = """
import sys
sys.path.insert(0, {root!r})
from hf_bsopt.cli.arguments import parse
from hf_bsopt.cli.find import silence_libraries
import hf_bsopt.api, hf_bsopt.memory.predictor, accelerate.utils.operations, torch
arguments = parse(sys.argv[1:])
silence_libraries(False)
from hf_bsopt.workloads.workload import describe
workload = describe(arguments.model.model, arguments.options.model)
with torch.device("meta"):
    workload.build()
"""


BARE_IMPORT = "import torch, transformers; from transformers import Trainer"


@dataclass(frozen=True)
class Run:
    seconds: float
    peak_gib: float
    exit_code: int


def run(command: list[str]) -> Run:
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    unit = 1 if sys.platform == "darwin" else 2**10
    return Run(time.perf_counter() - start, usage.ru_maxrss * unit / 2**30, os.waitstatus_to_exitcode(status))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--only", help="only cases whose name contains this")
    args = parser.parse_args()
    passed = True
    print(f"{'case':28} {'baseline':>9} {'command':>9} {'ratio':>6} {'limit':>6} {'peak memory':>12}  exit")
    for name, (arguments, limit) in CASES.items():
        if args.only and args.only.lower() not in name.lower():
            continue
        is_rehearsed = "rehearsed" in name
        if is_rehearsed and (reason := virtual_gpu.why_not()) is not None:
            print(f"{name:28} left out: {reason}")
            continue
        baseline = BARE_IMPORT if is_rehearsed else BASELINE.format(root=str(ROOT))
        device = ["--device", "rehearse" if is_rehearsed else "predict"]
        baselines: list[Run] = []
        commands: list[Run] = []
        for _ in range(args.repeat):
            baselines.append(run([sys.executable, "-c", baseline, *arguments]))
            commands.append(run([sys.executable, str(ROOT / "find_optimal_batch_size.py"), *arguments, *device]))
        before, after = (statistics.median(r.seconds for r in side) for side in (baselines, commands))
        peak = max(r.peak_gib for r in commands)
        ratio = after / before
        passed &= (limit is None or ratio <= limit) and peak < 1.5 and all(r.exit_code == 0 for r in baselines)
        print(
            f"{name:28} {before:8.1f}s {after:8.1f}s {ratio:6.2f} {limit or '–':>6} {peak:8.2f} GiB  "
            f"{commands[-1].exit_code}",
            flush=True,
        )
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
