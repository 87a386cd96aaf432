"""Compare searches for the largest batch size in one run: the same model, data, step and memory limit for each.

    python benchmarks/peers.py                         # all cases, with the CUDA build of torch; needs no GPU
    python benchmarks/peers.py --case "BERT-base, T4" --sizes
    python benchmarks/peers.py --markdown              # the tables of docs/peers.md
    python benchmarks/peers.py --device cpu --case BERT-mini --memory 6GiB
    python benchmarks/peers.py --device cuda --case "BERT-base, fp16" --memory 15GiB

Each search runs in a process of its own, and so does each training run that determines the true largest size. The
default device is virtual (hf_bsopt.rehearsal): it has memory but computes nothing, so sizes and errors are compared and
times are not. On a device that computes, wall time is compared too. On the CPU the memory of each process is limited,
so that allocations really fail; on a GPU each process may use --memory of it.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from peers_cases import CASES, CPU_MEMORY, Case, RunDevice
from peers_contenders import entries, skipped_lines
from peers_formatting import Comparison, line_of
from peers_process import run_our_search, run_peer_search, truth, worker

from hf_bsopt.errors import UsageError
from hf_bsopt.probing.host_memory import why_no_limit
from hf_bsopt.search.device_choice import has_cuda, memory_bytes
from hf_bsopt.virtual_gpu import why_not

PACKAGES = ("torch", "transformers", "accelerate", "lightning")
TIMEOUT_SECONDS = {"virtual": 300.0, "cuda": 300.0, "cpu": 1800.0}


def compare(
    case: Case, device: RunDevice, device_name: str, largest: int | None, only: list[str] | None = None
) -> Comparison:
    """Run this project's search, the others and the training runs that determine the true largest size.

    ``only``: of the others, run those whose names begin with one of these. ``largest``: the true largest size if it is
    known; it is then confirmed, not searched for. Each search is reported on standard error when it ends.
    """
    if largest is not None:
        truth(case, device, largest, [], largest)  # fails early if it is wrong
    searches = []
    others = [entry for entry in entries(case) if only is None or entry.name.startswith(tuple(only))]
    for entry in (None, *others):
        search = run_our_search(case, device) if entry is None else run_peer_search(entry, case, device)
        print(line_of(search, timed=device.computes), file=sys.stderr, flush=True)
        searches.append(search)
    sizes = sorted({search.size for search in searches if search.size})
    found, fits = truth(case, device, max(sizes, default=1), sizes, largest)
    return Comparison(case, device, device_name, [*searches[1:], searches[0]], found, fits)


def describe_device(case: Case, device: RunDevice) -> str:
    """Return a description of the device. Raise SystemExit if it has less memory than requested."""
    if device.kind == "virtual":
        return case.gpu
    if device.kind == "cpu":
        import torch

        return f"CPU limited to {device.memory}, {torch.get_num_threads()} threads"
    script = "import torch; gpu = torch.cuda.get_device_properties(0); print(gpu.total_memory, gpu.name)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    total, name = done.stdout.strip().split(" ", 1)
    if device.memory is not None and memory_bytes(device.memory) > int(total):
        raise SystemExit(f"{name} has {int(total) / 2**30:.1f} GiB; omit --memory {device.memory} or request less")
    kind = "virtual " if device.is_emulated else ""
    return f"{kind}{name}" if device.memory is None else f"{device.memory} of a {kind}{name}"


def versions() -> str:
    known = [package for package in PACKAGES if importlib.util.find_spec(package)]
    return ", ".join(f"{package} {importlib.metadata.version(package)}" for package in known)


def parser_of_arguments() -> argparse.ArgumentParser:
    names = [case.name for cases in CASES.values() for case in cases]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=list(CASES), default="virtual")
    parser.add_argument("--memory", metavar="SIZE", help=f"such as 15GiB, on the device (cpu: {CPU_MEMORY})")
    parser.add_argument("--case", choices=names, metavar="NAME", help=f"only this one: {'; '.join(names)}")
    parser.add_argument("--start", type=int, nargs="+", help="first size of accelerate and Trainer (default: 128)")
    parser.add_argument(
        "--largest", type=int, metavar="N", help="the true largest size: confirm it instead of searching"
    )
    parser.add_argument("--only", nargs="*", metavar="NAME", help="compare only with these, such as Lightning")
    parser.add_argument("--sizes", action="store_true", help="list the sizes that each contender ran")
    parser.add_argument(
        "--markdown", action="store_true", help="tables as in docs/peers.md, with the sizes that were run"
    )
    parser.add_argument("--worker", type=json.loads, help=argparse.SUPPRESS)
    return parser


def why_not_available(device: str, memory: str | None) -> str | None:
    """Return why nothing can be compared on this device, in a sentence; None if the comparison can run."""
    if device == "virtual":
        reason = why_not()
        wrong = "--memory is for a real device; the size of a virtual GPU comes from the case"
        return f"the virtual device is not available: {reason}" if reason else wrong if memory else None
    try:
        memory_bytes(memory or CPU_MEMORY)
    except UsageError as error:
        return f"--memory: {error}"
    if device == "cpu":
        return why_no_limit()
    return None if has_cuda() else "there is no CUDA device here"


def main() -> int:
    parser = parser_of_arguments()
    args = parser.parse_args()
    if args.worker:
        worker(args.worker)
        return 0
    cases = [case for case in CASES[args.device] if args.case in (None, case.name)]
    if not cases:
        parser.error(f"--case {args.case!r} is not one of --device {args.device}")
    if args.largest is not None and len(cases) > 1:
        parser.error("--largest needs one --case")
    reason = why_not_available(args.device, args.memory)
    if reason is not None:
        parser.error(reason)
    memory = args.memory or (CPU_MEMORY if args.device == "cpu" else None)
    print(versions(), *skipped_lines(), sep="\n", flush=True)
    for case in cases:
        device = RunDevice(args.device, case.gpu, memory, TIMEOUT_SECONDS[args.device])
        started = replace(case, starts=tuple(args.start)) if args.start else case
        comparison = compare(started, device, describe_device(case, device), args.largest, args.only)
        print("\n" + (comparison.markdown() if args.markdown else comparison.text(sizes=args.sizes)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
