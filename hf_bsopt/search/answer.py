"""The result of a search, which the pipeline returns and reports, advice and integrations work with."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..options import SearchOptions
from ..records import Decision, GpuSpec, MemoryProfile, Source, Trial
from ..workloads.trainable import Trainable
from .batch_plan import BatchPlan

BY_TRUST: tuple[Source, ...] = ("predicted", "rehearsed", "measured")


@dataclass(frozen=True)
class Question:
    """The inputs of a search. Advice starts from them, even if nothing fits."""

    workload: Trainable
    device: GpuSpec
    search: SearchOptions
    expandable_segments: bool = False


@dataclass(frozen=True)
class PhaseAnswer:
    """The largest batch of an evaluation or of a generation.

    An evaluation has no gradients, the optimizer state resident and the logits kept; a generation has a cache of keys
    and values. batch_size: 0 if not even one sequence fits; trial is then that of one sequence. checked: the answer to
    ``check_evaluation``.
    """

    batch_size: int
    trial: Trial
    checked: Trial | None = None


@dataclass(frozen=True)
class Answer:
    """Everything that a search found.

    trials: the predicted ones, one for each size of the table, then those that were run. composition: bytes by use, at
    the chosen size. parameters: (all, trained). checked: the answer to ``check``. notes: assumptions and automatic
    choices. has_batch_norm: the model has BatchNorm, whose statistics are over one micro-batch. memory_profile:
    predicted memory over a step of the chosen size. prediction_error: measured ÷ predicted used memory at
    a size that refuted the prediction, None if it was not refuted.
    """

    workload: Trainable
    device: GpuSpec
    search: SearchOptions
    trials: tuple[Trial, ...]
    decision: Decision
    plan: BatchPlan
    composition: dict[str, int]
    peak_origin: str
    parameters: tuple[int, int]
    checked: Trial | None = None
    evaluation: PhaseAnswer | None = None
    generation: PhaseAnswer | None = None
    notes: tuple[str, ...] = ()
    has_batch_norm: bool = False
    memory_profile: MemoryProfile | None = field(default=None, repr=False)
    prediction_error: float | None = None
    expandable_segments: bool = False

    @property
    def question(self) -> Question:
        """The workload, the device and the constraints."""
        return Question(self.workload, self.device, self.search, self.expandable_segments)

    @property
    def batch_size(self) -> int:
        """The micro-batch: ``per_device_train_batch_size``."""
        return self.plan.micro_batch

    @property
    def source(self) -> Source:
        """Source of the answer: predicted, rehearsed or measured."""
        return self.chosen.source

    @property
    def target(self) -> tuple[float, float]:
        """Requested lower and upper fraction of the device's memory."""
        return self.search.target

    @property
    def asked_effective_batch(self) -> bool:
        """True if an effective batch size was requested."""
        return bool(self.search.effective_batch_size or self.search.total_tokens)

    @property
    def config(self) -> dict[str, Any]:
        """The answer as a dict, for ``CONFIG.update(report.config)``."""
        config: dict[str, Any] = {
            "batch_size": self.plan.micro_batch,
            "gradient_accumulation_steps": self.plan.accumulation,
        }
        if self.search.learning_rate is not None:
            config["learning_rate"] = self.plan.learning_rate
        return config

    @property
    def chosen(self) -> Trial:
        """The most trustworthy trial of the chosen size."""
        return self.best(self.decision.batch_size)

    def best(self, batch_size: int) -> Trial:
        """Return the most trustworthy trial of a size: one that was run rather than one that was predicted."""
        return max((t for t in self.trials if t.batch_size == batch_size), key=lambda t: BY_TRUST.index(t.source))

    @property
    def ran(self) -> tuple[Trial, ...]:
        """The sizes that were run, in order."""
        return tuple(trial for trial in self.trials if trial.source != "predicted")

    @property
    def utilization(self) -> float:
        """Used ÷ total memory of the device, at the chosen size."""
        return self.utilization_of(self.chosen)

    def utilization_of(self, trial: Trial) -> float:
        """Return used ÷ total memory of the device in a trial."""
        return (trial.used_bytes or 0) / (self.device.total_bytes or 1)
