"""Find the batch size of a workload on a device: the one pipeline from options to an answer.

    answer = run(describe, DeviceOptions(gpu="T4"), SearchOptions(effective_batch_size=64))

``describe`` makes the workload, once the device is known. Everything that finds a batch size calls one of three:
:func:`run`, :func:`~.prediction.predict` if a prediction is all that is wanted (tables, advice), or
:func:`run_without_prediction` if a step can be run and not described (a script that is rehearsed).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..errors import DeviceError, ProbeError, RehearsalError, SearchInterrupted, UsageError
from ..memory.memory_profile import memory_profile
from ..options import MAX_BATCH_SIZE, DeviceOptions, SearchOptions
from ..parallel.agreement import failures_reported
from ..parallel.ranks import agreed, check_same, first_device_is
from ..probing import ProbeClient
from ..records import Bound, Decision, GpuSpec, Trial
from ..workloads.trainable import Phase, Trainable
from . import phases
from .answer import Answer, PhaseAnswer
from .batch_plan import BatchPlan
from .cached_answers import CachedAnswers, cached_answers
from .choose import Probe, round_down
from .device_choice import DeviceChoice, check_precision, choose_device, differences
from .limits import Limits
from .predicted_answer import composition, predicted_answer, table_trials
from .prediction import PredictedSize, plan_for, plan_with_advice, predict, upper_limit, utilization
from .verifier import Verifier, nothing_fits
from .verify import Verification, verify

if TYPE_CHECKING:
    import torch

EFFECTIVE_BATCH_OPTIONS = (
    "effective_batch_size",
    "total_tokens",
    "gradient_accumulation_steps",
    "num_processes",
    "learning_rate",
    "base_batch_size",
    "lr_scaling",
)
"""Options that decide the effective batch and its learning rate: the same on all ranks."""

Describe = Callable[[GpuSpec], Trainable]
"""Makes the workload for a device; its precision may depend on the device."""


def run(describe: Describe, device: DeviceOptions, search: SearchOptions) -> Answer:
    """Predict the batch size and, if steps can be run on the device, verify it.

    Raises UsageError for constraints that contradict each other, NothingFitsError with the memory that one sequence
    needs, TraceError if a step cannot be followed, DeviceError or RehearsalError for a device that was asked for and
    cannot be used, ProbeError if a step fails for another reason than memory, SearchInterrupted at Ctrl-C.
    """
    choice = choose_device(device)
    if search.throughput and choice.device is None:
        raise UsageError(f"throughput is measured on a real device: --device cuda or cpu; {choice.note}")
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


@dataclass(frozen=True)
class UnpredictedAnswer:
    """The answer of :func:`run_without_prediction`.

    largest: the largest size that was run and fits. bound: what kept it from being larger. is_settled: False if that
    is the number of attempts. recommended: the trial of the micro-batch of ``plan``.
    """

    largest: int
    bound: Bound
    is_settled: bool
    recommended: Trial
    plan: BatchPlan


def run_without_prediction(
    probe: Probe, first: int, total_bytes: int, search: SearchOptions
) -> UnpredictedAnswer | None:
    """Find the batch size of training that can be run and is not known: ``probe(size)`` runs a step of that size.

    ``first`` is run first. At most ``search.max_attempts`` sizes are run: one attempt is kept for the micro-batch that
    divides the effective batch, unless there is only one. ``total_bytes``: the device's memory. Returns None if no
    size that was run stays within the target. What ``probe`` raises propagates.
    """
    limit, bound = upper_limit(search)
    if limit is None:
        limit, bound = MAX_BATCH_SIZE, "default maximum"
    trials: dict[int, Trial] = {}

    def probe_once(size: int) -> Trial:
        if size not in trials:
            trials[size] = probe(size)
        return trials[size]

    def allowed(size: int) -> int:
        rounded = round_down(min(size, limit), search.multiple_of)
        return max(rounded, first if size >= first else 0)  # the size that the user has is always allowed

    limits = Limits(search.target[1] * total_bytes, total_bytes, allowed=allowed)
    found = verify(probe_once, first, limits=limits, max_attempts=max(1, search.max_attempts - 1))
    if not found.batch_size:
        return None
    plan = plan_for(found.batch_size, 1, search)
    return UnpredictedAnswer(
        largest=found.batch_size,
        bound=bound if found.batch_size >= allowed(limit) else "memory",
        is_settled=found.is_settled,
        recommended=probe_once(plan.micro_batch),
        plan=plan,
    )


def run_on_every_rank(
    describe: Describe, device: DeviceOptions, search: SearchOptions, local_device: torch.device | None = None
) -> Answer:
    """Call :func:`run` on every rank of a distributed run: all get the size that fits the smallest GPU.

    ``local_device``: the device of this rank, which its probes then see as their first one. In a single
    process it is :func:`run`. Raises AgreementError if another rank failed, or if the ranks would train with different
    effective batches.
    """

    def run_here(limit: int | None) -> Answer:
        with first_device_is(local_device):
            return run(describe, device, replace(search, batch_size=limit))

    with failures_reported():
        asked = {name: getattr(search, name) for name in EFFECTIVE_BATCH_OPTIONS}
        check_same(asked, device.probe_timeout)
        answer = agreed(run_here, search.batch_size, device.probe_timeout)
        plan = answer.plan
        check_same(
            {"the micro-batch": plan.micro_batch, "the accumulation": plan.accumulation},
            device.probe_timeout,
        )
    return answer


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
        raise UsageError("a batch size needs a device with a memory limit")
    if search.num_processes > 1:
        workload = workload.replicated()
    plan_for(1, workload.length, search)  # contradictions are reported before the trace
    if client is not None:
        client.start()
    predicted = predict(workload, device, search, expandable_segments=options.expandable_segments)
    answer = predicted_answer(predicted, workload, search, notes, expandable_segments=options.expandable_segments)
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


def _verify(answer: Answer, predicted: PredictedSize, verifier: Verifier, workload: Trainable) -> Answer:
    """Return the answer after sizes were run: the largest that fits, with what was measured."""
    search, predictor = answer.search, predicted.predictor
    limit, _ = upper_limit(search)

    def allowed(size: int) -> int:
        size = round_down(min(size, limit or MAX_BATCH_SIZE), search.multiple_of)
        return plan_for(size, workload.length, search).micro_batch if size else 0

    verification = verifier.verify(predicted.decision.batch_size, allowed, predictor)
    if not verification.batch_size:
        raise nothing_fits(verification, verifier, search.check)
    decision = _decision_after(predicted.decision, verification, predictor.device)
    if search.throughput:
        decision = _fastest(decision, verifier, allowed)
    checked = answer.checked if search.check is None else verifier.run(search.check)
    ran = tuple(trial for (phase, _), trial in verifier.trials.items() if phase == "training")
    others: dict[Phase, PhaseAnswer | None] = {"evaluation": answer.evaluation, "generation": answer.generation}
    for phase, phase_answer in others.items():
        is_verified = phase == "generation" or search.verify_evaluation
        if phase_answer is not None and phase_answer.batch_size and is_verified:
            others[phase] = phases.verify_phase(
                phase, phase_answer, verifier, workload, search, expandable_segments=answer.expandable_segments
            )
    return replace(
        answer,
        trials=(*table_trials(predictor, decision, ran), *ran),
        decision=decision,
        plan=plan_with_advice(decision, workload, search),
        composition=composition(predictor, decision.batch_size),
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
        utilization=utilization(trial, device),
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
