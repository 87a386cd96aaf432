"""Run scripts for the tests: with ``python -m hf_bsopt.rehearsal``, or directly in the virtual device's environment."""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from hf_bsopt import virtual_gpu
from hf_bsopt.data import catalog

SCRIPTS = Path(__file__).parents[1] / "rehearsal" / "scripts"
NEEDS_THE_DEVICE = [
    pytest.mark.rehearsal,
    pytest.mark.skipif(virtual_gpu.why_not() is not None, reason=str(virtual_gpu.why_not())),
]
FACTS = "FACTS "
Files = dict[str, tuple[bytes, int]]


@dataclass(frozen=True)
class Rehearsed:
    """A finished rehearsal. out: the script's output, then the report. before, after: the files of its folder."""

    code: int
    out: str
    err: str
    before: Files
    after: Files

    @property
    def summary(self) -> str:
        """The report, joined to one line."""
        return " ".join(self.out[self.out.rindex("Rehearsal of ") :].split())

    @property
    def script_lines(self) -> list[str]:
        """The lines printed by the script itself."""
        return self.out[: self.out.rindex("\nRehearsal of ")].splitlines()

    @property
    def facts(self) -> Any:
        (line,) = [line for line in self.script_lines if line.startswith(FACTS)]
        return json.loads(line.removeprefix(FACTS))


def rehearse(folder: Path, words: list[str]) -> Rehearsed:
    """Rehearse a script in ``folder``, which also has the files of an earlier run and is not a temporary folder.

    words: flags, two dashes, a script in scripts/ and its arguments.
    """
    fill(folder / "project")
    before = tree(folder / "project")
    temporary = folder / "temporary"
    temporary.mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "hf_bsopt.rehearsal", *words],
        cwd=folder / "project",
        env={**os.environ, "PYTHONPATH": str(SCRIPTS.parents[2]), "TMPDIR": str(temporary)},
        capture_output=True,
        text=True,
        check=False,
    )
    return Rehearsed(done.returncode, done.stdout, done.stderr, before, tree(folder / "project"))


def run_on_the_device(gpu: str, script: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a script in the virtual device's environment, without a rehearsal."""
    return subprocess.run(
        [sys.executable, SCRIPTS / script, *arguments],
        env={**virtual_gpu.environment(catalog.gpu(gpu)), **variables},
        capture_output=True,
        text=True,
        check=False,
    )


def has_ended(process: int) -> bool:
    """Wait for the process up to a minute; return True if it ended."""
    try:
        descriptor = os.pidfd_open(process)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([descriptor], [], [], 60)[0])
    finally:
        os.close(descriptor)


def tree(folder: Path) -> Files:
    """Return the bytes and modification time of each file."""
    return {
        str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def fill(folder: Path) -> None:
    """Copy the scripts, and write files as an earlier, real run would have left them."""
    shutil.copytree(SCRIPTS, folder, ignore=shutil.ignore_patterns("__pycache__"))
    for step in (2, 5):
        checkpoint = folder / "out" / f"checkpoint-{step}"
        checkpoint.mkdir(parents=True)
        weights = {"layer.weight": np.zeros((1, 4), np.float32), "layer.bias": np.zeros(1, np.float32)}
        save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
        state = {"global_step": step, "max_steps": 10, "train_batch_size": 8, "eval_steps": 1, "save_steps": 1}
        best = {"best_model_checkpoint": "out/checkpoint-2", "best_metric": 0.5, "best_global_step": 2}
        (checkpoint / "trainer_state.json").write_text(json.dumps({**state, **best, "epoch": 0.1, "log_history": []}))
    for name in ("model.pt", "model.safetensors", "final/config.json", "out/train_results.json", "README.md"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("written by the real run")
