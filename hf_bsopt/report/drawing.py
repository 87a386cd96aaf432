"""The data of an answer's picture."""

from __future__ import annotations

from ..search.answer import Answer
from ..workloads.workload import Workload
from .plot_panels import Drawing
from .wording import memory_name


def drawing_of(answer: Answer) -> Drawing:
    """Return what a picture shows of an answer."""
    model = dict(answer.workload.describe()).get("model", "model")
    tokens = f", {answer.workload.length} tokens" if isinstance(answer.workload, Workload) else ""
    return Drawing(
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
