"""Which size to try after those that ran out of memory. Pure: imports no torch.

    next_size(Shortage(128, capacity_bytes=…, fixed_bytes=…, coming_bytes=…, reached_bytes=…, progress=0.4))

The first size that comes through is trained with and is not run again, so that sizes only fall: what is jumped over is
lost, and what is tried too early costs one more error. So a jump goes where the memory that was counted says, without a
margin. What was counted is the least that was needed, so that the next size may fail too; then more was counted.
"""

from __future__ import annotations

from dataclasses import dataclass

LEAST_STEPS = (32, 24, 16, 8, 6, 4)
"""At least this part of the size is taken off: the first as long as memory leads the way, the next one after each size
for which it did not."""
PATIENCE = 12
"""After so many errors each further one counts as one for which it did not: however wrong the belief, errors end."""
FARTHEST = 4
"""No jump goes below this part of the size. The farther from the end of the step it failed, the less is known."""


@dataclass(frozen=True)
class Shortage:
    """What is known of an attempt that ran out of memory, in bytes.

    capacity_bytes: what the training could have at most; None where nothing is known. fixed_bytes: what was there
    whatever the size: weights, gradients, the optimizer's state. coming_bytes: the same, as far as it was not there
    yet. reached_bytes: what was there and what was asked for. progress: the share of the forward pass that was done,
    1 once it was. message: the error's.
    """

    batch_size: int
    capacity_bytes: int | None = None
    fixed_bytes: int = 0
    coming_bytes: int = 0
    reached_bytes: int = 0
    progress: float = 1.0
    message: str = ""

    @property
    def sequence_bytes(self) -> float | None:
        """What one sequence needs at the end of the forward pass, believed to grow evenly from module to module."""
        grown = self.reached_bytes - self.fixed_bytes
        if self.capacity_bytes is None or grown <= 0 or self.progress <= 0:
            return None
        return grown / self.progress / self.batch_size

    @property
    def believed(self) -> int | None:
        """The largest size that is believed to fit; None where nothing is known."""
        each = self.sequence_bytes
        if each is None or self.capacity_bytes is None:
            return None
        return max(0, int((self.capacity_bytes - self.fixed_bytes - self.coming_bytes) / each))


@dataclass(frozen=True)
class Next:
    """batch_size: to be tried next, 0 where none is left. is_doubted: what was believed to fit had just failed."""

    batch_size: int
    reason: str
    is_doubted: bool = False


def next_size(shortage: Shortage, failures: int = 1, doubts: int = 0) -> Next:
    """``failures``: errors so far, this one too. ``doubts``: how many sizes so far were chosen against belief."""
    size = shortage.batch_size
    believed = shortage.believed
    if size <= 1:
        return Next(0, "not even one sequence fits")
    if believed is None:
        return Next(size // 2, "half, since what it needed is not known")
    strictness = doubts + max(0, failures - PATIENCE)
    least = max(1, size // LEAST_STEPS[min(strictness, len(LEAST_STEPS) - 1)])
    chosen = min(size - least, max(believed, size // FARTHEST, 1))
    each = (shortage.sequence_bytes or 0) / 2**20
    reason = f"{each:,.1f} MiB a sequence, judged by {shortage.progress:.0%} of the forward pass, let {believed} fit"
    if chosen < believed:
        reason += f"; at least {least} fewer are tried"
    if chosen > believed:
        reason += "; less than a quarter is not tried at once"
    return Next(chosen, reason, chosen < believed)
