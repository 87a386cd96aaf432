"""Choose a batch size by prediction alone, and how the effective batch is made of it.

    predict(workload, catalog.gpu("T4"), SearchOptions(effective_batch_size=64)).plan

A prediction traces one training step on meta tensors and replays the CUDA allocator: nothing is run.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..errors import NothingFitsError, UsageError
from ..memory.predictor import Predictor
from ..options import MAX_BATCH_SIZE, SearchOptions
from ..records import Bound, Decision, GpuSpec, Trial
from ..workloads.trainable import Trainable
from ..workloads.workload import Workload
from .answer import Question
from .batch_plan import BatchPlan, plan
from .choose import decide, largest_that

GIB = 2**30


@dataclass(frozen=True)
class PredictedSize:
    """The size that the prediction chooses.

    predictor: predicts the memory of any other size. plan: how the effective batch is made of the size.
    """

    predictor: Predictor
    decision: Decision
    plan: BatchPlan


def predict(
    workload: Trainable,
    device: GpuSpec,
    search: SearchOptions,
    *,
    expandable_segments: bool = False,
    traced: Predictor | None = None,
) -> PredictedSize:
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
            utilization=utilization(predictor(batch_plan.micro_batch), device),
            safe=min(decision.safe, batch_plan.micro_batch),
            limit=None,
            unconstrained=decision.batch_size,
        )
    return PredictedSize(predictor, decision, plan_with_advice(decision, workload, search))


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


def plan_with_advice(decision: Decision, workload: Trainable, search: SearchOptions) -> BatchPlan:
    """Return the plan with its advice about an effective batch that leaves memory unused."""
    if decision.unconstrained is not None:
        planned = plan_for(decision.unconstrained, workload.length, search)
        if planned.micro_batch == decision.batch_size:
            return planned
    return plan_for(decision.batch_size, workload.length, search)


def utilization(trial: Trial, device: GpuSpec) -> float:
    """Return the fraction of the device's memory in use, by all processes."""
    return (trial.used_bytes or 0) / (device.total_bytes or 1)


def _decide(predictor: Predictor, search: SearchOptions) -> Decision:
    device = predictor.device
    total = device.total_bytes
    if total is None:
        raise UsageError("a batch size needs a device with a memory limit")
    limit, bound = upper_limit(search)
    try:
        while True:
            decision = decide(
                predictor,
                total_bytes=total,
                target=search.target,
                multiple_of=search.multiple_of,
                limit=limit,
                limit_bound=bound,
                guess=predictor.guess,
            )
            if predictor.confirm(decision.batch_size):
                return decision
    except NothingFitsError:
        raise _nothing_fits(predictor, total, search) from None


def _nothing_fits(predictor: Predictor, total: int, search: SearchOptions) -> NothingFitsError:
    """Return the error that says what fits above the target, and how full the size to be checked is."""
    device = predictor.device
    largest = largest_that(lambda size: predictor(size).fits, guess=predictor.guess(1.0), limit=MAX_BATCH_SIZE)
    checked = None if search.check is None else predictor(search.check)
    needed = predictor.expected(1)
    message = (
        f"not even one sequence of {predictor.workload.length} tokens stays under {search.target[1]:.0%} of "
        f"{device.name}: it needs {needed / GIB:.2f} GiB of {total / GIB:.2f} GiB"
    )
    if checked is not None:
        message += f"; {format_checked(checked, predictor.expected(checked.batch_size), total)}"
    error = NothingFitsError(
        f"{message}; {_above_the_target(predictor, largest, total) or _hint(predictor.workload, device, search)}"
    )
    error.largest, error.checked = largest, checked
    return error


def format_checked(trial: Trial, needed: int, total: int) -> str:
    """Return how full the device is at the size that was checked."""
    figures = f"{needed / GIB:.2f} GiB, {needed / total:.0%} of the memory"
    if trial.fits:
        return f"batch size {trial.batch_size} fits above the target: {figures}"
    return f"batch size {trial.batch_size} does not fit: {figures}" if needed else f"{trial.batch_size} does not fit"


def _above_the_target(predictor: Predictor, largest: int, total: int) -> str:
    """Return what fits the device at all, without room for anything else; empty if nothing does."""
    if not largest:
        return ""
    sizes = "1 fits" if largest == 1 else f"1 to {largest} fit"
    full = f"{(predictor(largest).used_bytes or 0) / total:.0%}"
    return f"{sizes} the memory above the target ({largest} fills {full}): --target 0 1 answers with what fits at all"


def _hint(workload: Trainable, device: GpuSpec, search: SearchOptions) -> str:
    """Return in a few words what could make it fit and is not in use."""
    if device.kind != "cuda" and device.context_bytes > search.target[1] * (device.total_bytes or 0):
        return f"{device.context_bytes / GIB:.2f} GiB are in use before there is a model: it needs more memory"
    remedies = ["a shorter max_length"]
    if not isinstance(workload, Workload):
        remedies.append("activation checkpointing")
    else:
        if not workload.activation_checkpointing:
            remedies.append("activation checkpointing")
        if device.kind == "cuda" and not workload.lora_r:
            remedies.append("LoRA (with 4-bit weights)")
        elif device.kind == "cuda" and not workload.load_in_4bit:
            remedies.append("4-bit weights")
    more = "a larger GPU" if device.kind == "cuda" else "more memory"
    return f"{', '.join(remedies)} or {more} can help"
