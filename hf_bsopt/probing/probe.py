"""One micro-batch size, really run: the model built, the production step, what the device says of it."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from ..meta import with_storage
from ..records import Outcome, Trial
from ..training_step import STEPS, TrainingStep
from ..workload import Trainable
from .devices import CudaMemory, Device

if TYPE_CHECKING:
    import torch

MOST_SKIPPED_STEPS = 20
"""The gradient scaler starts at 2^16 and halves whenever gradients overflow, skipping the optimizer's step."""


def probe(workload: Trainable, batch_size: int, device: Device) -> Trial:
    """Runs the training step on the device that this process sees until the optimizer stepped three times.

    An out-of-memory error of the device is a Trial's outcome; every other error is the caller's.
    """
    import torch

    memory = CudaMemory()
    seconds: list[float] = []
    detail = ""
    outcome: Outcome = "fits"
    try:
        _steps(workload, batch_size, device, memory, seconds)
    except torch.OutOfMemoryError as error:
        outcome, detail = "oom", str(error).split(". ")[0]
    peak, used, retries = memory.peak(), memory.used_bytes(), memory.retries()
    step_seconds = sorted(seconds)[len(seconds) // 2] if seconds and device.tells_time else None
    return Trial(
        batch_size=batch_size,
        outcome=outcome,
        peak=peak,
        used_bytes=used,
        source=device.source,
        step_seconds=step_seconds,
        samples_per_second=batch_size * workload.accumulation / step_seconds if step_seconds else None,
        alloc_retries=retries,
        detail=detail,
    )


def _steps(workload: Trainable, batch_size: int, device: Device, memory: CudaMemory, seconds: list[float]) -> None:
    import torch

    with torch.device(device.kind):
        model = with_storage(workload.build(), device.kind)
    gc.collect()
    memory.start()
    step = TrainingStep(model, workload.settings, device.kind)
    stepped = _count_steps(step.optimizer)
    for _ in range(STEPS + MOST_SKIPPED_STEPS):
        started = time.perf_counter()
        step.worst_case(workload, batch_size, device.kind)
        if device.tells_time:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
        if stepped() >= STEPS:
            return
    raise RuntimeError(f"the optimizer stepped only {stepped()} times in {STEPS + MOST_SKIPPED_STEPS} training steps")


def _count_steps(optimizer: torch.optim.Optimizer) -> Callable[[], int]:
    done: list[None] = []
    optimizer.register_step_post_hook(lambda *_: done.append(None))
    return lambda: len(done)
