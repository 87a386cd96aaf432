"""The peak of a workload's training step on a device, at any batch size, from two traces."""

from __future__ import annotations

import dataclasses
import functools
import importlib
from typing import Any

from torch import nn

from .._utils import progress
from ..records import GpuSpec, Trial
from ..workloads.training_step import STEPS, TrainingStep, evaluation_step, has_batch_norm, smallest_batch
from ..workloads.workload import Phase, Trainable
from .generation import generation_at_its_end
from .replay.timeline import Timeline
from .tracing.tracer import label, trace


class Predictor:
    """Traces once, then answers for any batch size in milliseconds."""

    def __init__(
        self,
        workload: Trainable,
        device: GpuSpec,
        *,
        expandable_segments: bool = False,
        phase: Phase = "training",
        torch_version: str | None = None,
    ) -> None:
        """``phase``: an evaluation or a generation beside the optimizer's state, instead of a training step.
        ``torch_version``: the release that will train; None is the one that is installed.
        """
        self.workload = workload
        self.device = device
        self._expandable_segments = expandable_segments
        self._phase = phase
        self._torch_version = torch_version
        self._parameters = (0, 0)
        self.has_batch_norm, self.smallest_batch = False, 1
        self._trials: dict[int, Trial] = {}

    @functools.cached_property
    def timeline(self) -> Timeline:
        if "paged" in self.workload.settings.optimizer:
            importlib.import_module("bitsandbytes.functional")  # there before the trace puts its own pages in
        steps: dict[int, TrainingStep] = {}
        kept: list[Any] = []

        def train(model: nn.Module, batch_size: int) -> None:
            step = steps.get(id(model))
            if step is None:
                steps.clear()
                step = steps[id(model)] = TrainingStep(model, self.workload.settings, own=self.workload.own)
                label(step.buckets, "gradients")
            step.worst_case(self.workload, batch_size, "meta")

        def after_training(model: nn.Module, batch_size: int) -> None:
            if id(model) not in steps:
                kept.clear()
                for _ in range(STEPS):  # what training left of the cache is there too
                    train(model, smallest_batch(model))
            elif self._phase == "evaluation":
                batch = self.workload.batch(batch_size, "meta")
                kept.append(evaluation_step(model, self.workload.settings.precision, batch))
            else:
                generation_at_its_end(model, self.workload, batch_size)

        def build() -> nn.Module:
            model = self.workload.build()
            sizes = [(p.requires_grad, _count(p)) for p in model.parameters()]
            self._parameters = sum(n for _, n in sizes), sum(n for trained, n in sizes if trained)
            self.has_batch_norm, self.smallest_batch = has_batch_norm(model), smallest_batch(model)
            return model

        model = dict(self.workload.describe()).get("model", "the model")
        with progress.task(f"tracing {self._phase} of {model} at {self.workload.length}"):
            return trace(
                build,
                train if self._phase == "training" else after_training,
                device=self.device,
                verify=self.workload.is_custom,
                torch_version=self._torch_version,
            )

    def on(self, device: GpuSpec) -> Predictor:
        """The same step on another device: traced again only where other kernels run there."""
        other = Predictor(
            self.workload,
            device,
            expandable_segments=self._expandable_segments,
            phase=self._phase,
            torch_version=self._torch_version,
        )
        other.timeline = self.timeline
        other._parameters, other.has_batch_norm = self._parameters, self.has_batch_norm
        other.smallest_batch = self.smallest_batch
        return other

    @property
    def parameters(self) -> tuple[int, int]:
        """(all, trained) parameters of the model, shared ones counted once."""
        return self._parameters

    def guess(self, share: float) -> int:
        """About how many sequences fill this share of the device."""
        if self.device.total_bytes is None:
            return 1
        fixed, each = self._line
        return max(1, int((share * self.device.total_bytes - fixed) / each))

    @functools.cached_property
    def _line(self) -> tuple[float, float]:
        """(bytes, bytes a sequence) used, about: through two replays near the sizes that will be asked for."""
        assert self.device.total_bytes is not None
        one, nine = (self.timeline.live_bytes(size, self.device) for size in (1, 9))
        room = self.device.total_bytes - self.device.context_bytes - one
        larger = max(2, 1 + int(8 * room / max(1, nine - one)))
        smaller = larger // 2
        low, high = self.unlimited(smaller), self.unlimited(larger)
        each = max(1.0, (high - low) / (larger - smaller))
        return high - each * larger, each

    def unlimited(self, batch_size: int) -> int:
        """Bytes that this micro-batch would use on such a device without a limit."""
        without = dataclasses.replace(self.device, total_bytes=None)
        return self.timeline.peak(batch_size, without).reserved_bytes + self.device.context_bytes

    def expected(self, batch_size: int) -> int:
        """Bytes that this micro-batch uses on the device, whose cache is given back where it is full; where it does
        not fit, what it would use without a limit.
        """
        trial = self(batch_size)
        return trial.used_bytes or 0 if trial.fits else self.unlimited(batch_size)

    def fits_within(self, batch_size: int, total_bytes: float) -> bool:
        """Whether it would still run on such a device with so many bytes, the context included."""
        if total_bytes <= self.device.context_bytes:
            return False
        smaller = dataclasses.replace(self.device, total_bytes=int(total_bytes))
        return self.timeline.replay(batch_size, smaller, expandable_segments=self._expandable_segments).fits

    def __call__(self, batch_size: int) -> Trial:
        """The Trial of this micro-batch: used_bytes are the allocator's reserved bytes and the context."""
        known = self._trials.get(batch_size)
        if known is None:
            known = self._trials[batch_size] = self._replay(batch_size)
        return known

    def _replay(self, batch_size: int) -> Trial:
        fit = self.timeline.replay(batch_size, self.device, expandable_segments=self._expandable_segments)
        return Trial(
            batch_size=batch_size,
            outcome="fits" if fit.fits else "oom",
            peak=fit.peak,
            used_bytes=fit.peak.reserved_bytes + self.device.context_bytes,
            source="predicted",
        )


def _count(parameter: nn.Parameter) -> int:
    """Bitsandbytes packs two 4-bit weights in a byte."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else state.shape.numel()
