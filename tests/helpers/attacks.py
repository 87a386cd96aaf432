"""The attacks of benchmarks/attack.py, for tests of a small size."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def survives(area: str, seed: int) -> str:
    """Make one attack in this process; return what is wrong with its outcome, "" if nothing is."""
    what, problem = _module().attack(area, seed)
    return f"{area} {seed}: {what}: {problem}" if problem else ""


def failures(area: str, count: int) -> list[str]:
    """Make attacks in a process of their own, and return those that fail."""
    worker = _module().Worker()
    found = [(seed, *worker.attack(area, seed, 120.0)) for seed in range(count)]
    worker.close()
    return [f"{area} {seed}: {what}: {problem}" for seed, what, problem in found if problem]


def _module() -> Any:
    if str(BENCHMARKS) not in sys.path:
        sys.path.append(str(BENCHMARKS))
    return importlib.import_module("attack")
