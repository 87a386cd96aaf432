"""Run a script that uses a Trainer with other batch sizes until the largest that fits is known (``--find``)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ..options import SearchOptions
from ..records import GpuSpec, Peak, Trial
from .outcome import ScriptOutcome

if TYPE_CHECKING:
    from ..search.pipeline import UnpredictedAnswer

Rerun = Callable[[int, int], ScriptOutcome]
"""rerun(micro_batch, accumulation): rehearse the script with this batch."""
Verdict = Literal["fits", "oom", "unknown"]


@dataclass(frozen=True)
class Found:
    """The answer to print, and whether the recommended size fits (oom: no size that was run fits)."""

    text: str
    verdict: Verdict


class _BatchSizeIgnoredError(Exception):
    """The script's memory is the same at two batch sizes."""


class ScriptBatchSearch:
    """Search over the micro-batch of a Trainer that keeps the effective batch size; each size runs at most once.

    first: the outcome with the script's own batch. trainer: that batch, from ``TrainerHooks.batch``. target: the
    fractions of the GPU's memory to use. show: called with a line of text for each size that ran.
    """

    def __init__(
        self,
        first: ScriptOutcome,
        trainer: dict[str, int],
        rerun: Rerun,
        gpu: GpuSpec,
        *,
        target: tuple[float, float],
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
        self._examples = trainer["examples"]
        self._trials = {self._own_size: _trial(self._own_size, first)}

    def run(self, multiple_of: int, max_attempts: int) -> Found:
        """Run at most ``max_attempts`` sizes, the script's own included, and recommend one that divides the effective
        batch.
        """
        from ..search.pipeline import run_without_prediction  # imports torch, which invalid arguments do not wait for

        options = SearchOptions(
            target=self._target,
            multiple_of=multiple_of,
            max_attempts=max_attempts,
            dataset_size=self._examples or None,
            effective_batch_size=self._samples_per_process * self._processes,
            num_processes=self._processes,
        )
        try:
            answer = run_without_prediction(self._probe, self._own_size, self._total_bytes, options)
        except _BatchSizeIgnoredError as error:
            return Found(f"\n❌ UNKNOWN: {error}.", "unknown")
        if answer is None:
            return Found(f"\n❌ No size that was run fits under {self._target[1]:.0%} of {self._gpu_name}.", "oom")
        text = _format_answer(answer, self._total_bytes)
        return Found(text, "fits" if answer.recommended.fits else "oom")

    def _probe(self, size: int) -> Trial:
        if size not in self._trials:
            outcome = self._rerun(size, max(1, self._samples_per_process // size))
            trial = _trial(size, outcome)
            self._show(f"{'✓' if trial.fits else '✗'} {size}: {_format_trial(trial, self._total_bytes)}")
            self._check_memory_depends_on_size(trial)
            self._trials[size] = trial
        return self._trials[size]

    def _check_memory_depends_on_size(self, trial: Trial) -> None:
        """Raise _BatchSizeIgnoredError if a size half or twice as large, or further away, used the same memory.

        Only sizes that accumulate gradients, or only sizes that do not, are compared: resident gradients can offset
        a smaller batch.
        """
        for other in self._trials.values():
            smaller, larger = sorted((trial.batch_size, other.batch_size))
            if (
                trial.fits
                and other.fits
                and trial.used_bytes == other.used_bytes
                and larger >= 2 * smaller
                and self._accumulates(smaller) == self._accumulates(larger)
            ):
                raise _BatchSizeIgnoredError(
                    f"memory is the same at batch sizes {smaller} and {larger}: "
                    "the script does not take its batch size from per_device_train_batch_size"
                )

    def _accumulates(self, size: int) -> bool:
        return self._samples_per_process // size > 1


def _trial(size: int, outcome: ScriptOutcome) -> Trial:
    """Convert an outcome; a script that caught an out-of-memory error did not fit at this size."""
    if outcome.fits and not outcome.caught:
        peak = Peak(outcome.allocated_bytes, outcome.reserved_bytes)
        return Trial(size, "fits", peak, outcome.used_bytes, "rehearsed", alloc_retries=outcome.retries)
    failure = "oom" if outcome.fits else outcome.status if outcome.status in ("oom", "timeout") else "error"
    return Trial(size, failure, None, None, "rehearsed", detail=outcome.message)  # type: ignore[arg-type]


def _format_answer(answer: UnpredictedAnswer, total_bytes: int) -> str:
    size, largest, batch = answer.recommended.batch_size, answer.largest, answer.plan
    lines = ["", f"Largest per-device batch size that was run and fits: {largest}{_format_limit(answer)}."]
    if size < largest:
        why = "does not divide it" if batch.effective_batch > largest else "is larger than that"
        lines.append(f"Your effective batch size of {batch.effective_batch} is kept; {largest} {why}.")
    lines += [
        f"{size} {_format_trial(answer.recommended, total_bytes)}.",
        "",
        f"✅ OPTIMAL BATCH SIZE: {size}",
        "Update your arguments:",
        f"  per_device_train_batch_size={size}",
        f"  gradient_accumulation_steps={batch.accumulation}",
    ]
    return "\n".join(lines)


def _format_limit(answer: UnpredictedAnswer) -> str:
    """Return why no larger size was run, in words; nothing if it would not fit."""
    if answer.bound == "dataset size":
        return "; the dataset holds no larger one"
    if answer.bound != "memory":
        return ", and no larger one was tried"
    return "" if answer.is_settled else "; with more --max_attempts a larger one may be found"


def _format_trial(trial: Trial, total_bytes: int) -> str:
    if not trial.fits:
        return "out of memory" if trial.outcome == "oom" else f"{trial.outcome}, {trial.detail}"
    used_bytes = trial.used_bytes or 0
    return f"fits with {used_bytes / 2**30:.2f} GiB used, {used_bytes / total_bytes:.0%}"
