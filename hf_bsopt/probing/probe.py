"""One micro-batch size, really run: the model built, the production step, what the device says of it."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from ..records import Outcome, Peak, Trial
from ..workloads.meta_device import initialized
from ..workloads.training_step import TrainingStep, evaluation_step, generation_step, smallest_batch
from ..workloads.workload import Phase, Trainable
from .devices import Device, Schedule
from .memory import DeviceMemory
from .oom import out_of_memory

if TYPE_CHECKING:
    import torch
    from torch import nn

MOST_SKIPPED_STEPS = 20
"""The gradient scaler starts at 2^16 and halves whenever gradients overflow, skipping the optimizer's step."""
SETTLING_STEPS = 8
"""The allocator may give its cache back a few times until it has found its blocks; afterwards it should not have to."""
EVALUATED_BATCHES = 2
"""The second is forwarded beside the logits of the first, which are kept for the metrics."""


class NoStepError(RuntimeError):
    """The optimizer did not step: gradients overflowed in every step."""


def probe(workload: Trainable, batch_size: int, device: Device, phase: Phase = "training") -> Trial:
    """Runs the production step on the device that this process sees.

    An out-of-memory error is the Trial's outcome, and so is what ran and yet does not fit; every other error is the
    caller's.
    """
    memory = device.memory()
    run = _Run(workload, batch_size, device, memory)
    outcome: Outcome = "fits"
    detail = ""
    try:
        run.phases[phase]()
        outcome, detail = run.verdict()
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
    """The steps of one size on one device."""

    def __init__(self, workload: Trainable, batch_size: int, device: Device, memory: DeviceMemory) -> None:
        self._workload = workload
        self._batch_size = batch_size
        self._kind = device.spec.kind
        self._schedule: Schedule = device.schedule
        self._memory = memory
        self._retried_in_the_last_step = False
        self.seconds: list[float] = []
        self.phases: dict[Phase, Callable[[], None]] = {
            "training": self.train,
            "evaluation": self.evaluate,
            "generation": self.generate,
        }

    def verdict(self) -> tuple[Outcome, str]:
        """Not raising is not yet fitting."""
        spilled = self._memory.spilled()
        if spilled:
            return "spill", spilled
        if self._retried_in_the_last_step:
            return "retries", f"the allocator still gave its cache back in step {SETTLING_STEPS} after the first"
        return "fits", ""

    def train(self) -> None:
        model = self._built()
        step = TrainingStep(model, self._workload.settings, self._kind, self._workload.own)
        first = self._schedule.first_at
        if first is not None:  # small steps are cheap: it may as well be one without padding
            self._until_stepped(step, min(first, self._batch_size), 1, padded=False)
        self._until_stepped(step, self._batch_size, self._schedule.stepped)
        self._until_settled(step)
        self.seconds = []
        while len(self.seconds) < self._schedule.timed and sum(self.seconds) <= self._schedule.timed_seconds:
            self._step(step, self._batch_size)
        timed = self.seconds
        if self._schedule.unpadded:
            self._step(step, self._batch_size, padded=False)
        self.seconds = timed[: self._schedule.timed]

    def evaluate(self) -> None:
        """Beside the optimizer's state, as in training; the logits are kept for the metrics."""
        model = self._trained()
        kept: list[torch.Tensor] = []
        for _ in range(EVALUATED_BATCHES):
            batch = self._workload.batch(self._batch_size, self._kind)
            self._timed(lambda batch=batch: kept.append(self._evaluated(model, batch)))  # type: ignore[misc]

    def _evaluated(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return evaluation_step(model, self._workload.settings.precision, batch, self._kind)

    def generate(self) -> None:
        """Beside the optimizer's state too: Trainer generates in its evaluation."""
        model = self._trained()
        batch = self._workload.batch(self._batch_size, self._kind)
        precision, count = self._workload.settings.precision, self._workload.new_tokens
        self._timed(lambda: generation_step(model, precision, batch, count, self._kind))

    def _built(self) -> nn.Module:
        import torch

        with torch.device(self._kind):
            model = initialized(self._workload.build(), self._kind)
        gc.collect()
        self._memory.start()
        return model

    def _trained(self) -> nn.Module:
        """The model after some steps at the smallest size, which leave the optimizer's state and a cache behind."""
        model = self._built()
        step = TrainingStep(model, self._workload.settings, self._kind, self._workload.own)
        self._until_stepped(step, smallest_batch(model), self._schedule.stepped)
        self.seconds = []
        return model

    def _until_stepped(self, step: TrainingStep, batch_size: int, count: int, *, padded: bool = True) -> None:
        """Raises NoStepError where the gradient scaler skips them all."""
        done: list[None] = []
        hook = step.optimizer.register_step_post_hook(lambda *_: done.append(None))
        taken = 0
        while len(done) < count:
            if taken == count + MOST_SKIPPED_STEPS:
                raise NoStepError(f"the optimizer stepped only {len(done)} times in {taken} training steps")
            self._step(step, batch_size, padded=padded)
            taken += 1
        hook.remove()

    def _until_settled(self, step: TrainingStep) -> None:
        for _ in range(SETTLING_STEPS):
            if not self._retried_in_the_last_step:
                return
            self._step(step, self._batch_size)

    def _step(self, step: TrainingStep, batch_size: int, *, padded: bool = True) -> None:
        before = self._memory.retries()
        self._timed(lambda: step.worst_case(self._workload, batch_size, self._kind, padded=padded))
        self._retried_in_the_last_step = self._memory.retries() > before

    def _timed(self, work: Callable[[], object]) -> None:
        started = time.perf_counter()
        work()
        if self._schedule.timed:
            self._memory.synchronize()
        self.seconds.append(time.perf_counter() - started)
