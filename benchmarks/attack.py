"""Attack the package with hostile input, and check the outcome of each attack.

    python benchmarks/attack.py                                   # a few of each area
    python benchmarks/attack.py --lines 500 --calls 200 --patches 2000 --writes 1000 --caches 3000 --signals 30
    python benchmarks/attack.py --full --markdown                 # these numbers, as the table of docs/reliability.md
    python benchmarks/attack.py --only "line 17"                  # one attack again, by its seed

Each attack is made from its area and its seed, so that it can be repeated. It survives if the exit code is a documented
one (a call: if the error is a BatchSizeError), if there is one message and no traceback, if no file is half-written or
left behind, if nothing that was given as data was run, and if it ends within --timeout seconds. Exit code 1 if one
fails. Attacks run in a process of their own with limited memory; one that hangs or dies is counted and the rest go on.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from attack_calls import run_call
from attack_files import run_cache, run_patch, run_write
from attack_lines import run_line
from attack_signals import run_signal

HERE = Path(__file__).resolve().parent
Run = Callable[[int, Path], tuple[str, str | None]]
AREAS: dict[str, tuple[Run, int, int, str]] = {
    "line": (
        run_line,
        20,
        500,
        "command lines: flags, files, models and configurations that are not what they should be",
    ),
    "call": (run_call, 10, 200, "calls of the API: wrong types, sizes, modules and batches"),
    "patch": (run_patch, 100, 2000, "files to patch: broken Python, notebooks, YAML, JSON, TOML, Jsonnet, shell"),
    "write": (run_write, 100, 1000, "files to write: impossible paths, disks and calls of the system that fail"),
    "cache": (run_cache, 100, 3000, "cached answers: flipped bits, cut, other types, links, pipes"),
    "signal": (run_signal, 2, 30, "signals: SIGINT, SIGTERM, SIGHUP, SIGKILL at any moment"),
}
"""area: (the function, a few attacks, all attacks, what is attacked)."""
MEMORY_BYTES = 24 << 30
TIMEOUT_SECONDS = 120.0


@dataclass
class Tally:
    """The outcome of the attacks on one area. failed: (the attack with its seed, what was wrong)."""

    area: str
    tried: int = 0
    seconds: float = 0.0
    failed: list[tuple[str, str]] = field(default_factory=list)


def attack(area: str, seed: int) -> tuple[str, str | None]:
    """Make one attack in this process, in a folder of its own; return it, and what is wrong with its outcome."""
    with tempfile.TemporaryDirectory(prefix="attack-") as name:
        os.environ["HF_BSOPT_CACHE"] = f"{name}/cache"
        return AREAS[area][0](seed, Path(name))


class Worker:
    """A process that makes attacks, and is started again after one that hangs or kills it."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def attack(self, area: str, seed: int, timeout: float) -> tuple[str, str | None]:
        if self._process is None:
            self._process = _started()
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps([area, seed]) + "\n")
        process.stdin.flush()
        ready, _, _ = select.select([process.stdout], [], [], timeout)
        answer = process.stdout.readline() if ready else ""
        if answer:
            what, problem = json.loads(answer)
            return what, problem
        self.close()
        problem = f"died with {process.returncode}" if ready else f"no end after {timeout:.0f} s"
        return f"{area} {seed}", problem

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


def _started() -> subprocess.Popen[str]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(HERE / "attack.py"), "--worker"]
    return subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )


def serve() -> None:
    """Make the attacks that are named on standard input, and answer each with a line."""
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(2, 1)  # what an attack prints is not an answer
    for line in sys.stdin:
        area, seed = json.loads(line)
        print(json.dumps(attack(area, seed)), file=answers, flush=True)


def attack_all(counts: dict[str, int], timeout: float, first: int = 0) -> list[Tally]:
    """Make the attacks, and print each one that fails."""
    worker, tallies = Worker(), []
    for area, count in counts.items():
        tally = Tally(area)
        started = time.monotonic()
        for seed in range(first, first + count):
            what, problem = worker.attack(area, seed, timeout)
            tally.tried += 1
            if problem is not None:
                tally.failed.append((f"{area} {seed}: {what}", problem))
                print(f"✗ {area} {seed}: {what[:500]}\n  {problem}", flush=True)
        tally.seconds = time.monotonic() - started
        print(f"{area}: {tally.tried} tried, {len(tally.failed)} failed, {tally.seconds:.0f} s", flush=True)
        tallies.append(tally)
    worker.close()
    return tallies


def markdown(tallies: list[Tally]) -> str:
    """Return the table of docs/reliability.md."""
    rows = ["| attacked | tried | survived | failed |", "|---|---|---|---|"]
    for tally in tallies:
        failed = len(tally.failed)
        rows.append(f"| {AREAS[tally.area][3]} | {tally.tried:,} | {tally.tried - failed:,} | {failed} |")
    return "\n".join(rows)


def main(argv: list[str] | None = None) -> int:
    """Run the attacks that were asked for; return 1 if one failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for area, (_, few, everything, what) in AREAS.items():
        name = "--patches" if area == "patch" else f"--{area}s"
        parser.add_argument(name, dest=area, type=int, help=f"{what} (default {few}, all {everything})")
    parser.add_argument("--full", action="store_true", help="all attacks of the areas that are not given a number")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--only", nargs="+", help='one attack again, such as "line 17"')
    parser.add_argument("--timeout", type=float, default=TIMEOUT_SECONDS, help="seconds for one attack")
    parser.add_argument("--markdown", action="store_true", help="print the table of docs/reliability.md")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.worker:
        serve()
        return 0
    if options.only:
        area, seed = " ".join(options.only).split()
        what, problem = attack(area, int(seed))
        print(what, problem or "survived", sep="\n")
        return int(problem is not None)
    given: dict[str, Any] = {area: getattr(options, area) for area in AREAS}
    if options.full or not any(count is not None for count in given.values()):
        given = {
            area: AREAS[area][2 if options.full else 1] if count is None else count for area, count in given.items()
        }
    tallies = attack_all({area: count for area, count in given.items() if count}, options.timeout, options.first)
    if options.markdown:
        print(markdown(tallies))
    return int(any(tally.failed for tally in tallies))


if __name__ == "__main__":
    sys.exit(main())
