"""Format the outcome of a rehearsal for the terminal."""

from __future__ import annotations

import textwrap
from pathlib import Path

from ..records import GpuSpec
from .outcome import ScriptOutcome

GIB = 2**30
WIDTH = 78


def format_outcome(outcome: ScriptOutcome, script: Path, gpu: GpuSpec, target: tuple[float, float]) -> str:
    """Return the report of a rehearsal, the verdict last."""
    lines = [f"Rehearsal of {script.name} on a virtual {gpu.name}: memory is real, values are not."]
    if outcome.allocated_bytes:
        lines += _memory_lines(outcome, gpu, target)
    if outcome.trainer is not None:
        lines.append(_batch_line(outcome.trainer))
    if outcome.not_saved:
        skipped = ", ".join(f"{name} ({count})" for name, count in sorted(outcome.not_saved.items()))
        lines.append(f"not saved:   {skipped}; files that the script writes with its own code are written")
    if outcome.has_convolutions:
        lines.append("layers:      convolutional or recurrent, which use cuDNN on a GPU: its buffers may differ")
    if outcome.triton_kernels:
        launched = ", ".join(f"{name} ({count})" for name, count in sorted(outcome.triton_kernels.items()))
        lines.append(f"Triton:      {launched}: called and not launched")
    if outcome.caught > 0:
        times = "once" if outcome.caught == 1 else f"{outcome.caught} times"
        lines.append(f"caught:      the script ran out of memory {times} and went on")
    lines += ["", *_verdict_lines(outcome, script)]
    return "\n".join(_wrapped(line) for line in lines)


def _memory_lines(outcome: ScriptOutcome, gpu: GpuSpec, target: tuple[float, float]) -> list[str]:
    fraction = outcome.used_bytes / (gpu.total_bytes or 1)
    low, high = target
    side = "within" if low <= round(fraction, 2) <= high else "under" if fraction < low else "over"
    return [
        f"steps:       {outcome.steps} optimizer step{'s' * (outcome.steps != 1)}",
        f"allocated:   {_gib(outcome.allocated_bytes)} at the peak",
        f"reserved:    {_gib(outcome.reserved_bytes)}",
        f"used:        {_gib(outcome.used_bytes)} of {_gib(gpu.total_bytes or 0)} = {fraction:.0%}, "
        f"{side} the target of {low:.0%} to {high:.0%}",
        f"retries:     {outcome.retries} (the allocator freed its cache and tried again)",
    ]


def _batch_line(trainer: dict[str, int]) -> str:
    micro_batch, accumulation, processes = (trainer[name] for name in ("micro_batch", "accumulation", "processes"))
    return (
        f"batch:       {micro_batch} × {accumulation} accumulation × {processes} process{'es' * (processes > 1)} = "
        f"{micro_batch * accumulation * processes}"
    )


def _verdict_lines(outcome: ScriptOutcome, script: Path) -> list[str]:
    location = [f"  {outcome.location.line}"] if outcome.location is not None else []
    if outcome.location is not None and outcome.location.below:
        location.append(f"  deepest call: {outcome.location.below}")
    if outcome.status == "oom":
        return [*location, f"❌ OUT OF MEMORY in step {outcome.steps + 1}: {outcome.message}"]
    if outcome.status == "timeout" and outcome.steps:
        return [
            *location,
            f"❌ UNKNOWN: it was still running after {outcome.steps} steps, which fit; lower --steps or raise "
            f"--timeout",
        ]
    if outcome.status == "timeout":
        why = "it took too long; a loop that waits for a value on the device never ends, since all values are zero"
        return [*location, f"❌ UNKNOWN: {why}"]
    if outcome.status == "failed" and not outcome.steps:
        hint = "; the virtual machine has one GPU" if "invalid device ordinal" in outcome.message else ""
        if outcome.unsupported_calls:
            hint += f" (the virtual device does not support {', '.join(outcome.unsupported_calls)})"
        return [*location, f"❌ UNKNOWN: {script.name} failed before its first step: {outcome.message}{hint}"]
    if outcome.status == "failed":
        steps = "1 step" if outcome.steps == 1 else f"{outcome.steps} steps"
        return [*location, f"❌ {script.name} failed after {steps}, which fit: {outcome.message}"]
    if outcome.status == "running":
        return ["❌ UNKNOWN: the script's process ended without a result"]
    if not outcome.allocated_bytes:
        return ["❌ UNKNOWN: the script ended without using the device"]
    if not outcome.steps:
        return ["✅ FITS (no optimizer step was made)"]
    if outcome.message and outcome.status == "stopped":
        return [
            *location,
            f"✅ FITS; the code after the {outcome.steps} steps could not be rehearsed: {outcome.message}",
        ]
    return ["✅ FITS"]


def _gib(size: int) -> str:
    return f"{size / GIB:.2f} GiB"


def _wrapped(line: str) -> str:
    indent = 13 if line[:13].endswith(" ") and ":" in line[:13] else 4
    return textwrap.fill(line, WIDTH, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False)
