"""What can go wrong, under one root.

    BatchSizeError
    ├── UsageError (also a ValueError)   what was asked can't be: the message names the nearest valid choice
    │   ├── InvalidOptionError           an option has a value that is not of its type or range
    │   ├── UnknownModelError            neither in the catalog, nor a folder, nor reachable on the hub
    │   ├── UnknownGpuError              neither a card by name nor a memory size
    │   ├── MissingExtraError            an optional dependency isn't installed: the message has the pip line
    │   └── PatchError                   a file can't be patched with certainty, and is untouched
    ├── ProbeError                       a training step did not come through, for another reason than memory
    │   └── RehearsalError               there can be no virtual device here, or a process on it failed
    ├── DeviceError                      the device can't be used: there is none, or torch has no kernels for it
    ├── TraceError                       the training step couldn't be followed operation by operation
    ├── AgreementError                   the processes of a distributed run found no size together
    └── NothingFitsError                 not even one sequence fits the device
        └── ReachedZeroError (also a RuntimeError)  a training that was tried at ever smaller sizes ran at none

    SearchInterrupted (a KeyboardInterrupt)  Ctrl-C while sizes were run: it has what is known so far

The command line answers a `UsageError` with exit code 2 and a `NothingFitsError` with exit code 1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .records import Trial


class BatchSizeError(Exception):
    """The root: ``except BatchSizeError`` catches everything that this package raises on purpose."""


class UsageError(BatchSizeError, ValueError):
    """What the user asked for is wrong; the message says what is, and the nearest valid choice."""


class InvalidOptionError(UsageError):
    """An option has an invalid value. option: its name; problem: the rest of the sentence, with what is valid."""

    def __init__(self, option: str, problem: str) -> None:
        super().__init__(f"{option} {problem}")
        self.option = option
        self.problem = problem

    def spelled(self, name: str) -> InvalidOptionError:
        """Return the same error with the option as the user spelled it."""
        error = InvalidOptionError(name, self.problem)
        error.option = self.option
        return error


class UnknownModelError(UsageError):
    """No model of that name in the catalog, on this disk or on the hub; the message has the nearest names."""


class UnknownGpuError(UsageError):
    """Neither a known card nor a memory size; the message has the nearest names and an example of a size."""


class MissingExtraError(UsageError):
    """An optional dependency isn't installed; the message has the pip line that installs it."""


class PatchError(UsageError):
    """A file can't be patched with certainty; the message shows the lines, and the file is untouched."""


class DeviceError(BatchSizeError):
    """The device that was asked for can't be used: the message says why, and what can."""


class ProbeError(BatchSizeError):
    """A step failed otherwise than by memory; the message has the model, the size, the device and the error."""


class RehearsalError(ProbeError):
    """The virtual CUDA device can't be had here (the message says why), or what ran on it failed."""


class TraceError(BatchSizeError):
    """A training step did something that can't be followed without a device; the message names the operation."""


class NothingFitsError(BatchSizeError):
    """Not even a micro-batch of one sequence fits; the message has the bytes that it would need. question: what was
    asked (hf_bsopt.search.answer.Question), for `advise`; None if real steps ran out of memory, not a prediction.
    """

    question: Any = None


class ReachedZeroError(NothingFitsError, RuntimeError):
    """No size was left to try; a RuntimeError, as accelerate's decorator raises one."""


class RecoveryError(BatchSizeError):
    """A step ran out of memory where it can't be done again; what was trained is saved."""


class AgreementError(BatchSizeError):
    """The ranks could not agree; the message says why. ranks: those that failed or never came, as far as is known.
    told_by: the rank that said so first, None for what a rank found by itself.
    """

    def __init__(self, message: str, ranks: tuple[int, ...] = (), told_by: int | None = None) -> None:
        super().__init__(message)
        self.ranks = ranks
        self.told_by = told_by


class SearchInterrupted(KeyboardInterrupt):
    """Ctrl-C in the midst of a search. trials: the sizes that were run before it. predicted: the size to be proved."""

    def __init__(self, trials: tuple[Trial, ...], predicted: int) -> None:
        super().__init__("the search was interrupted")
        self.trials = trials
        self.predicted = predicted
