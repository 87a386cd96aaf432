"""From a device, a workload and wishes to the Report: predicted, and proved where something can be run.

with started(choice) as client:
    report = answered(workload, choice, wishes, client)
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator

from ..errors import DeviceError, ProbeError, RehearsalError, UsageError
from ..probing import Preflight, ProbeClient
from ..probing.client import TIMEOUT_SECONDS
from ..records import GpuSpec
from ..report.report import Report, versions
from ..workloads.workload import Trainable, Workload
from .answer_cache import AnswerCache, band
from .device_choice import DeviceChoice, differences
from .pipeline import find
from .verifier import Remembering
from .wishes import Wishes


@dataclasses.dataclass(frozen=True)
class Keeping:
    """Where measured answers are kept, and whether they are taken without running them once more."""

    cache: AnswerCache
    is_trusted: bool


@contextlib.contextmanager
def started(
    choice: DeviceChoice, probe_timeout: float = TIMEOUT_SECONDS, expandable_segments: bool = False
) -> Iterator[ProbeClient | None]:
    """None where nothing is run."""
    if choice.device is None:
        yield None
        return
    with ProbeClient(choice.device, timeout_seconds=probe_timeout, expandable_segments=expandable_segments) as client:
        with contextlib.suppress(RehearsalError):  # said where it is asked something
            client.start()
        yield client


def answered(
    workload: Trainable,
    choice: DeviceChoice,
    wishes: Wishes,
    client: ProbeClient | None,
    keeping: Keeping | None = None,
) -> Report:
    if client is None:
        return find(workload, choice.spec, wishes)
    try:
        if client.device.source == "rehearsed":
            notes = (*wishes.notes, *differences(workload, choice.spec))
            return find(workload, choice.spec, dataclasses.replace(wishes, notes=notes), client)
        found = client.preflight(workload)
        remembering = None if keeping is None else _remembering(keeping, workload, found, wishes)
        wishes = dataclasses.replace(wishes, notes=(*wishes.notes, found.line))
        return find(workload, found.spec, wishes, client, remembering)
    except (ProbeError, DeviceError) as error:
        failed_for_real = isinstance(error, ProbeError) and client.device.source == "measured"
        if choice.is_demanded or failed_for_real:
            raise
        note = f"predicted only, nothing could be run: {error}"
    return find(workload, choice.spec, dataclasses.replace(wishes, notes=(*choice.notes, note)))


def _remembering(keeping: Keeping, workload: Trainable, found: Preflight, wishes: Wishes) -> Remembering | None:
    """All that decides a measured answer. A module is known by nothing that could be compared with another day's."""
    if not isinstance(workload, Workload):
        return None
    spec = found.spec
    total = spec.total_bytes or 1
    asked = {k: v for k, v in dataclasses.asdict(wishes).items() if k not in ("notes", "max_attempts")}
    key = {
        "workload": workload.values(),
        "config": workload.config.to_dict(),
        "wishes": asked,
        "device": {**dataclasses.asdict(spec), "context_bytes": None},
        "driver": found.driver,
        "free_band": band(total - spec.context_bytes, total),
        "versions": versions(),
    }
    plain = json.loads(json.dumps(key, default=str))
    return Remembering(keeping.cache, plain, keeping.is_trusted)


def check_precision(workload: Trainable, device: GpuSpec) -> None:
    """Raises UsageError where the device does not compute so."""
    if device.kind == "cpu" and workload.settings.precision.startswith("fp16"):
        raise UsageError("a CPU does not train in fp16, and Trainer refuses it there: take --precision fp32 or bf16")
    if not isinstance(workload, Workload) or workload.attention != "flash_attention_2":
        return
    if device.compute_capability < 80:
        raise UsageError(f"flash_attention_2 runs from compute capability 8.0 on; {device.name} has sdpa and eager")
    if workload.precision == "fp32":
        raise UsageError("flash_attention_2 computes in half precision only: add --fp16 or --bf16, or take sdpa")
