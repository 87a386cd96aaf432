"""Signals at any moment: the command ends, with its files complete or as they were, and no process left behind."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from attack_lines import check_folder, contents

ROOT = Path(__file__).resolve().parents[1]
SIGNALS = [signal.SIGINT, signal.SIGINT, signal.SIGTERM, signal.SIGKILL, signal.SIGHUP]
LATEST_SECONDS = 12.0
ENDS_WITHIN_SECONDS = 30.0
WORKERS_END_WITHIN_SECONDS = 10.0


def run_signal(seed: int, folder: Path) -> tuple[str, str | None]:
    """Send a signal to a search that writes files and patches one, or to one that runs real steps in workers."""
    random_ = random.Random(f"signal {seed}")
    number, moment, on_cpu = random_.choice(SIGNALS), random_.uniform(0.5, LATEST_SECONDS), random_.random() < 0.4
    script = folder / "train.py"
    script.write_text("batch_size = 7\n")
    before = contents(folder)
    outputs = {name: folder / f"report.{name}" for name in ("json", "html")}
    command = [sys.executable, "-m", "hf_bsopt", "find", "--model", "bert-tiny", "--max_length", "32"]
    command += ["--device", "cpu", "--memory", "3GiB"] if on_cpu else ["--gpu", "2GiB", "--device", "predict"]
    command += ["--json", str(outputs["json"]), "--html", str(outputs["html"]), "--patch", str(script)]
    mark = f"HF_BSOPT_ATTACK={os.getpid()}.{seed}.{time.time_ns()}"
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "HF_BSOPT_CACHE": str(folder / "cache"),
        "HF_HUB_OFFLINE": "1",
    }
    name, _, value = mark.partition("=")
    process = subprocess.Popen(
        command, cwd=folder, env={**environment, name: value}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    shown = f"{number.name} after {moment:.1f} s {'with workers on the CPU' if on_cpu else 'while predicting'}"
    try:
        out, err = process.communicate(timeout=moment)
        shown += " (had ended)"
    except subprocess.TimeoutExpired:
        process.send_signal(number)
        try:
            out, err = process.communicate(timeout=ENDS_WITHIN_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            return shown, f"had not ended after {ENDS_WITHIN_SECONDS:.0f} s"
        if number == signal.SIGINT and process.returncode not in (130, 0, 1, -signal.SIGINT):
            return shown, f"exit code {process.returncode}: {err[-200:]!r}"
    if "Traceback" in out + err:
        return shown, f"a traceback: {err[-300:]!r}"
    left = _processes_of(mark)
    deadline = time.monotonic() + WORKERS_END_WITHIN_SECONDS
    while left and time.monotonic() < deadline:
        time.sleep(0.1)
        left = _processes_of(mark)
    if left:
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        return shown, f"{len(left)} processes outlived it by {WORKERS_END_WITHIN_SECONDS:.0f} s"
    if number == signal.SIGKILL:  # a temporary file cannot be removed then
        for path in folder.glob(".hf_bsopt.*"):
            path.unlink()
    if script.read_text() != "batch_size = 7\n" and not outputs["html"].exists():
        return shown, "patched before the report was written"
    return shown, check_folder(folder, before, {str(path) for path in (script, *outputs.values())})


def _processes_of(mark: str) -> list[int]:
    """Return the processes that have the mark in their environment: those that the command started."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if mark.encode() in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
            except OSError:
                continue
    return found
