"""Run a script that uses a Trainer with other batch sizes until the largest that fits is known (``--find``)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from ..records import GpuSpec, Peak, Trial
from ..search.batch_plan import BatchPlan, plan
from ..search.choose import LARGEST_TRIED, round_down
from ..search.limits import Limits
from ..search.verify import verify
from .outcome import ScriptOutcome

Rerun = Callable[[int, int], ScriptOutcome]
"""rerun(micro_batch, accumulation): rehearse the script with this batch."""
Verdict = Literal["fits", "oom", "unknown"]


@dataclass(frozen=True)
class Found:
    """The answer to print, and whether the recommended size fits (oom: no size that was run fits)."""

    text: str
    verdict: Verdict


class ScriptBatchSearch:
    """Search over the micro-batch of a Trainer that keeps the effective batch size; each size runs at most once.

    first: the outcome with the script's own batch. trainer: that batch, from ``TrainerHooks.batch``. target: the
    largest fraction of the GPU's memory to use. show: called with a line of text for each size that ran.
    """

    def __init__(
        self,
        first: ScriptOutcome,
        trainer: dict[str, int],
        rerun: Rerun,
        gpu: GpuSpec,
        *,
        target: float,
        show: Callable[[str], None],
    ) -> None:
        self._rerun = rerun
        self._show = show
        self._gpu_name = gpu.name
        self._total_bytes = gpu.total_bytes or 0
        self._target = target
        self._own_size = trainer["micro_batch"]
        self._processes = trainer["processes"]
        self._samples_per_process = trainer["micro_batch"] * trainer["accumulation"]
        examples = trainer["examples"]
        self._largest_size = max(1, examples // self._processes) if examples else LARGEST_TRIED
        self._trials = {self._own_size: _trial(self._own_size, first)}

    def run(self, multiple_of: int, max_attempts: int) -> Found:
        """Run at most ``max_attempts`` sizes, the script's own included, and recommend one that divides the effective
        batch.
        """
        # one attempt is kept for the divisor of the effective batch
        largest, trials = self._search(multiple_of, max(1, max_attempts - 1))
        ignored = self._sizes_with_the_same_memory(trials)
        if ignored is not None:
            why = "the script does not take its batch size from per_device_train_batch_size"
            text = f"\n❌ UNKNOWN: memory is the same at batch sizes {ignored[0]} and {ignored[1]}: {why}."
            return Found(text, "unknown")
        if not largest:
            return Found(f"\n❌ No size that was run fits under {self._target:.0%} of {self._gpu_name}.", "oom")
        effective_batch = self._samples_per_process * self._processes
        batch = plan(largest, length=1, effective_batch=effective_batch, processes=self._processes)
        recommended = self._probe(batch.micro_batch)
        text = _format_answer(largest, recommended, self._total_bytes, batch)
        return Found(text, "fits" if recommended.fits else "oom")

    def _search(self, multiple_of: int, max_attempts: int) -> tuple[int, Sequence[Trial]]:
        """Return (the largest size that ran within the target, every trial in order)."""

        def allowed(size: int) -> int:
            rounded = round_down(min(size, self._largest_size), multiple_of)
            return max(rounded, self._own_size if size >= self._own_size else 0)

        limits = Limits(self._target * self._total_bytes, self._total_bytes, allowed=allowed)
        result = verify(self._probe, self._own_size, limits=limits, max_attempts=max_attempts)
        return result.batch_size, result.trials

    def _sizes_with_the_same_memory(self, trials: Sequence[Trial]) -> tuple[int, int] | None:
        """Return two sizes, the second at least twice the first, that used the same memory as the first trial.

        Only sizes that accumulate gradients, or only sizes that do not, are compared: resident gradients can offset
        a smaller batch.
        """
        first = trials[0]
        same = [
            trial.batch_size
            for trial in trials
            if trial.fits
            and trial.used_bytes == first.used_bytes
            and self._accumulates(trial.batch_size) == self._accumulates(first.batch_size)
        ]
        return (same[0], same[-1]) if len(same) > 1 and same[-1] >= 2 * same[0] else None

    def _accumulates(self, size: int) -> bool:
        return self._samples_per_process // size > 1

    def _probe(self, size: int) -> Trial:
        if size not in self._trials:
            outcome = self._rerun(size, max(1, self._samples_per_process // size))
            trial = self._trials[size] = _trial(size, outcome)
            self._show(f"{'✓' if trial.fits else '✗'} {size}: {_format_trial(trial, self._total_bytes)}")
        return self._trials[size]


def _trial(size: int, outcome: ScriptOutcome) -> Trial:
    """Convert an outcome; a script that caught an out-of-memory error did not fit at this size."""
    if outcome.fits and not outcome.caught:
        peak = Peak(outcome.allocated_bytes, outcome.reserved_bytes)
        return Trial(size, "fits", peak, outcome.used_bytes, "rehearsed", alloc_retries=outcome.retries)
    failure = "oom" if outcome.fits else outcome.status if outcome.status in ("oom", "timeout") else "error"
    return Trial(size, failure, None, None, "rehearsed", detail=outcome.message)  # type: ignore[arg-type]


def _format_answer(largest: int, recommended: Trial, total_bytes: int, batch: BatchPlan) -> str:
    size = recommended.batch_size
    lines = ["", f"Largest per-device batch size that was run and fits: {largest}."]
    if size < largest:
        why = "does not divide it" if batch.effective_batch > largest else "is larger than that"
        lines.append(f"Your effective batch size of {batch.effective_batch} is kept; {largest} {why}.")
    lines += [
        f"{size} {_format_trial(recommended, total_bytes)}.",
        "",
        f"✅ OPTIMAL BATCH SIZE: {size}",
        "Update your arguments:",
        f"  per_device_train_batch_size={size}",
        f"  gradient_accumulation_steps={batch.accumulation}",
    ]
    return "\n".join(lines)


def _format_trial(trial: Trial, total_bytes: int) -> str:
    if not trial.fits:
        return "out of memory" if trial.outcome == "oom" else f"{trial.outcome}, {trial.detail}"
    used_bytes = trial.used_bytes or 0
    return f"fits with {used_bytes / 2**30:.2f} GiB used, {used_bytes / total_bytes:.0%}"
