"""Make the answer of a prediction: the decision with the table, the memory by its use and the other phases."""

from __future__ import annotations

from ..memory.memory_profile import memory_profile
from ..memory.predictor import Predictor
from ..options import MAX_BATCH_SIZE, SearchOptions
from ..records import Decision, Trial
from ..workloads.trainable import Trainable
from . import phases
from .answer import Answer
from .prediction import PredictedSize


def predicted_answer(
    predicted: PredictedSize,
    workload: Trainable,
    search: SearchOptions,
    notes: tuple[str, ...],
    *,
    expandable_segments: bool,
) -> Answer:
    """Return the answer before anything was run."""
    predictor, decision = predicted.predictor, predicted.decision
    device = predictor.device
    evaluation = generation = None
    if search.evaluation or search.verify_evaluation:
        evaluation = phases.predict_phase(
            "evaluation", workload, device, search, expandable_segments=expandable_segments
        )
    if workload.new_tokens:
        generation = phases.predict_phase(
            "generation", workload, device, search, expandable_segments=expandable_segments
        )
    return Answer(
        workload=workload,
        device=device,
        search=search,
        trials=table_trials(predictor, decision, ()),
        decision=decision,
        plan=predicted.plan,
        composition=composition(predictor, decision.batch_size),
        peak_origin=predictor.timeline.peak_origin(decision.batch_size, device),
        parameters=predictor.parameters,
        checked=None if search.check is None else predictor(search.check),
        evaluation=evaluation,
        generation=generation,
        notes=notes,
        expandable_segments=expandable_segments,
        has_batch_norm=predictor.has_batch_norm,
        memory_profile=memory_profile(predictor.timeline, decision.batch_size, device),
    )


def table_trials(predictor: Predictor, decision: Decision, ran: tuple[Trial, ...]) -> tuple[Trial, ...]:
    """Predict the sizes of the table: doubling ones up to the first that does not fit, the chosen, the safe and the
    largest one, the one after it, and those that were run.
    """
    first_misfit = decision.largest + 1
    most = min(first_misfit, 2 * MAX_BATCH_SIZE)
    doubling = [1 << power for power in range(most.bit_length()) if 1 << power <= most]
    sizes = {*doubling, decision.batch_size, decision.safe, decision.largest, first_misfit}
    sizes |= {trial.batch_size for trial in ran}
    return tuple(predictor(size) for size in sorted(sizes))


def composition(predictor: Predictor, batch_size: int) -> dict[str, int]:
    """Return bytes by what they are for; their sum is the Trial's used_bytes."""
    parts = predictor.timeline.composition(batch_size, predictor.device)
    trial = predictor(batch_size)
    reserved = trial.peak.reserved_bytes if trial.peak else 0
    outside = "CUDA context" if predictor.device.kind == "cuda" else "libraries"
    return {**parts, "allocator cache": reserved - sum(parts.values()), outside: predictor.device.context_bytes}
