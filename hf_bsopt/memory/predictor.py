"""Predict the peak memory of a workload's training step on a device, at any batch size, from two traces."""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from torch import nn

from .._utils import progress
from ..errors import BatchSizeError, NotLinearError, TraceError, UnknownValueError
from ..records import GpuSpec, Trial
from ..workloads.meta_device import tensors_of
from ..workloads.trainable import Phase, Trainable
from ..workloads.training_step import STEPS, TrainingStep, has_batch_norm, smallest_batch
from ..workloads.workload import Workload
from .generation import generate_last_tokens
from .replay.timeline import Timeline
from .replay.timeline_by_size import TimelineBySize
from .tracing.tracer import label, trace, trace_each_size

SIZES_OF_A_GUESS = (8, 16)
LARGEST_GUESS = 2048
"""Of a step that is traced at each size: memory that grows with the square of the size is far from any line."""


class Predictor:
    """Peak memory by batch size: the step is traced once, then replayed in milliseconds for each size."""

    def __init__(
        self,
        workload: Trainable,
        device: GpuSpec,
        *,
        expandable_segments: bool = False,
        phase: Phase = "training",
        torch_version: str | None = None,
    ) -> None:
        """Trace nothing yet: the first prediction does.

        ``phase`` selects the training step, or an evaluation or generation that runs while the optimizer's state is
        allocated. ``torch_version`` is the release that will train (None: the installed one).
        """
        self.workload = workload
        self.device = device
        self._expandable_segments = expandable_segments
        self._phase = phase
        self._torch_version = torch_version
        self._parameter_counts = (0, 0)
        self.has_batch_norm, self.smallest_batch = False, 1
        self._trials: dict[int, Trial] = {}
        self._confirmed: set[int] = set()

    @functools.cached_property
    def timeline(self) -> Timeline:
        """The traced step. Computed on first use."""
        build, step = self._step()
        with self._progress():
            try:
                timeline = trace(
                    build, step, device=self.device, verify=self.workload.is_custom, torch_version=self._torch_version
                )
                if isinstance(timeline, TimelineBySize):
                    self._by_size = timeline
                return timeline
            except NotLinearError:
                return self._by_size
            except Exception as error:
                cause = (error.original if isinstance(error, UnknownValueError) else None) or error
                if isinstance(cause, BatchSizeError) or not isinstance(self.workload, Workload):
                    raise  # explained already, or the user's own code, which they can read
                raise TraceError(self.workload.failure(cause)) from cause

    @functools.cached_property
    def _by_size(self) -> TimelineBySize:
        build, step = self._step()
        return trace_each_size(build, step, device=self.device, torch_version=self._torch_version)

    def confirm(self, batch_size: int) -> bool:
        """Trace a custom step at this size, too. If the prediction does not follow from smaller sizes, return False and
        trace each size from now on: a loss in chunks is the same operations up to the size of a chunk.
        """
        if not self.workload.is_custom or batch_size in self._confirmed or isinstance(self.timeline, TimelineBySize):
            return True
        with self._progress():
            recorded = self._by_size.at(batch_size, self.device)
        if self.timeline.at(batch_size, self.device).is_same_at(batch_size, recorded):
            self._confirmed.add(batch_size)
            return True
        self.timeline = self._by_size
        self._trials.clear()
        vars(self).pop("_usage_line", None)
        return False

    def _progress(self) -> AbstractContextManager[object]:
        model = dict(self.workload.describe()).get("model", "the model")
        return progress.task(f"tracing {self._phase} of {model} at {self.workload.length}")

    def _step(self) -> tuple[Callable[[], nn.Module], Callable[[nn.Module, int], None]]:
        """Return what builds the model, and the step of this phase."""
        if "paged" in self.workload.settings.optimizer:
            importlib.import_module("bitsandbytes.functional")  # imported so that as_device can patch it
        steps: dict[int, TrainingStep] = {}
        outputs: list[Any] = []

        def train(model: nn.Module, batch_size: int) -> None:
            step = steps.get(id(model))
            if step is None:
                steps.clear()
                step = steps[id(model)] = TrainingStep(model, self.workload.settings, overrides=self.workload.overrides)
                label(step.buckets, "gradients")
                for module in step.other_modules:
                    label(tensors_of(module), "weights")
            step.worst_case(self.workload, batch_size, "meta")

        def after_training(model: nn.Module, batch_size: int) -> None:
            if id(model) not in steps:
                outputs.clear()
                for _ in range(STEPS):  # the allocator's cache is as training leaves it
                    train(model, smallest_batch(model))
            elif self._phase == "evaluation":
                batch = self.workload.batch(batch_size, "meta")
                outputs.append(steps[id(model)].evaluate(batch))
            else:
                generate_last_tokens(model, self.workload, batch_size)

        return self._build, train if self._phase == "training" else after_training

    def _build(self) -> nn.Module:
        model = self.workload.build()
        counts = [(p.requires_grad, _element_count(p)) for p in model.parameters()]
        self._parameter_counts = sum(n for _, n in counts), sum(n for is_trained, n in counts if is_trained)
        self.has_batch_norm, self.smallest_batch = has_batch_norm(model), smallest_batch(model)
        return model

    def on(self, device: GpuSpec) -> Predictor:
        """Return a predictor of the same step on another device, traced again only if other kernels run there."""
        other = Predictor(
            self.workload,
            device,
            expandable_segments=self._expandable_segments,
            phase=self._phase,
            torch_version=self._torch_version,
        )
        other.timeline = self.timeline
        other._parameter_counts, other.has_batch_norm = self._parameter_counts, self.has_batch_norm
        other.smallest_batch = self.smallest_batch
        return other

    @property
    def parameters(self) -> tuple[int, int]:
        """(total, trainable) parameter counts of the model; shared parameters are counted once."""
        return self._parameter_counts

    def guess(self, fraction: float) -> int:
        """Estimate how many sequences fill this fraction of the device's memory; at least 1."""
        if self.device.total_bytes is None:
            return 1
        fixed, per_sequence = self._usage_line
        size = max(1, int((fraction * self.device.total_bytes - fixed) / per_sequence))
        return min(size, LARGEST_GUESS) if self.timeline is self._by_size else size

    @functools.cached_property
    def _usage_line(self) -> tuple[float, float]:
        """(fixed bytes, bytes per sequence), estimated from two replays near the sizes that fill the device."""
        assert self.device.total_bytes is not None
        if self.timeline is self._by_size:  # each size is traced, and those near the answer say most about it
            line = self._line_through(*SIZES_OF_A_GUESS)
            near = min(int((self.device.total_bytes - line[0]) / line[1]), LARGEST_GUESS)
            return self._line_through(near, 2 * near) if near > SIZES_OF_A_GUESS[1] else line
        live_at_1, live_at_9 = (self.timeline.live_bytes(size, self.device) for size in (1, 9))
        available = self.device.total_bytes - self.device.context_bytes - live_at_1
        larger = max(2, 1 + int(8 * available / max(1, live_at_9 - live_at_1)))
        return self._line_through(larger // 2, larger)

    def _line_through(self, smaller: int, larger: int) -> tuple[float, float]:
        low, high = self.unlimited(smaller), self.unlimited(larger)
        per_sequence = max(1.0, (high - low) / (larger - smaller))
        return high - per_sequence * larger, per_sequence

    def unlimited(self, batch_size: int) -> int:
        """Return the bytes that this micro-batch would use if the device had unlimited memory."""
        unlimited_device = dataclasses.replace(self.device, total_bytes=None)
        return self.timeline.peak(batch_size, unlimited_device).reserved_bytes + self.device.context_bytes

    def expected(self, batch_size: int) -> int:
        """Return the bytes that this micro-batch uses on the device. The allocator releases its cache when memory
        runs out. If the micro-batch does not fit, return what it would use with unlimited memory.
        """
        trial = self(batch_size)
        return trial.used_bytes or 0 if trial.fits else self.unlimited(batch_size)

    def fits_within(self, batch_size: int, total_bytes: float) -> bool:
        """Return whether the micro-batch would fit in ``total_bytes`` of memory, CUDA context included."""
        if total_bytes <= self.device.context_bytes:
            return False
        smaller = dataclasses.replace(self.device, total_bytes=int(total_bytes))
        return self.timeline.replay(batch_size, smaller, expandable_segments=self._expandable_segments).fits

    def __call__(self, batch_size: int) -> Trial:
        """Return the predicted Trial of this micro-batch; used_bytes is reserved bytes plus the CUDA context."""
        known = self._trials.get(batch_size)
        if known is None:
            known = self._trials[batch_size] = self._replay(batch_size)
        return known

    def _replay(self, batch_size: int) -> Trial:
        result = self.timeline.replay(batch_size, self.device, expandable_segments=self._expandable_segments)
        return Trial(
            batch_size=batch_size,
            outcome="fits" if result.fits else "oom",
            peak=result.peak,
            used_bytes=result.peak.reserved_bytes + self.device.context_bytes,
            source="predicted",
        )


def _element_count(parameter: nn.Parameter) -> int:
    """Return the number of weights; bitsandbytes packs two 4-bit weights in a byte."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else state.shape.numel()
