"""Sentences of a report: the reason for a decision, warnings, and hints."""

from __future__ import annotations

from ..options import MAX_BATCH_SIZE, SearchOptions
from ..records import Decision
from ..search.answer import Answer
from ..search.batch_plan import SLOW_ACCUMULATION, BatchPlan, usual_total_tokens

GIB = 2**30
LOW_UTILIZATION, HIGH_UTILIZATION = 0.70, 0.95
SMALL_MICRO_BATCH = 2
"""Micro-batch up to which memory keeps the GPU from working at full speed: the report then mentions ``--advise``."""
REFUTED_BY = 0.05
"""Relative error of used memory above which the report warns that the prediction was wrong."""


def percent(fraction: float) -> str:
    """Format a fraction, such as 79 %."""
    return f"{fraction * 100:.0f} %"


def gib(size: int | None) -> str:
    """Format bytes, such as 9.57 GiB."""
    return "–" if size is None else f"{size / GIB:.2f} GiB"


def memory_name(answer: Answer) -> str:
    """Return the name of the device's memory: VRAM, or RAM on a CPU or a Mac."""
    return "VRAM" if answer.device.kind == "cuda" else "RAM"


def reason(decision: Decision, plan: BatchPlan, search: SearchOptions) -> str:
    """Return the reason for the chosen size, such as "48: largest multiple of 8 under 90 % (80 %)"."""
    used = f"({percent(decision.utilization)})"
    return f"{decision.batch_size}: {_reason(decision, plan, search, used)}"


def _reason(decision: Decision, plan: BatchPlan, search: SearchOptions, used: str) -> str:
    high = percent(search.target[1])
    if decision.bound == "throughput plateau":
        speed = decision.samples_per_second or 0
        return (
            f"smallest size within 2 % of the best throughput ({speed:.1f} samples/s); {decision.slower_size} fits and "
            f"trains no faster"
        )
    if decision.predicted is not None:
        which = "largest that ran" if decision.is_settled else f"largest that ran in {decision.attempts} attempts"
        return f"{which} under {high} {used}; the prediction was {decision.predicted}"
    if decision.bound == "divisor of the effective batch":
        return _divisor_reason(plan, decision.unconstrained or decision.batch_size)
    if decision.limit is not None:
        is_below = decision.batch_size < decision.limit
        which = f"largest multiple of {search.multiple_of} within" if is_below else "at"
        return f"{which} {_limit_in_words(decision, search)} {used}"
    multiple = search.multiple_of
    if multiple == 1:
        which = "largest size"
    elif decision.batch_size % multiple == 0:
        which = f"largest multiple of {multiple}"
    else:
        which = f"largest size, since no multiple of {multiple} is"
    return f"{which} under {high} {used}"


def _limit_in_words(decision: Decision, search: SearchOptions) -> str:
    if decision.bound == "default maximum":
        return f"the default maximum of {MAX_BATCH_SIZE:,}, without --batch_size"
    if decision.bound == "dataset size" and search.num_processes > 1:
        return f"a process's share of the dataset, {decision.limit} of {search.dataset_size}"
    return f"the {decision.bound} of {decision.limit}"


def _divisor_reason(plan: BatchPlan, unconstrained: int) -> str:
    whole = f"the effective batch of {plan.effective_batch}"
    share = whole if plan.processes == 1 else f"a process's {plan.micro_batch * plan.accumulation} of {whole}"
    if plan.accumulation == 1:
        return f"all of {share}; {unconstrained} would fit"
    return f"largest divisor of {share} at or under {unconstrained}, which would fit"


def answer_line(answer: Answer) -> str:
    """Return the line with the batch size. A size limited by the dataset or a default is not called optimal."""
    decision = answer.decision
    if decision.is_optimal:
        return f"✅ OPTIMAL BATCH SIZE: {answer.batch_size}"
    limit = "the size of the dataset" if decision.bound == "dataset size" else f"the maximum of {MAX_BATCH_SIZE:,}"
    return f"✅ BATCH SIZE: {answer.batch_size} (limited by {limit}, not by memory)"


