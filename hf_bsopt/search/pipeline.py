"""The road, in one screen: a workload and a device in, a Report out."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

from ..errors import NothingFitsError, SearchInterrupted, UsageError
from ..memory.memory_profile import memory_profile
from ..memory.predictor import Predictor
from ..probing import ProbeClient
from ..records import Decision, GpuSpec, Trial
from ..report.report import PhaseAnswer, Report
from ..workloads.workload import Phase, Trainable
from .batch_plan import BatchPlan, plan
from .choose import check_target, decide, round_down, shown_share
from .phases import predicted_phase, proved_phase
from .verifier import Remembering, Verifier, nothing_fits
from .verify import Verification
from .wishes import USUAL, Wishes

GIB = 2**30


_NAMES = {
    "max_attempts": "max_attempts",
    "accumulation": "gradient_accumulation_steps",
    "processes": "num_processes",
    "check": "check",
    "check_evaluation": "per_device_eval_batch_size",
    "dataset_size": "dataset_size",
}


def find(
    workload: Trainable,
    device: GpuSpec,
    wishes: Wishes = USUAL,
    client: ProbeClient | None = None,
    remembering: Remembering | None = None,
) -> Report:
    """The answer, predicted; with a ``client`` then proved by real steps on its device.

    Raises NothingFitsError, with the memory that one sequence would need, where nothing fits, ProbeError where a probe
    ends in anything but an answer, SearchInterrupted at Ctrl-C while sizes are run.
    """
    _check(device, wishes)
    if wishes.processes > 1 and wishes.is_ddp:
        workload = workload.replicated()
    _plan(1, workload, wishes)  # whatever is wrong with the wishes is said before the tracing
    if client is not None:
        client.start()
    predictor, decision = _predicted(workload, device, wishes)
    proved: tuple[Trial, ...] = ()
    checked = None if wishes.check is None else predictor(wishes.check)
    others: dict[Phase, PhaseAnswer] = {}
    if wishes.evaluation:
        others["evaluation"] = predicted_phase("evaluation", workload, device, wishes)
    if workload.new_tokens:
        others["generation"] = predicted_phase("generation", workload, device, wishes)
    if client is not None:
        share, smallest = wishes.target[1], predictor.smallest_batch
        verifier = Verifier(client, predictor.workload, share, wishes.max_attempts, remembering, smallest)
        with _told_when_interrupted(verifier, decision.batch_size):
            decision = _proved(verifier, predictor, decision, workload, wishes)
            if wishes.check is not None:
                checked = verifier.run(wishes.check)
            proved = tuple(trial for (phase, _), trial in verifier.trials.items() if phase == "training")
            for phase, answer in others.items():
                if answer.batch_size and (phase == "generation" or wishes.prove_evaluation):
                    others[phase] = proved_phase(phase, answer, verifier, workload, device, wishes)
    return Report(
        workload=workload,
        device=device,
        target=wishes.target,
        trials=(*_table(predictor, decision, proved), *proved),
        decision=decision,
        plan=_plan_of(decision, workload, wishes),
        composition=_composition(predictor, decision.batch_size),
        peak_origin=predictor.timeline.peak_origin(decision.batch_size, device),
        parameters=predictor.parameters,
        memory_profile=memory_profile(predictor.timeline, decision.batch_size, device),
        checked=checked,
        evaluation=others.get("evaluation"),
        generation=others.get("generation"),
        notes=wishes.notes,
        has_batch_norm=predictor.has_batch_norm,
        asked_learning_rate=wishes.learning_rate is not None,
        asked_effective_batch=bool(wishes.effective_batch or wishes.total_tokens),
        wishes=wishes,
    )


def foretold(
    workload: Trainable, device: GpuSpec, wishes: Wishes, traced: Predictor | None = None
) -> tuple[Predictor, Decision, BatchPlan]:
    """The prediction alone. ``traced``: of this workload, on this device or another, so that it is not traced again.
    Raises NothingFitsError.
    """
    predictor, decision = _predicted(workload, device, wishes, traced)
    return predictor, decision, _plan_of(decision, workload, wishes)


def _predicted(
    workload: Trainable, device: GpuSpec, wishes: Wishes, traced: Predictor | None = None
) -> tuple[Predictor, Decision]:
    """The prediction, and the size that it chooses: one that the effective batch can be made of."""

    def predict(accumulation: int) -> tuple[Predictor, Decision]:
        if traced is not None and traced.workload.accumulation == accumulation:
            predictor = traced.on(device)
        else:
            predictor = Predictor(
                workload.accumulating(accumulation), device, expandable_segments=wishes.expandable_segments
            )
        try:
            return predictor, _decide(predictor, wishes)
        except NothingFitsError as error:
            error.asked = workload, device, wishes
            raise

    predictor, decision = predict(wishes.accumulation)
    batch_plan = _plan(decision.batch_size, workload, wishes)
    if batch_plan.accumulation > 1 and wishes.accumulation == 1:
        # gradients are now in memory during the forward pass, so that a little less fits
        predictor, decision = predict(2)
        batch_plan = _plan(decision.batch_size, workload, wishes)
    if batch_plan.micro_batch != decision.batch_size:
        decision = dataclasses.replace(
            decision,
            batch_size=batch_plan.micro_batch,
            safe=min(decision.safe, batch_plan.micro_batch),
            room=decision.batch_size,
            bound="divisor of the effective batch",
            reason=f"{batch_plan.micro_batch}: {_divisor_reason(batch_plan, decision.batch_size)}",
        )
    return predictor, decision


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


@contextlib.contextmanager
def _told_when_interrupted(verifier: Verifier, predicted: int) -> Iterator[None]:
    """Ctrl-C has what was run so far."""
    try:
        yield
    except KeyboardInterrupt as error:
        raise SearchInterrupted(tuple(verifier.trials.values()), predicted) from error


def _proved(
    verifier: Verifier,
    predictor: Predictor,
    predicted: Decision,
    workload: Trainable,
    wishes: Wishes,
) -> Decision:
    """The decision that real steps leave standing."""
    limit, _ = wishes.limit

    def allowed(size: int) -> int:
        size = round_down(min(size, limit or size), wishes.multiple_of)
        return _plan(size, workload, wishes).micro_batch if size else 0

    proof = verifier.verify(predicted.batch_size, allowed, predictor)
    if not proof.batch_size:
        raise nothing_fits(proof, verifier.share, predictor.device.name)
    decision = _after(predicted, proof, verifier.share, predictor)
    if not wishes.throughput:
        return decision
    fastest = verifier.measure_throughput(proof.batch_size, allowed)
    if fastest is None or fastest.batch_size == decision.batch_size:
        return decision
    return dataclasses.replace(
        decision,
        batch_size=fastest.batch_size,
        safe=min(decision.safe, fastest.batch_size),
        bound="throughput plateau",
        reason=f"{fastest.batch_size}: smallest size within 2 % of the best throughput "
        f"({fastest.samples_per_second:.1f} samples/s); {decision.batch_size} fits and trains no faster",
    )


def _after(decision: Decision, proof: Verification, share: float, predictor: Predictor) -> Decision:
    """The decision that the proof leaves standing, its reason with what was really used."""

    def used_by(trial: Trial) -> str:
        return shown_share((trial.used_bytes or 0) / (predictor.device.total_bytes or 1))

    used = used_by(next(trial for trial in proof.trials if trial.batch_size == proof.batch_size))
    if proof.batch_size == decision.batch_size:
        foretold = used_by(predictor(decision.batch_size))
        return dataclasses.replace(decision, reason=decision.reason.replace(foretold, used))
    why = "largest that ran" if proof.is_settled else f"largest that ran in {len(proof.trials)} attempts"
    return dataclasses.replace(
        decision,
        batch_size=proof.batch_size,
        safe=min(decision.safe, proof.batch_size),
        reason=f"{proof.batch_size}: {why} under {share * 100:.0f} % {used}; the prediction was {decision.batch_size}",
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
            limit=wishes.limit[0],
            limit_bound=wishes.limit[1],
            limit_told=wishes.limit_told,
            guess=predictor.guess,
        )
    except NothingFitsError:
        needed = predictor.unlimited(1)
        raise NothingFitsError(
            f"not even one sequence of {predictor.workload.length} tokens stays under {wishes.target[1]:.0%} of "
            f"{device.name}: it needs {needed / GIB:.2f} GiB of {device.total_bytes / GIB:.2f} GiB; "
            + _ways_out(device, wishes)
        ) from None


def _ways_out(device: GpuSpec, wishes: Wishes) -> str:
    """In short."""
    if device.kind == "cuda":
        return "ways out: a shorter max_length, activation checkpointing, LoRA (with 4-bit weights), a larger GPU"
    if device.context_bytes > wishes.target[1] * (device.total_bytes or 0):
        return f"{device.context_bytes / GIB:.2f} GiB are taken before there is a model: it takes more memory"
    return "ways out: a shorter max_length, activation checkpointing, more memory"


def _plan(largest: int, workload: Trainable, wishes: Wishes) -> BatchPlan:
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


def _plan_of(decision: Decision, workload: Trainable, wishes: Wishes) -> BatchPlan:
    """With what is to be said of an effective batch that leaves room unused."""
    if decision.room is not None:
        planned = _plan(decision.room, workload, wishes)
        if planned.micro_batch == decision.batch_size:
            return planned
    return _plan(decision.batch_size, workload, wishes)


def _divisor_reason(planned: BatchPlan, room: int) -> str:
    whole = f"the effective batch of {planned.effective_batch}"
    share = whole if planned.processes == 1 else f"a process's {planned.micro_batch * planned.accumulation} of {whole}"
    if planned.accumulation == 1:
        return f"all of {share}; {room} would fit"
    return f"largest divisor of {share} at or under {room}, which would fit"


def _table(predictor: Predictor, decision: Decision, proved: tuple[Trial, ...]) -> tuple[Trial, ...]:
    """Doubling sizes up to the first that does not fit, the chosen one, the largest and the one after it, and what was
    run.
    """
    first_misfit = decision.largest + 1
    doubling = [1 << power for power in range(first_misfit.bit_length()) if 1 << power <= first_misfit]
    sizes = {*doubling, decision.batch_size, decision.safe, decision.largest, first_misfit}
    sizes |= {trial.batch_size for trial in proved}
    return tuple(predictor(size) for size in sorted(sizes))


def _composition(predictor: Predictor, batch_size: int) -> dict[str, int]:
    """Bytes by what they are for; their sum is the Trial's used_bytes."""
    parts = predictor.timeline.composition(batch_size, predictor.device)
    trial = predictor(batch_size)
    reserved = trial.peak.reserved_bytes if trial.peak else 0
    outside = "CUDA context" if predictor.device.kind == "cuda" else "libraries"
    return {**parts, "allocator cache": reserved - sum(parts.values()), outside: predictor.device.context_bytes}
