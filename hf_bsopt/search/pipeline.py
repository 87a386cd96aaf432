"""From a workload and a device to the batch size: the one way from a question to an answer.

    answer = run(describe, DeviceOptions(gpu="T4"), SearchOptions(effective_batch_size=64))

``describe`` makes the workload, once the device is known. Everything that finds a batch size calls :func:`run`, or
:func:`predict` if a prediction is all that is wanted (tables, advice).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..errors import DeviceError, NothingFitsError, ProbeError, RehearsalError, SearchInterrupted, UsageError
from ..memory.memory_profile import memory_profile
from ..memory.predictor import Predictor
from ..options import MAX_BATCH_SIZE, DeviceOptions, SearchOptions
from ..parallel.ranks import agreed, first_device_is
from ..probing import ProbeClient
from ..records import Bound, Decision, GpuSpec, Trial
from ..workloads.trainable import Phase, Trainable
from . import phases
from .answer import Answer, PhaseAnswer, Question
from .batch_plan import BatchPlan, plan
from .cached_answers import CachedAnswers, cached_answers
from .choose import decide, round_down
from .device_choice import DeviceChoice, check_precision, choose_device, differences
from .verifier import Verifier, nothing_fits
from .verify import Verification

if TYPE_CHECKING:
    import torch

GIB = 2**30
Describe = Callable[[GpuSpec], Trainable]
"""Makes the workload for a device, of which it may choose the precision."""


@dataclass(frozen=True)
class Prediction:
    """The size that the prediction chooses, how the effective batch is made of it, and what answers for other sizes."""

    predictor: Predictor
    decision: Decision
    plan: BatchPlan


def run(describe: Describe, device: DeviceOptions, search: SearchOptions) -> Answer:
    """Predict the batch size and, if steps can be run on the device, verify it.

    Raises UsageError for constraints that contradict each other, NothingFitsError with the memory that one sequence
    needs, TraceError if a step cannot be followed, DeviceError or RehearsalError for a device that was asked for and
    cannot be used, ProbeError if a step fails otherwise than by memory, SearchInterrupted at Ctrl-C.
    """
    choice = choose_device(device)
    if search.throughput and choice.device is None:
        raise UsageError(f"throughput is measured on a device that computes: --device cuda or cpu; {choice.note}")
    with _started_client(choice, device) as client:  # its imports take as long as describing the workload
        workload = describe(choice.spec)
        check_precision(workload, choice.spec)
        if client is None:
            return _answer(workload, choice, device, search, choice.all_notes)
        try:
            return _verified_answer(workload, choice, device, search, client)
        except (ProbeError, DeviceError) as error:
            failed_on_a_real_device = isinstance(error, ProbeError) and client.device.source == "measured"
            if choice.is_demanded or failed_on_a_real_device:
                raise
            note = f"predicted only, nothing could be run: {error}"
        return _answer(workload, choice, device, search, (*choice.notes, note))


def run_on_every_rank(
    describe: Describe, device: DeviceOptions, search: SearchOptions, local_device: torch.device | None = None
) -> Answer:
    """As :func:`run`, called by every rank of a distributed run: all end with the size that the smallest can take.

    ``local_device``: the device of this rank, which its probes then see as their first one. In a process that is alone
    it is what :func:`run` does. Raises AgreementError if another rank failed.
    """

    def run_here(limit: int | None) -> Answer:
        with first_device_is(local_device):
            return run(describe, device, replace(search, batch_size=limit))

    return agreed(run_here, search.batch_size, device.probe_timeout)


def predict(
    workload: Trainable,
    device: GpuSpec,
    search: SearchOptions,
    *,
    expandable_segments: bool = False,
    traced: Predictor | None = None,
) -> Prediction:
    """Choose the size by prediction alone: one that the effective batch can be made of.

    ``traced``: a predictor of this workload, on this device or another, so that it is not traced again. Raises
    NothingFitsError.
    """

    def predicted_with(accumulation: int) -> tuple[Predictor, Decision]:
        if traced is not None and traced.workload.accumulation == accumulation:
            predictor = traced.on(device)
        else:
            accumulating = workload.accumulating(accumulation)
            predictor = Predictor(accumulating, device, expandable_segments=expandable_segments)
        try:
            return predictor, _decide(predictor, search)
        except NothingFitsError as error:
            error.question = Question(workload, device, search, expandable_segments)
            raise

    predictor, decision = predicted_with(search.gradient_accumulation_steps)
    batch_plan = plan_for(decision.batch_size, workload.length, search)
    if batch_plan.accumulation > 1 and search.gradient_accumulation_steps == 1:
        # gradients are now in memory during the forward pass, so that a little less fits
        predictor, decision = predicted_with(2)
        batch_plan = plan_for(decision.batch_size, workload.length, search)
    if batch_plan.micro_batch != decision.batch_size:
        decision = replace(
            decision,
            batch_size=batch_plan.micro_batch,
            bound="divisor of the effective batch",
            utilization=_utilization(predictor(batch_plan.micro_batch), device),
            safe=min(decision.safe, batch_plan.micro_batch),
            limit=None,
            unconstrained=decision.batch_size,
        )
    return Prediction(predictor, decision, _plan_of(decision, workload, search))


def plan_for(largest: int, length: int, search: SearchOptions) -> BatchPlan:
    """Return how the effective batch is made of micro-batches of at most ``largest`` sequences."""
    effective = search.effective_batch_size
    if effective is None and search.total_tokens is None and search.gradient_accumulation_steps > 1:
        effective = largest * search.gradient_accumulation_steps * search.num_processes
    return plan(
        largest,
        length=length,
        effective_batch=effective,
        total_tokens=search.total_tokens,
        processes=search.num_processes,
        multiple_of=search.multiple_of,
        learning_rate=search.learning_rate,
        base_batch_size=search.base_batch_size,
        lr_scaling=search.lr_scaling,
    )


def upper_limit(search: SearchOptions) -> tuple[int | None, Bound]:
    """Return the largest micro-batch that is wanted at all, and why: a process's share of the dataset, or a limit."""
    share = None if search.dataset_size is None else max(1, search.dataset_size // search.num_processes)
    if share is not None and share < (search.batch_size or MAX_BATCH_SIZE):
        return share, "dataset size"
    return search.batch_size, "limit"


@contextlib.contextmanager
def _started_client(choice: DeviceChoice, device: DeviceOptions) -> Iterator[ProbeClient | None]:
    """Start the process that runs steps; None if nothing is run."""
    if choice.device is None:
        yield None
        return
    with ProbeClient(
        choice.device, timeout_seconds=device.probe_timeout, expandable_segments=device.expandable_segments
    ) as client:
        with contextlib.suppress(RehearsalError):  # raised again at the first question
            client.start()
        yield client


def _verified_answer(
    workload: Trainable, choice: DeviceChoice, device: DeviceOptions, search: SearchOptions, client: ProbeClient
) -> Answer:
    if client.device.source == "rehearsed":
        notes = (*choice.all_notes, *differences(workload, choice.spec))
        return _answer(workload, choice, device, search, notes, client)
    found = client.preflight(workload)
    cached = cached_answers(workload, found, device, search)
    notes = (*choice.all_notes, found.line)
    return _answer(workload, replace(choice, spec=found.spec), device, search, notes, client, cached)


def _answer(
    workload: Trainable,
    choice: DeviceChoice,
    options: DeviceOptions,
    search: SearchOptions,
    notes: tuple[str, ...],
    client: ProbeClient | None = None,
    cached: CachedAnswers | None = None,
) -> Answer:
    device = choice.spec
    if device.total_bytes is None:
        raise UsageError("a batch size needs a device with a limit of memory")
    if search.num_processes > 1:
        workload = workload.replicated()
    plan_for(1, workload.length, search)  # contradictions are reported before the trace
    if client is not None:
        client.start()
    predicted = predict(workload, device, search, expandable_segments=options.expandable_segments)
    answer = replace(
        _predicted_answer(predicted, workload, search, notes), expandable_segments=options.expandable_segments
    )
    if client is None:
        return answer
    verifier = Verifier(
        client,
        predicted.predictor.workload,
        search.target[1],
        search.max_attempts,
        cached,
        predicted.predictor.smallest_batch,
    )
    with _reported_when_interrupted(verifier, predicted.decision.batch_size):
        return _verify(answer, predicted, verifier, workload)


def _predicted_answer(
    predicted: Prediction, workload: Trainable, search: SearchOptions, notes: tuple[str, ...]
) -> Answer:
    predictor, decision = predicted.predictor, predicted.decision
    device = predictor.device
    evaluation = generation = None
    if search.evaluation or search.verify_evaluation:
        evaluation = phases.predict_phase("evaluation", workload, device, search)
    if workload.new_tokens:
        generation = phases.predict_phase("generation", workload, device, search)
    return Answer(
        workload=workload,
        device=device,
        search=search,
        trials=_table(predictor, decision, ()),
        decision=decision,
        plan=predicted.plan,
        composition=_composition(predictor, decision.batch_size),
        peak_origin=predictor.timeline.peak_origin(decision.batch_size, device),
        parameters=predictor.parameters,
        checked=None if search.check is None else predictor(search.check),
        evaluation=evaluation,
        generation=generation,
        notes=notes,
        has_batch_norm=predictor.has_batch_norm,
        memory_profile=memory_profile(predictor.timeline, decision.batch_size, device),
    )


def _verify(answer: Answer, predicted: Prediction, verifier: Verifier, workload: Trainable) -> Answer:
    """Return the answer that is left standing by real steps."""
    search, predictor = answer.search, predicted.predictor
    limit, _ = upper_limit(search)

    def allowed(size: int) -> int:
        size = round_down(min(size, limit or MAX_BATCH_SIZE), search.multiple_of)
        return plan_for(size, workload.length, search).micro_batch if size else 0

    verification = verifier.verify(predicted.decision.batch_size, allowed, predictor)
    if not verification.batch_size:
        raise nothing_fits(verification, verifier.fraction, predictor.device.name)
    decision = _decision_after(predicted.decision, verification, predictor.device)
    if search.throughput:
        decision = _fastest(decision, verifier, allowed)
    checked = answer.checked if search.check is None else verifier.run(search.check)
    ran = tuple(trial for (phase, _), trial in verifier.trials.items() if phase == "training")
    others: dict[Phase, PhaseAnswer | None] = {"evaluation": answer.evaluation, "generation": answer.generation}
    for phase, phase_answer in others.items():
        is_verified = phase == "generation" or search.verify_evaluation
        if phase_answer is not None and phase_answer.batch_size and is_verified:
            others[phase] = phases.verify_phase(phase, phase_answer, verifier, workload, search)
    return replace(
        answer,
        trials=(*_table(predictor, decision, ran), *ran),
        decision=decision,
        plan=_plan_of(decision, workload, search),
        composition=_composition(predictor, decision.batch_size),
        peak_origin=predictor.timeline.peak_origin(decision.batch_size, predictor.device),
        memory_profile=memory_profile(predictor.timeline, decision.batch_size, predictor.device),
        checked=checked,
        evaluation=others["evaluation"],
        generation=others["generation"],
        prediction_error=verification.memory_factor if verification.refuted else None,
    )


def _decision_after(decision: Decision, verification: Verification, device: GpuSpec) -> Decision:
    """Return the decision with what was really used, at the size that was verified."""
    size = verification.batch_size
    trial = next(trial for trial in verification.trials if trial.batch_size == size)
    verified = replace(
        decision,
        utilization=_utilization(trial, device),
        attempts=len(verification.trials),
        is_settled=verification.is_settled,
    )
    if size == decision.batch_size:
        return verified
    is_at_limit = decision.limit is not None and size >= decision.batch_size
    return replace(
        verified,
        batch_size=size,
        bound=decision.bound if is_at_limit else "memory",
        limit=decision.limit if is_at_limit else None,
        safe=min(decision.safe, size),
        predicted=decision.batch_size,
    )


def _fastest(decision: Decision, verifier: Verifier, allowed: Callable[[int], int]) -> Decision:
    """Return the decision for the smallest size that trains about as fast as any."""
    fastest = verifier.measure_throughput(decision.batch_size, allowed)
    if fastest is None or fastest.batch_size == decision.batch_size:
        return decision
    return replace(
        decision,
        batch_size=fastest.batch_size,
        bound="throughput plateau",
        utilization=(fastest.used_bytes or 0) / (verifier.client.device.spec.total_bytes or 1),
        safe=min(decision.safe, fastest.batch_size),
        limit=None,
        samples_per_second=fastest.samples_per_second,
        slower_size=decision.batch_size,
    )


@contextlib.contextmanager
def _reported_when_interrupted(verifier: Verifier, predicted: int) -> Iterator[None]:
    """Turn Ctrl-C into SearchInterrupted, which has what was run so far."""
    try:
        yield
    except KeyboardInterrupt as error:
        raise SearchInterrupted(tuple(verifier.trials.values()), predicted) from error


def _decide(predictor: Predictor, search: SearchOptions) -> Decision:
    device = predictor.device
    total = device.total_bytes
    if total is None:
        raise UsageError("a batch size needs a device with a limit of memory")
    limit, bound = upper_limit(search)
    try:
        return decide(
            predictor,
            total_bytes=total,
            target=search.target,
            multiple_of=search.multiple_of,
            limit=limit,
            limit_bound=bound,
            guess=predictor.guess,
        )
    except NothingFitsError:
        needed = predictor.unlimited(1)
        raise NothingFitsError(
            f"not even one sequence of {predictor.workload.length} tokens stays under {search.target[1]:.0%} of "
            f"{device.name}: it needs {needed / GIB:.2f} GiB of {total / GIB:.2f} GiB; {_hint(device, search)}"
        ) from None


def _hint(device: GpuSpec, search: SearchOptions) -> str:
    """Return in a few words what would make it fit."""
    if device.kind == "cuda":
        return "a shorter max_length, activation checkpointing, LoRA (with 4-bit weights) or a larger GPU would help"
    if device.context_bytes > search.target[1] * (device.total_bytes or 0):
        return f"{device.context_bytes / GIB:.2f} GiB are in use before there is a model: it needs more memory"
    return "a shorter max_length, activation checkpointing or more memory would help"


def _plan_of(decision: Decision, workload: Trainable, search: SearchOptions) -> BatchPlan:
    """Return the plan with its advice about an effective batch that leaves memory unused."""
    if decision.unconstrained is not None:
        planned = plan_for(decision.unconstrained, workload.length, search)
        if planned.micro_batch == decision.batch_size:
            return planned
    return plan_for(decision.batch_size, workload.length, search)


def _utilization(trial: Trial, device: GpuSpec) -> float:
    return (trial.used_bytes or 0) / (device.total_bytes or 1)


def _table(predictor: Predictor, decision: Decision, ran: tuple[Trial, ...]) -> tuple[Trial, ...]:
    """Predict the sizes of the table: doubling ones up to the first that does not fit, the chosen, the safe and the
    largest one, the one after it, and those that were run.
    """
    first_misfit = decision.largest + 1
    most = min(first_misfit, 2 * MAX_BATCH_SIZE)
    doubling = [1 << power for power in range(most.bit_length()) if 1 << power <= most]
    sizes = {*doubling, decision.batch_size, decision.safe, decision.largest, first_misfit}
    sizes |= {trial.batch_size for trial in ran}
    return tuple(predictor(size) for size in sorted(sizes))


def _composition(predictor: Predictor, batch_size: int) -> dict[str, int]:
    """Return bytes by what they are for; their sum is the Trial's used_bytes."""
    parts = predictor.timeline.composition(batch_size, predictor.device)
    trial = predictor(batch_size)
    reserved = trial.peak.reserved_bytes if trial.peak else 0
    outside = "CUDA context" if predictor.device.kind == "cuda" else "libraries"
    return {**parts, "allocator cache": reserved - sum(parts.values()), outside: predictor.device.context_bytes}
