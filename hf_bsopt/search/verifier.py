"""What a prediction is worth: the sizes that it chose, run by a client until the answer stands."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ..errors import NothingFitsError, ProbeError, RehearsalError
from ..probing import ProbeClient, with_timed_steps
from ..records import Trial
from ..workloads.workload import Phase, Trainable
from .answer_cache import AnswerCache, Recalled
from .trial_log import TrialLog
from .verify import MAX_ATTEMPTS, Allowed, Limits, Prediction, Proof, curve_sizes, grow, plateau, prove

SAME = 0.02
"""Of the device: a remembered size that uses as much again, but for this, is confirmed."""


@dataclass(frozen=True)
class Remembering:
    """Where measured answers are kept, and what they were the answer to.

    key: all that decides an answer. is_trusted: a remembered answer is taken without running it once more.
    """

    cache: AnswerCache
    key: Mapping[str, Any]
    is_trusted: bool = False


@dataclass
class Verifier:
    """Runs sizes of one workload and keeps what came of them.

    share: of the device's memory, that a size may use. smallest: that can be trained at all.
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
        """Each size once."""
        known = self.trials.get((phase, size))
        if known is None:
            self.log.trying(size)
            known = self.trials[phase, size] = self.client(self.workload, size, phase)
            self.log.tried(known)
        return known

    def prove(self, first: int, allowed: Allowed, prediction: Prediction | None, phase: Phase = "training") -> Proof:
        """The largest size that was run and held, 0 where none did.

        Raises ProbeError where a step ends otherwise than by memory, RehearsalError where it was a virtual one.
        """
        limits = self._limits(allowed)
        recalled = self._recall(phase)
        if recalled is not None:
            proof = self._confirmed(recalled, limits, phase)
            if proof is not None:
                return proof
        with self.log.search():
            proof = self._search(first, limits, prediction, phase)
        if proof.failure is not None:
            is_virtual = self.client.device.source == "rehearsed"
            raise (RehearsalError if is_virtual else ProbeError)(self._failure(proof.failure, phase))
        self._keep(proof, phase)
        return proof

    def measure_throughput(self, largest: int, allowed: Allowed) -> Trial | None:
        """The smallest size that trains about as fast as any up to ``largest``; None where no time is told."""
        self.client.device = with_timed_steps(self.client.device, steps=THROUGHPUT_STEPS)
        curve = []
        for size in curve_sizes(largest, allowed):
            self.trials.pop(("training", size), None)  # it was timed for fewer steps
            trial = self.run(size)
            if self._limits(allowed).hold(trial):
                curve.append(trial)
        return plateau(curve)

    @property
    def _total(self) -> int:
        return self.client.device.spec.total_bytes or 0

    def _limits(self, allowed: Allowed) -> Limits:
        is_real = self.client.device.source == "measured"
        return Limits(self.share * self._total, self._total, allowed, is_cautious=is_real)

    def _search(self, first: int, limits: Limits, prediction: Prediction | None, phase: Phase) -> Proof:
        if prediction is None:
            most = limits.allowed(MOST_UNPREDICTED)
            return grow(lambda size: self._held(size, limits, phase), max(1, first), limit=most, max_attempts=None)
        return prove(
            lambda size: self.run(size, phase),
            first,
            limits=limits,
            prediction=prediction,
            calibration=self.client.device.schedule.calibration,
            max_attempts=self.max_attempts,
            smallest=self.smallest,
        )

    def _held(self, size: int, limits: Limits, phase: Phase) -> Trial:
        """For a search that knows no bytes: over the limit is as good as out of memory."""
        trial = self.run(size, phase)
        return trial if limits.hold(trial) or not trial.is_about_memory else replace(trial, outcome="oom")

    def _recall(self, phase: Phase) -> Recalled | None:
        if self.remembering is None:
            return None
        return self.remembering.cache.recall({**self.remembering.key, "phase": phase})

    def _confirmed(self, recalled: Recalled, limits: Limits, phase: Phase) -> Proof | None:
        """What was remembered, if one probe, or the user, says that it still stands."""
        before = next((t for t in recalled.trials if t.batch_size == recalled.batch_size), None)
        if before is None or self.remembering is None:
            return None
        if self.remembering.is_trusted:
            self.trials.update({(phase, trial.batch_size): trial for trial in recalled.trials})
            return Proof(recalled.batch_size, recalled.trials, recalled.is_settled)
        trial = self.run(recalled.batch_size, phase)
        same = abs((trial.used_bytes or 0) - (before.used_bytes or 0)) <= SAME * self._total
        return Proof(trial.batch_size, (trial,), recalled.is_settled) if limits.hold(trial) and same else None

    def _keep(self, proof: Proof, phase: Phase) -> None:
        if self.remembering is not None and proof.batch_size:
            key = {**self.remembering.key, "phase": phase}
            self.remembering.cache.keep(key, proof.trials, proof.batch_size, proof.is_settled)

    def _failure(self, trial: Trial, phase: Phase) -> str:
        model = dict(self.workload.describe()).get("model", "the model")
        more = "; probe_timeout gives it more" if trial.outcome == "timeout" else ""
        return (
            f"the {phase} step of {model} did not come through at batch size {trial.batch_size} on "
            f"{self.client.device.spec.name} ({trial.outcome}): {trial.detail}{more}"
        )


MOST_UNPREDICTED = 4096
"""Sequences that are tried at most where nothing is predicted."""
THROUGHPUT_STEPS = 10


def nothing_held(proof: Proof, share: float, name: str) -> NothingFitsError:
    """The error that says which sizes were run in vain."""
    tried = ", ".join(f"{trial.batch_size} ({trial.detail or trial.outcome})" for trial in proof.trials)
    return NothingFitsError(f"no size that was run stays under {share:.0%} of {name}: {tried}")
