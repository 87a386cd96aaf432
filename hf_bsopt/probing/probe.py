"""Run one micro-batch size for real: build the model, run the training step, read the memory counters."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from ..records import Outcome, Peak, Trial
from ..workloads.captured_outputs import restore_captured_outputs
from ..workloads.meta_device import initialized
from ..workloads.trainable import Phase, Trainable
from ..workloads.training_step import TrainingStep, generation_step, smallest_batch
from .devices import Device, Schedule
from .memory import DeviceMemory
from .oom import out_of_memory

if TYPE_CHECKING:
    import torch
    from torch import nn

MOST_SKIPPED_STEPS = 20
"""The gradient scaler starts at 2^16 and halves on each overflow, skipping the optimizer step."""
SETTLING_STEPS = 8
"""The allocator may release its cache in the first few steps; after these it should not need to."""
EVALUATED_BATCHES = 2
"""The second batch runs while the logits of the first are kept for the metrics."""


class NoStepError(RuntimeError):
    """Raised if the optimizer did not step because gradients overflowed in every step."""


def probe(workload: Trainable, batch_size: int, device: Device, phase: Phase = "training") -> Trial:
    """Run the training step on the device that this process sees.

    An out-of-memory error becomes the Trial's outcome, as does a size that ran but does not fit; all other errors
    propagate.
    """
    memory = device.memory()
    run = _Run(workload, batch_size, device, memory)
    outcome: Outcome = "fits"
    detail = ""
    try:
        run.phases[phase]()
        outcome, detail = run.verdict(memory.used_bytes())
    except NoStepError as error:
        outcome, detail = "no step", str(error)
    except Exception as error:
        verdict = out_of_memory(error)
        if verdict is None:
            raise
        outcome, detail = "oom", ("" if verdict.certain else "suspected out of memory: ") + verdict.message
    peak, used, retries = memory.peak(), memory.used_bytes(), memory.retries()
    memory.end()
    return _trial(workload, batch_size, device, run.seconds, outcome, detail, peak, used, retries)


def _trial(
    workload: Trainable,
    batch_size: int,
    device: Device,
    seconds: Sequence[float],
    outcome: Outcome,
    detail: str,
    peak: Peak,
    used: int,
    retries: int,
) -> Trial:
    median = statistics.median(seconds) if seconds else None
    samples = batch_size * workload.accumulation / median if median else None
    return Trial(
        batch_size=batch_size,
        outcome=outcome,
        peak=peak,
        used_bytes=used,
        source=device.source,
        step_seconds=median,
        step_seconds_spread=(max(seconds) - min(seconds)) / median if median and len(seconds) > 1 else None,
        samples_per_second=samples,
        tokens_per_second=samples * workload.length if samples else None,
        alloc_retries=retries,
        detail=detail,
    )


class _Run:
    """The steps of one micro-batch size on one device."""

    def __init__(self, workload: Trainable, batch_size: int, device: Device, memory: DeviceMemory) -> None:
        self._workload = workload
        self._batch_size = batch_size
        self._kind = device.spec.kind
        self._total_bytes = device.spec.total_bytes
        self._schedule: Schedule = device.schedule
        self._memory = memory
        self._last_step_retried = False
        self.seconds: list[float] = []
        self.phases: dict[Phase, Callable[[], None]] = {
            "training": self.train,
            "evaluation": self.evaluate,
            "generation": self.generate,
        }

    def verdict(self, used_bytes: int) -> tuple[Outcome, str]:
        """Return (outcome, detail) of a run without an error, which may still not fit: the limit of a process is not
        exact (RLIMIT_DATA does not count libraries).
        """
        spilled = self._memory.spilled()
        if spilled:
            return "spill", spilled
        if self._last_step_retried:
            return "retries", f"the allocator still had to release its cache {SETTLING_STEPS} steps after the first"
        if self._total_bytes is not None and used_bytes > self._total_bytes:
            return "over limit", f"it used {used_bytes / 2**30:.2f} GiB of {self._total_bytes / 2**30:.2f} GiB"
        return "fits", ""

    def train(self) -> None:
        model = self._build()
        step = TrainingStep(model, self._workload.settings, self._kind, self._workload.overrides)
        first = self._schedule.first_batch_size
        if first is not None:  # small steps are cheap, so this one runs without padding
            self._run_steps(step, min(first, self._batch_size), 1, padded=False)
        self._run_steps(step, self._batch_size, self._schedule.warmup_steps)
        self._run_until_no_retries(step)
        self.seconds = []
        while len(self.seconds) < self._schedule.timed_steps and sum(self.seconds) <= self._schedule.timed_seconds:
            self._step(step, self._batch_size)
        timed = self.seconds
        if self._schedule.unpadded:
            self._step(step, self._batch_size, padded=False)
        self.seconds = timed[: self._schedule.timed_steps]

    def evaluate(self) -> None:
        """Run evaluation batches with the optimizer's state in memory, keeping the logits for the metrics."""
        step = self._build_and_train()
        kept: list[torch.Tensor] = []
        for _ in range(EVALUATED_BATCHES):
            batch = self._workload.batch(self._batch_size, self._kind)
            self._timed(lambda batch=batch: kept.append(step.evaluate(batch)))  # type: ignore[misc]

    def generate(self) -> None:
        """Generate with the optimizer's state in memory, as Trainer does in its evaluation."""
        model = self._build_and_train().model
        batch = self._workload.batch(self._batch_size, self._kind)
        precision, count = self._workload.settings.precision, self._workload.new_tokens
        self._timed(lambda: generation_step(model, precision, batch, count, self._kind))

    def _build(self) -> nn.Module:
        import torch

        with torch.device(self._kind):
            model = initialized(self._workload.build(), self._kind)
        restore_captured_outputs(model)
        gc.collect()
        self._memory.start()
        return model

    def _build_and_train(self) -> TrainingStep:
        """Return the step after a few at the smallest size, which create the optimizer's state."""
        model = self._build()
        step = TrainingStep(model, self._workload.settings, self._kind, self._workload.overrides)
        self._run_steps(step, smallest_batch(model), self._schedule.warmup_steps)
        self.seconds = []
        return step

    def _run_steps(self, step: TrainingStep, batch_size: int, count: int, *, padded: bool = True) -> None:
        """Train until the optimizer has stepped ``count`` times. Raise NoStepError if too many steps are skipped."""
        done: list[None] = []
        hook = step.optimizer.register_step_post_hook(lambda *_: done.append(None))
        taken = 0
        while len(done) < count:
            if taken == count + MOST_SKIPPED_STEPS:
                raise NoStepError(f"the optimizer stepped only {len(done)} times in {taken} training steps")
            self._step(step, batch_size, padded=padded)
            taken += 1
        hook.remove()

    def _run_until_no_retries(self, step: TrainingStep) -> None:
        for _ in range(SETTLING_STEPS):
            if not self._last_step_retried:
                return
            self._step(step, self._batch_size)

    def _step(self, step: TrainingStep, batch_size: int, *, padded: bool = True) -> None:
        before = self._memory.retries()
        self._timed(lambda: step.worst_case(self._workload, batch_size, self._kind, padded=padded))
        self._last_step_retried = self._memory.retries() > before

    def _timed(self, work: Callable[[], object]) -> None:
        started = time.perf_counter()
        work()
        if self._schedule.timed_steps:
            self._memory.synchronize()
        self.seconds.append(time.perf_counter() - started)
