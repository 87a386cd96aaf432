"""The road, in one screen: a workload and a device in, a Report out."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

from .batch_plan import BatchPlan, LearningRateScaling, plan
from .errors import NothingFitsError, RehearsalError, UsageError
from .memory.predictor import Predictor
from .probing import Prober
from .records import Decision, GpuSpec, Trial
from .report import EvaluationAnswer, Report
from .search import MAX_ATTEMPTS, MULTIPLE_OF, TARGET, Proof, check_target, decide, largest_under, prove, round_down
from .workload import ModuleWorkload, Workload

GIB = 2**30


@dataclass(frozen=True)
class Wishes:
    """What the user wants of the answer; the defaults are the house's.

    target: shares of the device's memory; only the upper end decides. batch_size: an upper limit on the micro-batch.
    effective_batch (sequences) or total_tokens: what one optimizer step takes over all processes, kept exactly.
    accumulation: micro-batches in a step, where no effective batch is named. check: a micro-batch to answer for.
    max_attempts: sizes that may be run to prove the answer.
    """

    target: tuple[float, float] = TARGET
    multiple_of: int = MULTIPLE_OF
    batch_size: int | None = None
    check: int | None = None
    effective_batch: int | None = None
    total_tokens: int | None = None
    accumulation: int = 1
    processes: int = 1
    learning_rate: float | None = None
    base_batch_size: int | None = None
    lr_scaling: LearningRateScaling = "sqrt"
    evaluation: bool = True
    check_evaluation: int | None = None
    expandable_segments: bool = False
    max_attempts: int = MAX_ATTEMPTS
    notes: tuple[str, ...] = field(default=())


_NAMES = {
    "max_attempts": "max_attempts",
    "accumulation": "gradient_accumulation_steps",
    "processes": "num_processes",
    "check": "check",
    "check_evaluation": "per_device_eval_batch_size",
}


def find(
    workload: Workload | ModuleWorkload, device: GpuSpec, wishes: Wishes = Wishes(), prober: Prober | None = None
) -> Report:
    """The answer, predicted; with a ``prober`` then proved by real steps on its device.

    Raises NothingFitsError, with the memory that one sequence would need, where nothing fits, and RehearsalError where
    a probe ends in anything but an answer.
    """
    _check(device, wishes)
    _plan(1, workload, wishes)  # whatever is wrong with the wishes is said before the tracing
    if prober is not None:
        prober.start()

    predictor = Predictor(
        workload.accumulating(wishes.accumulation), device, expandable_segments=wishes.expandable_segments
    )
    decision = _decide(predictor, wishes)
    batch_plan = _plan(decision.batch_size, workload, wishes)
    if batch_plan.accumulation > 1 and wishes.accumulation == 1:
        # gradients are now in memory during the forward pass, so that a little less fits
        predictor = Predictor(workload.accumulating(2), device, expandable_segments=wishes.expandable_segments)
        decision = _decide(predictor, wishes)
        batch_plan = _plan(decision.batch_size, workload, wishes)
    if batch_plan.micro_batch != decision.batch_size:
        decision = dataclasses.replace(
            decision,
            batch_size=batch_plan.micro_batch,
            safe=min(decision.safe, batch_plan.micro_batch),
            bound="divisor of the effective batch",
            reason=f"{batch_plan.micro_batch}: largest divisor of the effective batch of "
            f"{batch_plan.effective_batch} at or under {decision.batch_size}, which would fit",
        )
    proofs: tuple[Trial, ...] = ()
    checked = None if wishes.check is None else predictor(wishes.check)
    if prober is not None:
        proof = _prove(prober, workload, predictor, decision, wishes)
        proofs = proof.trials
        decision = _proved(decision, proof, wishes, device)
        batch_plan = _plan(decision.batch_size, workload, wishes)
        if wishes.check is not None:
            checked = next((t for t in proofs if t.batch_size == wishes.check), None)
            checked = checked or prober(predictor.workload, wishes.check)
    return Report(
        workload=workload,
        device=device,
        target=wishes.target,
        trials=(*_table(predictor, decision), *proofs),
        decision=decision,
        plan=batch_plan,
        composition=_composition(predictor, decision.batch_size),
        peak_origin=predictor.timeline.peak_origin(decision.batch_size, device),
        parameters=predictor.parameters,
        checked=checked,
        evaluation=_evaluation(workload, device, wishes) if wishes.evaluation else None,
        notes=wishes.notes,
        has_batch_norm=predictor.has_batch_norm,
        asked_learning_rate=wishes.learning_rate is not None,
        asked_effective_batch=bool(wishes.effective_batch or wishes.total_tokens),
    )


def _check(device: GpuSpec, wishes: Wishes) -> None:
    if device.total_bytes is None:
        raise UsageError("a batch size needs a device with a limit of memory")
    for field_name, name in _NAMES.items():
        value = getattr(wishes, field_name)
        if value is not None and value < 1:
            raise UsageError(f"{name} is at least 1, not {value}")
    if wishes.accumulation > 1 and (wishes.effective_batch is not None or wishes.total_tokens is not None):
        raise UsageError("an effective batch and gradient_accumulation_steps together say too much: give one of them")
    check_target(wishes.target)


def _prove(
    prober: Prober, workload: Workload | ModuleWorkload, predictor: Predictor, decision: Decision, wishes: Wishes
) -> Proof:
    total = predictor.device.total_bytes or 0

    def allowed(size: int) -> int:
        size = round_down(min(size, wishes.batch_size or size), wishes.multiple_of)
        return _plan(size, workload, wishes).micro_batch if size else 0

    proof = prove(
        lambda size: prober(predictor.workload, size),
        decision.batch_size,
        limit_bytes=wishes.target[1] * total,
        allowed=allowed,
        predicted_bytes=predictor.unlimited,
        max_attempts=wishes.max_attempts,
    )
    if proof.failure is not None:
        raise RehearsalError(
            f"the training step did not come through at batch size {proof.failure.batch_size} "
            f"({proof.failure.outcome}): {proof.failure.detail}"
        )
    if not proof.batch_size:
        tried = ", ".join(str(trial.batch_size) for trial in proof.trials)
        raise NothingFitsError(
            f"no size that was run stays under {wishes.target[1]:.0%} of {predictor.device.name}: {tried}"
        )
    return proof


def _proved(decision: Decision, proof: Proof, wishes: Wishes, device: GpuSpec) -> Decision:
    """The decision that the proof leaves standing, its reason told anew where another size was predicted."""
    if proof.batch_size == decision.batch_size:
        return decision
    trial = next(trial for trial in proof.trials if trial.batch_size == proof.batch_size)
    share = (trial.used_bytes or 0) / (device.total_bytes or 1)
    why = "largest that ran" if proof.is_settled else f"largest that ran in {len(proof.trials)} attempts"
    return dataclasses.replace(
        decision,
        batch_size=proof.batch_size,
        safe=min(decision.safe, proof.batch_size),
        reason=f"{proof.batch_size}: {why} under {wishes.target[1]:.0%} ({share:.0%}); the prediction was "
        f"{decision.batch_size}",
    )


def _decide(predictor: Predictor, wishes: Wishes) -> Decision:
    device = predictor.device
    assert device.total_bytes is not None
    try:
        return decide(
            predictor,
            total_bytes=device.total_bytes,
            target=wishes.target,
            multiple_of=wishes.multiple_of,
            limit=wishes.batch_size,
            guess=predictor.guess,
        )
    except NothingFitsError as error:
        needed = predictor.unlimited(1)
        raise NothingFitsError(
            f"not even one sequence of {predictor.workload.length} tokens stays under {wishes.target[1]:.0%} of "
            f"{device.name}: it needs {needed / GIB:.1f} GiB of {device.total_bytes / GIB:.1f} GiB; ways out: a "
            f"shorter max_length, activation checkpointing, LoRA (with 4-bit weights), a larger GPU"
        ) from error


def _plan(largest: int, workload: Workload | ModuleWorkload, wishes: Wishes) -> BatchPlan:
    effective = wishes.effective_batch
    if effective is None and wishes.total_tokens is None and wishes.accumulation > 1:
        effective = largest * wishes.accumulation * wishes.processes
    return plan(
        largest,
        length=workload.length,
        effective_batch=effective,
        total_tokens=wishes.total_tokens,
        processes=wishes.processes,
        multiple_of=wishes.multiple_of,
        learning_rate=wishes.learning_rate,
        base_batch_size=wishes.base_batch_size,
        lr_scaling=wishes.lr_scaling,
    )


def _table(predictor: Predictor, decision: Decision) -> tuple[Trial, ...]:
    """Doubling sizes up to the first that does not fit, the chosen one, the largest and the one after it."""
    first_misfit = decision.largest + 1
    doubling = [1 << power for power in range(first_misfit.bit_length()) if 1 << power <= first_misfit]
    sizes = {*doubling, decision.batch_size, decision.safe, decision.largest, first_misfit}
    return tuple(predictor(size) for size in sorted(sizes))


def _composition(predictor: Predictor, batch_size: int) -> dict[str, int]:
    """Bytes by what they are for; their sum is the Trial's used_bytes."""
    parts = predictor.timeline.composition(batch_size, predictor.device)
    trial = predictor(batch_size)
    reserved = trial.peak.reserved_bytes if trial.peak else 0
    return {**parts, "allocator cache": reserved - sum(parts.values()), "CUDA context": predictor.device.context_bytes}


def _evaluation(workload: Workload | ModuleWorkload, device: GpuSpec, wishes: Wishes) -> EvaluationAnswer | None:
    predictor = Predictor(workload.accumulating(1), device, evaluation=True)
    _, size = largest_under(
        predictor,
        wishes.target[1],
        total_bytes=device.total_bytes or 0,
        multiple_of=wishes.multiple_of,
        guess=predictor.guess,
    )
    checked = None if wishes.check_evaluation is None else predictor(wishes.check_evaluation)
    return EvaluationAnswer(size, predictor(size), checked) if size else None
