"""Policies for verification: one for each kind of device. Pure: imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..records import Source


@dataclass(frozen=True)
class Policy:
    """The caution with which sizes are run on a device.

    keeps_distance: the first size and every later one stay away from where an OOM is possible.
    distance_after_one_run, distance_after_two_runs: fraction of the memory between a size that ran and a larger one
    that is kept free; from two runs on, the error of the prediction is a line.
    noise: fraction of the device's memory by which a run may use more than the same run before.
    smallest_gain: a size that is larger by a smaller fraction is not worth a probe.
    corrected_attempts: attempts after which a prediction that was wrong is no longer corrected but bisected.
    calibration: fractions of the size expected to fit, run before it to learn how much memory a sequence needs.
    """

    keeps_distance: bool = False
    distance_after_one_run: float = 0.0
    distance_after_two_runs: float = 0.0
    noise: float = 0.0
    smallest_gain: float = 0.0
    corrected_attempts: int = 4
    calibration: tuple[float, ...] = ()


FREE = Policy()
"""Errors and probes cost nothing: a virtual GPU, a rehearsal."""

REAL_GPU = Policy(
    keeps_distance=True,
    distance_after_one_run=0.06,
    distance_after_two_runs=0.03,
    noise=0.002,
    smallest_gain=0.015,
    corrected_attempts=5,
)
"""A probe takes time, and an OOM may disturb other processes on the device."""


def with_calibration(policy: Policy, calibration: tuple[float, ...]) -> Policy:
    """Return the policy for a device of which less is known: a CPU, the GPU of a Mac. Small sizes run first there."""
    return replace(policy, calibration=calibration)


def policy_for(source: Source, calibration: tuple[float, ...] = ()) -> Policy:
    """Return the policy for a device whose trials have this ``source``."""
    return with_calibration(REAL_GPU if source == "measured" else FREE, calibration)
