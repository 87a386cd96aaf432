"""Start the process that rehearses a script, and read its outcome."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from ..errors import UsageError
from ..records import GpuSpec
from ..virtual_gpu.library import environment
from ..virtual_gpu.processes import with_package
from .child import SETTINGS_VARIABLE
from .monitor import Settings
from .outcome import ScriptOutcome

GRACE_SECONDS = 30.0
"""At the time limit the script's process writes where it is; a process that does not is killed this much later."""


def rehearse(
    script: Path,
    arguments: Sequence[str],
    gpu: GpuSpec,
    *,
    steps: int,
    timeout_seconds: float,
    micro_batch: int = 0,
    accumulation: int = 0,
    quiet: bool = False,
) -> ScriptOutcome:
    """Run the script on a virtual ``gpu`` for ``steps`` optimizer steps; ``quiet`` discards its output.

    ``micro_batch`` and ``accumulation`` replace the arguments of its Trainer; 0 keeps them. Raises UsageError if
    ``script`` is not a Python script, RehearsalError if this machine cannot have a virtual device.
    """
    check_script(script)
    with tempfile.TemporaryDirectory(prefix="hf_bsopt_") as folder:
        path = Path(folder) / "outcome.json"
        settings = Settings(str(path), steps, timeout_seconds, micro_batch, accumulation)
        variables = {**with_package(environment(gpu)), SETTINGS_VARIABLE: json.dumps(dataclasses.asdict(settings))}
        command = [sys.executable, "-m", "hf_bsopt.rehearsal.child", str(script), *arguments]
        output = subprocess.DEVNULL if quiet else None
        with subprocess.Popen(command, env=variables, stdout=output, stderr=output, start_new_session=True) as process:
            code = _wait(process, timeout_seconds)
        return _finished(ScriptOutcome.read(path), code)


def check_script(script: Path) -> None:
    """Raise UsageError, with the nearest thing that works, if ``script`` is not a Python script."""
    if script.suffix == ".ipynb":
        raise UsageError(f"{script} is a notebook: convert it with jupyter nbconvert --to script {script}")
    if script.name in ("python", "python3", "accelerate", "torchrun"):
        raise UsageError(f"leave {script} out: the script itself comes after the two dashes, -- train.py")
    if not script.exists():
        raise UsageError(
            f"there is no script {script}; the script and its arguments come after the two dashes: "
            "-- train.py --epochs 3"
        )
    if not script.is_file():
        raise UsageError(f"{script} is not a file; name the script, such as {script / 'train.py'}")
    try:
        compile(script.read_bytes(), str(script), "exec", dont_inherit=True)
    except (SyntaxError, ValueError) as error:
        raise UsageError(f"{script} is not Python: {error}") from error


def _wait(process: subprocess.Popen[bytes], timeout_seconds: float) -> int | None:
    """Return the exit code, None if the process had to be killed."""
    try:
        return process.wait(timeout_seconds + GRACE_SECONDS if timeout_seconds > 0 else None)
    except subprocess.TimeoutExpired:
        return None
    finally:  # whatever the script started and left behind, and the script itself at Ctrl-C
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def _finished(outcome: ScriptOutcome, code: int | None) -> ScriptOutcome:
    """Return the outcome, completed from the exit code if the process could not write how it ended."""
    if outcome.status != "running":
        return outcome
    if code is None:
        return dataclasses.replace(outcome, status="timeout", message="it stopped responding")
    if code == 0:
        return dataclasses.replace(outcome, status="ended")
    if code == -signal.SIGKILL:
        message = "it was killed, as the system does when the host runs out of memory"
    else:
        message = f"it was killed by {signal.Signals(-code).name}" if code < 0 else f"it ended with exit code {code}"
    return dataclasses.replace(outcome, status="failed", exit_code=code, message=message)
