"""Searches for the largest batch size, side by side: the same model, data, step and memory limit, in one run.

    python benchmarks/peers.py                         # all cases, under the CUDA build of torch; no card is needed
    python benchmarks/peers.py --case "BERT-base, T4" --sizes
    python benchmarks/peers.py --markdown              # the tables of docs/peers.md
    python benchmarks/peers.py --device cpu --case BERT-mini --memory 6GiB
    python benchmarks/peers.py --device cuda --case "BERT-base, fp16" --memory 15GiB

Every search, and every training run that tells the true largest size, has a process of its own. The device is virtual
(hf_bsopt.rehearsal) unless another is named: it has memory and no arithmetic, so that sizes and errors are counted and
seconds are not. On a device that computes wall time counts too. On the CPU the memory of each process is limited, so
that allocations really fail; on a card the processes get --memory of it.
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

from peers_cases import CASES, CPU_MEMORY, Case, Place
from peers_contenders import entries, missing
from peers_process import our_turn, truth, turn_of, worker
from peers_telling import Comparison, line_of

from hf_bsopt.errors import UsageError
from hf_bsopt.probing.host_memory import why_no_limit
from hf_bsopt.search.device_choice import has_cuda, memory_bytes
from hf_bsopt.virtual_gpu import why_not

PACKAGES = ("torch", "transformers", "accelerate", "lightning")
TIMEOUT_SECONDS = {"virtual": 300.0, "cuda": 300.0, "cpu": 1800.0}


def compare(case: Case, place: Place, where: str, largest: int | None, only: list[str] | None = None) -> Comparison:
    """This project first, then the others, or those of them whose names begin so, then the true largest; a line for
    each on standard error meanwhile.
    """
    if largest is not None:
        truth(case, place, largest, [], largest)  # before the rest takes its time
    searches = []
    others = [entry for entry in entries(case) if only is None or entry.name.startswith(tuple(only))]
    for entry in (None, *others):
        search = our_turn(case, place) if entry is None else turn_of(entry, case, place)
        print(line_of(search, timed=place.computes), file=sys.stderr, flush=True)
        searches.append(search)
    sizes = sorted({search.size for search in searches if search.size})
    found, fits = truth(case, place, max(sizes, default=1), sizes, largest)
    return Comparison(case, place, where, [*searches[1:], searches[0]], found, fits)


def where(case: Case, place: Place) -> str:
    """The device in words. Raises SystemExit where it has less memory than asked for."""
    if place.kind == "virtual":
        return case.gpu
    if place.kind == "cpu":
        import torch

        return f"CPU limited to {place.memory}, {torch.get_num_threads()} threads"
    script = "import torch; card = torch.cuda.get_device_properties(0); print(card.total_memory, card.name)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    total, name = done.stdout.strip().split(" ", 1)
    if place.memory is not None and memory_bytes(place.memory) > int(total):
        raise SystemExit(f"{name} has {int(total) / 2**30:.1f} GiB: leave out --memory {place.memory}, or give less")
    kind = "virtual " if place.times_mean_nothing else ""
    return f"{kind}{name}" if place.memory is None else f"{place.memory} of a {kind}{name}"


def versions() -> str:
    known = [package for package in PACKAGES if importlib.util.find_spec(package)]
    return ", ".join(f"{package} {importlib.metadata.version(package)}" for package in known)


def parser_of_arguments() -> argparse.ArgumentParser:
    names = [case.name for cases in CASES.values() for case in cases]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=list(CASES), default="virtual")
    parser.add_argument("--memory", metavar="SIZE", help=f"such as 15GiB, on the device (cpu: {CPU_MEMORY})")
    parser.add_argument("--case", choices=names, metavar="NAME", help=f"only this one: {'; '.join(names)}")
    parser.add_argument("--start", type=int, nargs="+", help="where accelerate and Trainer begin (default: 128)")
    parser.add_argument("--largest", type=int, metavar="N", help="the true largest, confirmed and not searched")
    parser.add_argument("--only", nargs="*", metavar="NAME", help="these beside this project, such as Lightning")
    parser.add_argument("--sizes", action="store_true", help="the sizes that each of them ran")
    parser.add_argument("--markdown", action="store_true", help="tables as in docs/peers.md, with those sizes")
    parser.add_argument("--worker", type=json.loads, help=argparse.SUPPRESS)
    return parser


def why_not_there(device: str, memory: str | None) -> str | None:
    """Why nothing can be compared on this device, in a sentence; None where it can."""
    if device == "virtual":
        reason = why_not()
        wrong = "--memory is for a device that is here: a virtual card is as large as the case says"
        return f"no virtual device here: {reason}" if reason else wrong if memory else None
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
        parser.error("--largest is that of one --case")
    reason = why_not_there(args.device, args.memory)
    if reason is not None:
        parser.error(reason)
    memory = args.memory or (CPU_MEMORY if args.device == "cpu" else None)
    print(versions(), *missing(), sep="\n", flush=True)
    for case in cases:
        place = Place(args.device, case.gpu, memory, TIMEOUT_SECONDS[args.device])
        started = replace(case, starts=tuple(args.start)) if args.start else case
        comparison = compare(started, place, where(case, place), args.largest, args.only)
        print("\n" + (comparison.markdown() if args.markdown else comparison.text(sizes=args.sizes)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
