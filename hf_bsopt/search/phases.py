"""Predict and verify the largest batch of an evaluation or a generation, beside the resident optimizer state."""

from __future__ import annotations

from ..memory.predictor import Predictor
from ..options import MAX_BATCH_SIZE, SearchOptions
from ..records import GpuSpec
from ..workloads.trainable import Phase, Trainable
from .answer import PhaseAnswer
from .choose import largest_under, round_down
from .verifier import Verifier, nothing_fits


def predict_phase(
    phase: Phase, workload: Trainable, device: GpuSpec, search: SearchOptions, *, expandable_segments: bool
) -> PhaseAnswer:
    """Predict the largest batch of this phase under the target."""
    predictor = _predictor_of(phase, workload, device, expandable_segments)
    _, size = largest_under(
        predictor,
        search.target[1],
        total_bytes=device.total_bytes or 0,
        multiple_of=search.multiple_of,
        limit=_largest_wanted(phase, workload, search),
        guess=predictor.guess,
    )
    asked = search.check_evaluation if phase == "evaluation" else None
    return PhaseAnswer(size, predictor(max(1, size)), None if asked is None else predictor(asked))


def verify_phase(
    phase: Phase,
    predicted: PhaseAnswer,
    verifier: Verifier,
    workload: Trainable,
    search: SearchOptions,
    *,
    expandable_segments: bool,
) -> PhaseAnswer:
    """Verify the predicted batch by running it. Raises NothingFitsError if nothing that was run fits."""
    device = verifier.client.device.spec
    predictor = _predictor_of(phase, workload, device, expandable_segments)

    def allowed(size: int) -> int:
        return round_down(min(size, _largest_wanted(phase, workload, search)), search.multiple_of)

    phase_verifier = verifier.for_phase(phase, predictor.workload)
    verification = phase_verifier.verify(predicted.batch_size, allowed, predictor)
    if not verification.batch_size:
        raise nothing_fits(verification, phase_verifier)
    asked = search.check_evaluation if phase == "evaluation" else None
    checked = None if asked is None else phase_verifier.run(asked)
    return PhaseAnswer(verification.batch_size, phase_verifier.run(verification.batch_size), checked)


def _predictor_of(phase: Phase, workload: Trainable, device: GpuSpec, expandable_segments: bool) -> Predictor:
    workload = workload.accumulating(1)
    if phase == "evaluation":
        workload = workload.evaluating()
    return Predictor(workload, device, expandable_segments=expandable_segments, phase=phase)


def _largest_wanted(phase: Phase, workload: Trainable, search: SearchOptions) -> int:
    """Return the largest useful batch: a process's share of the evaluation dataset if its size is known."""
    examples = workload.evaluation_examples if phase == "evaluation" else None
    return MAX_BATCH_SIZE if examples is None else min(MAX_BATCH_SIZE, max(1, -(-examples // search.num_processes)))
