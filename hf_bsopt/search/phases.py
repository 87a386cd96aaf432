"""The largest batch of an evaluation or a generation: no gradients, the optimizer's state resident."""

from __future__ import annotations

from collections.abc import Callable

from ..memory.predictor import Predictor
from ..records import GpuSpec
from ..report.report import PhaseAnswer
from ..workloads.workload import Phase, Trainable
from .choose import LARGEST_TRIED, largest_under, round_down
from .verifier import Verifier, nothing_fits
from .wishes import Wishes


def predicted_phase(phase: Phase, workload: Trainable, device: GpuSpec, wishes: Wishes) -> PhaseAnswer:
    predictor = _predictor_of(phase, workload, device)
    _, size = largest_under(
        predictor,
        wishes.target[1],
        total_bytes=device.total_bytes or 0,
        multiple_of=wishes.multiple_of,
        limit=_most(phase, wishes),
        guess=predictor.guess,
    )
    asked = wishes.check_evaluation if phase == "evaluation" else None
    checked = None if asked is None else predictor(asked)
    return PhaseAnswer(size, predictor(max(1, size)), checked)


def proved_phase(
    phase: Phase, predicted: PhaseAnswer, verifier: Verifier, workload: Trainable, device: GpuSpec, wishes: Wishes
) -> PhaseAnswer:
    """By what the client of ``verifier`` runs. Raises NothingFitsError where nothing that was run held."""
    predictor = _predictor_of(phase, workload, device)
    allowed: Callable[[int], int] = lambda size: round_down(min(size, _most(phase, wishes)), wishes.multiple_of)  # noqa: E731
    verifier.workload = predictor.workload
    proof = verifier.verify(predicted.batch_size, allowed, predictor, phase)
    if not proof.batch_size:
        raise nothing_fits(proof, verifier.share, device.name)
    asked = wishes.check_evaluation if phase == "evaluation" else None
    checked = None if asked is None else verifier.run(asked, phase)
    return PhaseAnswer(proof.batch_size, verifier.run(proof.batch_size, phase), checked)


def _predictor_of(phase: Phase, workload: Trainable, device: GpuSpec) -> Predictor:
    workload = workload.accumulating(1)
    return Predictor(workload.evaluating() if phase == "evaluation" else workload, device, phase=phase)


def _most(phase: Phase, wishes: Wishes) -> int:
    return wishes.evaluation_limit or LARGEST_TRIED if phase == "evaluation" else LARGEST_TRIED
