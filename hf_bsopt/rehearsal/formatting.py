"""A rehearsal in words."""

from __future__ import annotations

import textwrap
from pathlib import Path

from ..records import GpuSpec
from .outcome import Outcome

GIB = 2**30
WIDTH = 78


def told(outcome: Outcome, script: Path, gpu: GpuSpec, target: tuple[float, float]) -> str:
    """What came of it, the verdict last."""
    lines = [f"Rehearsal of {script.name} on a virtual {gpu.name}: nothing was computed, memory is real."]
    if outcome.allocated_bytes:
        lines += _memory_lines(outcome, gpu, target)
    if outcome.trainer is not None:
        lines.append(_batch_line(outcome.trainer))
    if outcome.nowhere:
        asked = ", ".join(f"{name} ({count})" for name, count in sorted(outcome.nowhere.items()))
        lines.append(f"not saved:   {asked}; what the script writes by itself is written")
    if outcome.has_convolutions:
        lines.append("layers:      convolutions or recurrent ones, which use cuDNN on a card: its buffers may differ")
    if outcome.caught > 0:
        times = "once" if outcome.caught == 1 else f"{outcome.caught} times"
        lines.append(f"caught:      the script ran out of memory {times} and went on")
    lines += ["", *_verdict_lines(outcome, script)]
    return "\n".join(_wrapped(line) for line in lines)


def _memory_lines(outcome: Outcome, gpu: GpuSpec, target: tuple[float, float]) -> list[str]:
    share = outcome.used_bytes / (gpu.total_bytes or 1)
    low, high = target
    where = "within" if low <= round(share, 2) <= high else "under" if share < low else "over"
    return [
        f"steps:       {outcome.steps} of the optimizer",
        f"allocated:   {_gib(outcome.allocated_bytes)} at the peak",
        f"reserved:    {_gib(outcome.reserved_bytes)}",
        f"used:        {_gib(outcome.used_bytes)} of {_gib(gpu.total_bytes or 0)} = {share:.0%}, {where} the target of "
        f"{low:.0%} to {high:.0%}",
        f"retries:     {outcome.retries} (the allocator gave its cache back and asked again)",
    ]


def _batch_line(trainer: dict[str, int]) -> str:
    micro_batch, accumulation, processes = (trainer[name] for name in ("micro_batch", "accumulation", "processes"))
    return (
        f"batch:       {micro_batch} × {accumulation} accumulation × {processes} process{'es' * (processes > 1)} = "
        f"{micro_batch * accumulation * processes}"
    )


def _verdict_lines(outcome: Outcome, script: Path) -> list[str]:
    at = [f"  {outcome.place.line}"] if outcome.place is not None else []
    if outcome.place is not None and outcome.place.below:
        at.append(f"  under it: {outcome.place.below}")
    if outcome.status == "oom":
        return [*at, f"❌ OUT OF MEMORY in step {outcome.steps + 1}: {outcome.message}"]
    if outcome.status == "timeout" and outcome.steps:
        return [
            *at,
            f"❌ NOT KNOWN: it was still running after {outcome.steps} steps, which fit; --steps and --timeout",
        ]
    if outcome.status == "timeout":
        why = "it took too long; a loop that waits for a value of the device never ends here, where all are zero"
        return [*at, f"❌ NOT KNOWN: {why}"]
    if outcome.status == "failed" and not outcome.steps:
        hint = "; the virtual machine has one card" if "invalid device ordinal" in outcome.message else ""
        if outcome.unknown:
            hint += f" (the virtual device does not know {', '.join(outcome.unknown)})"
        return [*at, f"❌ NOT KNOWN: {script.name} failed by itself before its first step: {outcome.message}{hint}"]
    if outcome.status == "failed":
        steps = "1 step" if outcome.steps == 1 else f"{outcome.steps} steps"
        return [*at, f"❌ {script.name} failed by itself after {steps}, which fit: {outcome.message}"]
    if outcome.status == "running":
        return ["❌ NOT KNOWN: the script's process is gone"]
    if not outcome.allocated_bytes:
        return ["❌ NOT KNOWN: the script ended without using the device"]
    if not outcome.steps:
        return ["✅ FITS (no optimizer stepped)"]
    if outcome.message and outcome.status == "stopped":
        return [*at, f"✅ FITS; what follows the {outcome.steps} steps could not be rehearsed: {outcome.message}"]
    return ["✅ FITS"]


def _gib(size: int) -> str:
    return f"{size / GIB:.2f} GiB"


def _wrapped(line: str) -> str:
    indent = 13 if line[:13].endswith(" ") and ":" in line[:13] else 4
    return textwrap.fill(line, WIDTH, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False)