def warnings(answer: Answer, *, has_suggestions: bool = False) -> list[str]:
    """Return what the user should know in any case, in sentences.

    has_suggestions: the report has advice already, so that it need not mention ``--advise``.
    """
    sentences = [*_refuted(answer), *answer.plan.advice]
    if _memory_makes_it_slow(answer) and not has_suggestions:
        plan = answer.plan
        many = f", {plan.accumulation} per optimizer step" if plan.accumulation > 1 else ""
        sentences.append(
            f"Memory allows a micro-batch of {plan.micro_batch}{many}, which is slow: --advise (in Python: "
            f"advise(report)) predicts what would make room."
        )
    if answer.has_batch_norm and answer.plan.accumulation > 1:
        sentences.append(
            f"The model has BatchNorm, whose statistics are over {answer.plan.micro_batch} sequences, not over the "
            f"effective batch of {answer.plan.effective_batch}: accumulation does not replace a larger batch there."
        )
    if answer.utilization > HIGH_UTILIZATION:
        sentences.append(
            f"{_used(answer)}, over {percent(HIGH_UTILIZATION)}: an evaluation or a longer batch can run out of "
            f"memory; {answer.decision.safe} is safe."
        )
    if not answer.device.supports_bfloat16 and answer.workload.settings.precision.startswith("bf16"):
        sentences.append(
            f"{answer.device.name} has no bf16 units (compute {answer.device.capability}): bf16 is slow there or "
            f"fails; --fp16 is supported and takes no more memory."
        )
    return sentences


def hints(answer: Answer) -> list[str]:
    """Return what the user could change, and what is usual, in sentences."""
    sentences = _low_utilization(answer)
    if answer.device.supports_bfloat16 and answer.workload.settings.precision in ("fp16", "fp16-weights"):
        sentences.append(
            f"{answer.device.name} supports bf16 too: --bf16 needs no loss scaling and takes as much memory."
        )
    if not answer.asked_effective_batch:
        sentences.append(usual_total_tokens(answer.parameters[0])[2])
    return sentences


def _refuted(answer: Answer) -> list[str]:
    error, decision = answer.prediction_error, answer.decision
    if error is not None and abs(error - 1) > REFUTED_BY:
        return [
            f"The prediction was wrong here: the step used {error:.2f} times the predicted memory. The sizes marked as "
            f"predicted are not reliable; please report it with the output of hf-bsopt env."
        ]
    if decision.predicted is not None and decision.batch_size * 4 < decision.predicted * 3:
        return [
            f"The prediction was wrong here: {decision.predicted} was predicted to fit, {decision.batch_size} does. "
            f"The sizes marked as predicted are not reliable; please report it with the output of hf-bsopt env."
        ]
    return []


def _low_utilization(answer: Answer) -> list[str]:
    decision, utilization, used = answer.decision, answer.utilization, _used(answer)
    largest = f"{decision.largest}" if decision.largest <= MAX_BATCH_SIZE else f"more than {MAX_BATCH_SIZE:,}"
    under = f"{used}, under {percent(LOW_UTILIZATION)}"
    if decision.bound == "memory" and answer.asked_effective_batch and utilization < LOW_UTILIZATION:
        return [f"{under}: a micro-batch up to {largest} would fit, if the effective batch were a multiple of it."]
    if decision.bound == "memory":
        if utilization < min(answer.target[0], LOW_UTILIZATION):
            return [f"{under}: --multiple_of 1 would find a size between this one and {largest}."]
        return []
    if decision.bound == "throughput plateau":
        if utilization < answer.target[0]:
            return [
                f"{used}, under the target of {percent(answer.target[0])}, on purpose: a larger batch fits and trains "
                f"no faster; the memory that is left is free for longer sequences."
            ]
        return []
    return [f"{under}: memory alone would allow {largest}."] if utilization < LOW_UTILIZATION else []


def _used(answer: Answer) -> str:
    return f"{percent(answer.utilization)} of the {memory_name(answer)} is used"


def _memory_makes_it_slow(answer: Answer) -> bool:
    """Return whether memory limits the micro-batch to so few sequences that training is slow."""
    plan, decision = answer.plan, answer.decision
    is_bound_by_memory = decision.bound == "memory" or 2 * plan.micro_batch >= decision.largest
    return is_bound_by_memory and (plan.micro_batch <= SMALL_MICRO_BATCH or plan.accumulation > SLOW_ACCUMULATION)
