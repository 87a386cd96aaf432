"""Compare the virtual device with published measurements on real GPUs: the rows of forward and backward.

    python benchmarks/rehearse_published.py --max_worst 3

Needs the CUDA build of torch and a C compiler (hf_bsopt.virtual_gpu.why_not says what is missing). Each row runs in a
process of its own. Columns of the file: benchmarks/truth/README.md. The exit code is 1 if the limit is exceeded.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from hf_bsopt import virtual_gpu  # noqa: E402
from hf_bsopt.data import catalog  # noqa: E402

Row = dict[str, str]
PUBLISHED = ROOT / "benchmarks" / "truth" / "published.csv"


def run_on_device(row: Row) -> int:
    """Return the peak of ``torch.cuda.max_memory_allocated`` in bytes, measured as in the published rows.

    Weights in half precision, a mask of ones (which SDPA drops if it can read it); twice: gradients set to None,
    forward, backward of the sum of the logits while the outputs are still referenced.
    """
    import torch
    from accuracy import workload_of

    workload, batch_size = workload_of(row), int(row["batch_size"])
    with torch.device("cuda"):
        model = workload.build().train()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    batch = workload.batch(batch_size, "cuda")
    del batch["labels"]
    if workload.attention == "sdpa":
        del batch["attention_mask"]
    for _ in range(2):
        for parameter in model.parameters():
            parameter.grad = None
        outputs = model(**batch)
        outputs.logits.sum().backward()
    return torch.cuda.max_memory_allocated()


def serve() -> None:
    """Serve the parent: read a row from each line of stdin, run it in a fork with an unused device, print its bytes."""
    import warnings

    import transformers
    from accuracy import workload_of

    warnings.filterwarnings("ignore")
    transformers.utils.logging.set_verbosity_error()
    for line in sys.stdin:
        row = json.loads(line)
        workload_of(row)
        if os.fork() == 0:
            print(run_on_device(row), flush=True)
            os._exit(0)
        os.wait()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max_worst", type=float, metavar="PERCENT")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve()
        return 0
    with PUBLISHED.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["kind"] == "fwd_bwd"]
    child = subprocess.run(
        [sys.executable, __file__, "--serve"],
        env=virtual_gpu.environment(catalog.gpu(rows[0]["gpu"])),
        input="".join(json.dumps(row) + "\n" for row in rows),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    errors = []
    print(f"{'rehearsed MiB':>14} {'measured MiB':>13} {'error':>9}  row")
    for row, answer in zip(rows, child.stdout.split(), strict=True):
        measured, rehearsed = int(row["allocated_bytes"]), int(answer)
        errors.append(100 * (rehearsed / measured - 1))
        label = " ".join(row[name] for name in ("model", "attention", "batch_size", "max_length", "gpu", "torch"))
        print(f"{rehearsed / 2**20:14.1f} {measured / 2**20:13.1f} {errors[-1]:+8.2f} %  {label}")
    worst = max(errors, key=abs)
    print(f"\n{len(rows)} rows: median {statistics.median(map(abs, errors)):.2f} %, worst {worst:+.2f} %")
    return 1 if args.max_worst is not None and abs(worst) > args.max_worst else 0


if __name__ == "__main__":
    sys.exit(main())
