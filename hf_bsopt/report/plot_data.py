"""The data that the plots of a report show."""

from __future__ import annotations

from dataclasses import dataclass

from ..records import MemoryProfile, Trial
from ..search.answer import Answer
from ..workloads.workload import Workload
from .wording import memory_name


@dataclass(frozen=True)
class PlotData:
    """Everything that the plots of one report show.

    subject: model, length and precision. memory: "VRAM" or "RAM". largest: the largest size that fits, as far as is
    known. memory_profile, peak_origin: predicted, at the chosen size.
    """

    subject: str
    device: str
    memory: str
    total_bytes: int
    target: tuple[float, float]
    trials: tuple[Trial, ...]
    chosen: Trial
    largest: int
    memory_profile: MemoryProfile | None
    peak_origin: str

    @classmethod
    def of(cls, answer: Answer) -> PlotData:
        """Return the data to plot for an answer."""
        model = dict(answer.workload.describe()).get("model", "model")
        tokens = f", {answer.workload.length} tokens" if isinstance(answer.workload, Workload) else ""
        return cls(
            subject=f"{model}{tokens}, {answer.workload.settings.precision}",
            device=answer.device.name,
            memory=memory_name(answer),
            total_bytes=answer.device.total_bytes or 1,
            target=answer.target,
            trials=answer.trials,
            chosen=answer.chosen,
            largest=answer.decision.largest,
            memory_profile=answer.memory_profile,
            peak_origin=answer.peak_origin,
        )
