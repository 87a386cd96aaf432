"""Run the predicted sizes of a workload with a probe client until the answer is verified."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from ..errors import NothingFitsError, ProbeError, RehearsalError
from ..options import MAX_ATTEMPTS
from ..probing import ProbeClient
from ..records import VERDICTS, Trial
from ..workloads.trainable import Phase, Trainable
from .answer_cache import CachedAnswer
from .cached_answers import CachedAnswers
from .limits import Allowed, Limits, Prediction
from .policies import policy_for
from .prediction import format_checked
from .throughput import curve_sizes, plateau
from .trial_log import TrialLog
from .verify import Verification, verify

SAME = 0.02
"""Fraction of the device's memory: a cached size that uses the same to within this is confirmed."""


@dataclass
class Verifier:
    """Runs sizes of one workload in one phase, and keeps the trials.

    fraction: of the device's memory that a size may use. smallest: the smallest batch that can be trained.
    """

    client: ProbeClient
    workload: Trainable
    fraction: float
    max_attempts: int = MAX_ATTEMPTS
    cached: CachedAnswers | None = None
    smallest: int = 1
    phase: Phase = "training"
    trials: dict[tuple[Phase, int], Trial] = field(default_factory=dict)
    log: TrialLog = field(default_factory=TrialLog)

    def run(self, size: int) -> Trial:
        """Run a size, each one once."""
        known = self.trials.get((self.phase, size))
        return self._run_anew(size) if known is None else known

    def _run_anew(self, size: int, timed_steps: int = 0) -> Trial:
        self.log.trying(size)
        trial = self.trials[self.phase, size] = self.client(self.workload, size, self.phase, timed_steps=timed_steps)
        self.log.tried(trial)
        return trial

    def verify(self, first: int, allowed: Allowed, prediction: Prediction | None) -> Verification:
        """Find the largest size that was run and fits, 0 if none does.

        Raises ProbeError if a step fails for another reason than memory, RehearsalError if that was on the virtual GPU.
        """
        limits = self._limits(allowed)
        cached = self._load_cached()
        if cached is not None:
            verification = self._confirmed(cached, limits)
            if verification is not None:
                return verification
        with self.log.search():
            verification = self._search(first, limits, prediction)
        if verification.failure is not None:
            is_virtual = self.client.device.source == "rehearsed"
            raise (RehearsalError if is_virtual else ProbeError)(self._failure(verification.failure))
        self._save(verification)
        return verification

    def measure_throughput(self, largest: int, allowed: Allowed) -> Trial | None:
        """Return the smallest size up to ``largest`` that trains about as fast as any; None if no times are known."""
        curve = [self._run_anew(size, THROUGHPUT_STEPS) for size in curve_sizes(largest, allowed)]
        return plateau([trial for trial in curve if self._limits(allowed).fits(trial)])

    def for_phase(self, phase: Phase, workload: Trainable) -> Verifier:
        """Return a verifier of another phase, on the same device, that shares the trials."""
        return replace(self, workload=workload, phase=phase)

    @property
    def _total(self) -> int:
        return self.client.device.spec.total_bytes or 0

    def _limits(self, allowed: Allowed) -> Limits:
        return Limits(self.fraction * self._total, self._total, allowed)

    def _search(self, first: int, limits: Limits, prediction: Prediction | None) -> Verification:
        return verify(
            self.run,
            first,
            limits=limits,
            prediction=prediction,
            policy=policy_for(self.client.device.source, self.client.device.schedule.calibration),
            max_attempts=self.max_attempts,
            smallest=self.smallest,
        )

    def _load_cached(self) -> CachedAnswer | None:
        if self.cached is None:
            return None
        return self.cached.cache.load({**self.cached.key, "phase": self.phase})

    def _confirmed(self, answer: CachedAnswer, limits: Limits) -> Verification | None:
        """Return the cached answer if one probe confirms it, or the user trusts it."""
        before = next((t for t in answer.trials if t.batch_size == answer.batch_size), None)
        if before is None or self.cached is None:
            return None
        if self.cached.is_trusted:
            self.trials.update({(self.phase, trial.batch_size): trial for trial in answer.trials})
            return Verification(answer.batch_size, answer.trials, answer.is_settled)
        trial = self.run(answer.batch_size)
        same = abs((trial.used_bytes or 0) - (before.used_bytes or 0)) <= SAME * self._total
        return Verification(trial.batch_size, (trial,), answer.is_settled) if limits.fits(trial) and same else None

    def _save(self, verification: Verification) -> None:
        if self.cached is not None and verification.batch_size:
            key = {**self.cached.key, "phase": self.phase}
            self.cached.cache.save(key, verification.trials, verification.batch_size, verification.is_settled)

    def _failure(self, trial: Trial) -> str:
        model = dict(self.workload.describe()).get("model", "the model")
        more = "; probe_timeout gives it more" if trial.outcome == "timeout" else ""
        return (
            f"the {self.phase} step of {model} failed at batch size {trial.batch_size} on "
            f"{self.client.device.spec.name} ({trial.outcome}): {trial.detail}{more}"
        )


THROUGHPUT_STEPS = 10


def nothing_fits(verification: Verification, verifier: Verifier, check: int | None = None) -> NothingFitsError:
    """Return the error that lists the sizes that were run, and answers ``check`` by running that size too."""
    device, total = verifier.client.device.spec, verifier.client.device.spec.total_bytes or 1
    tried = ", ".join(f"{trial.batch_size} ({_format_outcome(trial, total)})" for trial in verification.trials)
    message = f"no size that was run stays under {verifier.fraction:.0%} of {device.name}: {tried}"
    checked = None if check is None else verifier.run(check)
    if checked is not None:
        message += f"; {format_checked(checked, checked.used_bytes or 0, total)}"
    trials = [*verification.trials, *([] if checked is None else [checked])]
    largest = max((trial.batch_size for trial in trials if trial.fits), default=0)
    if largest:
        message += f"; up to {largest} ran in the memory above the target: --target 0 1 answers with what fits at all"
    error = NothingFitsError(message)
    error.largest, error.checked = largest, checked
    return error


def _format_outcome(trial: Trial, total: int) -> str:
    if trial.fits:
        return f"{(trial.used_bytes or 0) / total:.0%}"
    return trial.detail or VERDICTS[trial.outcome]
