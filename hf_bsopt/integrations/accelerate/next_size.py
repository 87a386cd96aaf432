"""Chooses the next batch size to try after an out-of-memory error. Pure: imports no torch.

    next_size(OomFacts(128, capacity_bytes=…, fixed_bytes=…, pending_bytes=…, reached_bytes=…, progress=0.4))

The first size that fits is the training itself, so sizes only decrease: a size that is skipped is lost, and a size that
is still too large costs one more error. The next size is therefore the largest that is expected to fit, without a
margin. The measured bytes are a lower bound, so it may fail too; the next estimate then rests on more of them.
"""

from __future__ import annotations

from dataclasses import dataclass

MINIMUM_STEPS = (32, 24, 16, 8, 6, 4)
"""The size is reduced by at least 1/32 as long as the estimate is below it; each time that it is not, the next fraction
applies."""
BLIND_STEPS = (10, 8, 6, 4, 3, 2)
"""The same where nothing is known of the memory: a tenth, as accelerate does, since a size that is skipped is lost."""
BLIND_PATIENCE = 24
"""Errors after which these steps grow: as many as accelerate needs from 128 to 6."""
PATIENCE = 12
"""After this many errors each further one moves on to the next fraction, so the search ends whatever the estimates."""
LARGEST_FACTOR = 4
"""No step goes below a quarter of the size: the earlier the training step failed, the less reliable the estimate."""


@dataclass(frozen=True)
class OomFacts:
    """The facts known about an attempt that ran out of memory, in bytes.

    capacity_bytes: the most that the training could have; None if nothing is known. fixed_bytes: memory in use whatever
    the batch size: weights, gradients, optimizer state. pending_bytes: the part of these that was not allocated yet.
    reached_bytes: memory in use plus the failed request. progress: the fraction of the forward pass that was done, 1
    after it. message: the message of the error.
    """

    batch_size: int
    capacity_bytes: int | None = None
    fixed_bytes: int = 0
    pending_bytes: int = 0
    reached_bytes: int = 0
    progress: float = 1.0
    message: str = ""

    @property
    def sequence_bytes(self) -> float | None:
        """Bytes per sequence at the end of the forward pass, if memory grows evenly from module to module."""
        grown = self.reached_bytes - self.fixed_bytes
        if self.capacity_bytes is None or grown <= 0 or self.progress <= 0:
            return None
        return grown / self.progress / self.batch_size

    @property
    def estimate(self) -> int | None:
        """The largest size that is expected to fit, or None if nothing is known."""
        per_sequence = self.sequence_bytes
        if per_sequence is None or self.capacity_bytes is None:
            return None
        return max(0, int((self.capacity_bytes - self.fixed_bytes - self.pending_bytes) / per_sequence))


@dataclass(frozen=True)
class NextSize:
    """The size to try next, 0 if none is left. contradicts_estimate: a size expected to fit has just failed."""

    batch_size: int
    reason: str
    contradicts_estimate: bool = False


def next_size(facts: OomFacts, failures: int = 1, contradictions: int = 0) -> NextSize:
    """Return the size to try next. ``failures``: errors so far, including this one. ``contradictions``: how many sizes
    so far were chosen below what was expected to fit.
    """
    size = facts.batch_size
    estimate = facts.estimate
    if size <= 1:
        return NextSize(0, "not even one sequence fits")
    if estimate is None:
        part = BLIND_STEPS[min(max(0, failures - BLIND_PATIENCE), len(BLIND_STEPS) - 1)]
        reason = f"1/{part} less, because the memory that it needed is unknown"
        return NextSize(size * (part - 1) // part, reason)
    strictness = contradictions + max(0, failures - PATIENCE)
    minimum_step = max(1, size // MINIMUM_STEPS[min(strictness, len(MINIMUM_STEPS) - 1)])
    chosen = min(size - minimum_step, max(estimate, size // LARGEST_FACTOR, 1))
    per_sequence = (facts.sequence_bytes or 0) / 2**20
    reason = (
        f"{per_sequence:,.1f} MiB per sequence, estimated from {facts.progress:.0%} of the forward pass: "
        f"{estimate} should fit"
    )
    if chosen < estimate:
        reason += f", but the size is reduced by at least {minimum_step}"
    if chosen > estimate:
        reason += "; no step goes below a quarter"
    return NextSize(chosen, reason, chosen < estimate)
