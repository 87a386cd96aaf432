"""Starts the process that rehearses a script, and reads what came of it."""

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
from .child import SETTINGS
from .monitor import Settings
from .outcome import Outcome

GRACE_SECONDS = 30.0
"""The script's process tells where it is when its time is over; what does not even do that is ended after this."""


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
) -> Outcome:
    """Runs the script on a virtual ``gpu`` until it did ``steps`` optimizer steps; its output is this process's,
    or nobody's if ``quiet``.

    ``micro_batch`` and ``accumulation`` take the place of what its Trainer was told; 0 leaves them. Raises UsageError
    for what is no script, RehearsalError where there can be no virtual device.
    """
    check_script(script)
    with tempfile.TemporaryDirectory(prefix="hf_bsopt_") as scratch:
        path = Path(scratch) / "outcome.json"
        settings = Settings(str(path), steps, timeout_seconds, micro_batch, accumulation)
        variables = {**with_package(environment(gpu)), SETTINGS: json.dumps(dataclasses.asdict(settings))}
        command = [sys.executable, "-m", "hf_bsopt.rehearsal.child", str(script), *arguments]
        output = subprocess.DEVNULL if quiet else None
        with subprocess.Popen(command, env=variables, stdout=output, stderr=output, start_new_session=True) as process:
            code = _wait(process, timeout_seconds)
        return _finished(Outcome.read(path), code)


def check_script(script: Path) -> None:
    """Raises UsageError, with what was probably meant, for what can't be a Python script."""
    if script.suffix == ".ipynb":
        raise UsageError(f"{script} is a notebook: make a script of it with jupyter nbconvert --to script {script}")
    if script.name in ("python", "python3", "accelerate", "torchrun"):
        raise UsageError(f"leave {script} out: the script itself follows the two dashes, -- train.py")
    if not script.exists():
        raise UsageError(
            f"there is no script {script}; it is named after the two dashes: "
            "python -m hf_bsopt.rehearsal --gpu T4 -- train.py --its arguments"
        )
    if not script.is_file():
        raise UsageError(f"{script} is no file; name the script, such as {script / 'train.py'}")
    try:
        compile(script.read_bytes(), str(script), "exec", dont_inherit=True)
    except (SyntaxError, ValueError) as error:
        raise UsageError(f"{script} is not Python: {error}") from error


def _wait(process: subprocess.Popen[bytes], timeout_seconds: float) -> int | None:
    """The exit code; None where the process had to be ended."""
    try:
        return process.wait(timeout_seconds + GRACE_SECONDS if timeout_seconds > 0 else None)
    except subprocess.TimeoutExpired:
        return None
    finally:  # whatever the script started and left behind, and the script itself at Ctrl-C
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def _finished(outcome: Outcome, code: int | None) -> Outcome:
    """The outcome, where the script's process could not say itself how it ended."""
    if outcome.status != "running":
        return outcome
    if code is None:
        return dataclasses.replace(outcome, status="timeout", message="it did not answer any more")
    if code == 0:
        return dataclasses.replace(outcome, status="ended")
    if code == -signal.SIGKILL:
        why = "it was killed; the system does so when the host's memory runs out"
    else:
        why = f"it died of {signal.Signals(-code).name}" if code < 0 else f"it ended with exit code {code}"
    return dataclasses.replace(outcome, status="failed", exit_code=code, message=why)
