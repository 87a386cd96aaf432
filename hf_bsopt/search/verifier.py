"""Run the predicted sizes of a workload with a probe client until the answer is verified."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ..errors import NothingFitsError, ProbeError, RehearsalError
from ..probing import ProbeClient, with_timed_steps
from ..records import Trial
from ..workloads.workload import Phase, Trainable
from .answer_cache import AnswerCache, Recalled
from .largest import search_trials
from .limits import Allowed, Limits, Prediction
from .policies import policy_for
from .throughput import curve_sizes, plateau
from .trial_log import TrialLog
from .verify import MAX_ATTEMPTS, Verification, verify

SAME = 0.02
"""Fraction of the device's memory: a remembered size that uses the same to within this is confirmed."""


@dataclass(frozen=True)
class Remembering:
    """The cache of measured answers, and the key of this one.

    key: everything that the answer depends on. is_trusted: a remembered answer is not run again.
    """

    cache: AnswerCache
    key: Mapping[str, Any]
    is_trusted: bool = False


@dataclass
class Verifier:
    """Runs sizes of one workload and keeps their trials.

    share: fraction of the device's memory that a size may use. smallest: the smallest size that can be trained.
    """

    client: ProbeClient
    workload: Trainable
    share: float
    max_attempts: int = MAX_ATTEMPTS
    remembering: Remembering | None = None
    smallest: int = 1
    trials: dict[tuple[Phase, int], Trial] = field(default_factory=dict)
    log: TrialLog = field(default_factory=TrialLog)

    def run(self, size: int, phase: Phase = "training") -> Trial:
        """Return the trial of a size, which runs at most once."""
        known = self.trials.get((phase, size))
        if known is None:
            self.log.trying(size)
            known = self.trials[phase, size] = self.client(self.workload, size, phase)
            self.log.tried(known)
        return known

    def verify(
        self, first: int, allowed: Allowed, prediction: Prediction | None, phase: Phase = "training"
    ) -> Verification:
        """Return the largest size that was run and fits, 0 if none did.

        Raises ProbeError if a step fails for another reason than memory, RehearsalError if the device is virtual.
        """
        limits = self._limits(allowed)
        recalled = self._recall(phase)
        if recalled is not None:
            verification = self._confirmed(recalled, limits, phase)
            if verification is not None:
                return verification
        with self.log.search():
            verification = self._search(first, limits, prediction, phase)
        if verification.failure is not None:
            is_virtual = self.client.device.source == "rehearsed"
            raise (RehearsalError if is_virtual else ProbeError)(self._failure(verification.failure, phase))
        self._keep(verification, phase)
        return verification

    def measure_throughput(self, largest: int, allowed: Allowed) -> Trial | None:
        """Return the smallest size that trains about as fast as any up to ``largest``, None if nothing was timed."""
        self.client.device = with_timed_steps(self.client.device, steps=THROUGHPUT_STEPS)
        curve = []
        for size in curve_sizes(largest, allowed):
            self.trials.pop(("training", size), None)  # it was timed for fewer steps
            trial = self.run(size)
            if self._limits(allowed).fits(trial):
                curve.append(trial)
        return plateau(curve)

    @property
    def _total(self) -> int:
        return self.client.device.spec.total_bytes or 0

    def _limits(self, allowed: Allowed) -> Limits:
        return Limits(self.share * self._total, self._total, allowed)

    def _search(self, first: int, limits: Limits, prediction: Prediction | None, phase: Phase) -> Verification:
        if prediction is None:
            most = limits.allowed(MOST_UNPREDICTED)
            return search_trials(
                lambda size: self._within_limits(size, limits, phase), max(1, first), limit=most, max_attempts=None
            )
        device = self.client.device
        return verify(
            lambda size: self.run(size, phase),
            first,
            limits=limits,
            prediction=prediction,
            policy=policy_for(device.source, device.schedule.calibration),
            max_attempts=self.max_attempts,
            smallest=self.smallest,
        )

    def _within_limits(self, size: int, limits: Limits, phase: Phase) -> Trial:
        """Run a size for a search that knows no bytes: over the limit counts as out of memory."""
        trial = self.run(size, phase)
        return trial if limits.fits(trial) or not trial.is_about_memory else replace(trial, outcome="oom")

    def _recall(self, phase: Phase) -> Recalled | None:
        if self.remembering is None:
            return None
        return self.remembering.cache.recall({**self.remembering.key, "phase": phase})

    def _confirmed(self, recalled: Recalled, limits: Limits, phase: Phase) -> Verification | None:
        """Return the remembered answer if one probe confirms it, or the user trusts it."""
        before = next((t for t in recalled.trials if t.batch_size == recalled.batch_size), None)
        if before is None or self.remembering is None:
            return None
        if self.remembering.is_trusted:
            self.trials.update({(phase, trial.batch_size): trial for trial in recalled.trials})
            return Verification(recalled.batch_size, recalled.trials, recalled.is_settled)
        trial = self.run(recalled.batch_size, phase)
        same = abs((trial.used_bytes or 0) - (before.used_bytes or 0)) <= SAME * self._total
        return Verification(trial.batch_size, (trial,), recalled.is_settled) if limits.fits(trial) and same else None

    def _keep(self, verification: Verification, phase: Phase) -> None:
        if self.remembering is not None and verification.batch_size:
            key = {**self.remembering.key, "phase": phase}
            self.remembering.cache.keep(key, verification.trials, verification.batch_size, verification.is_settled)

    def _failure(self, trial: Trial, phase: Phase) -> str:
        model = dict(self.workload.describe()).get("model", "the model")
        more = "; probe_timeout gives it more" if trial.outcome == "timeout" else ""
        return (
            f"the {phase} step of {model} did not come through at batch size {trial.batch_size} on "
            f"{self.client.device.spec.name} ({trial.outcome}): {trial.detail}{more}"
        )


MOST_UNPREDICTED = 4096
"""Largest batch that is tried without a prediction."""
THROUGHPUT_STEPS = 10


def nothing_fits(verification: Verification, share: float, name: str) -> NothingFitsError:
    """Return the error that lists the sizes that were run."""
    tried = ", ".join(f"{trial.batch_size} ({trial.detail or trial.outcome})" for trial in verification.trials)
    return NothingFitsError(f"no size that was run stays under {share:.0%} of {name}: {tried}")
