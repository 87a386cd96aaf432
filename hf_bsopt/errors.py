"""The exceptions of this package, under one base class.

    BatchSizeError
    ├── UsageError (also a ValueError)   an invalid request: the message names the nearest valid choice
    │   ├── InvalidOptionError           the value of an option has the wrong type or is out of range
    │   ├── UnknownModelError            neither in the catalog, nor a folder, nor reachable on the hub
    │   ├── UnknownGpuError              neither the name of a GPU nor a memory size
    │   ├── MissingExtraError            an optional dependency is not installed: the message has the pip command
    │   └── PatchError                   a file cannot be patched with certainty, and is unchanged
    ├── ProbeError                       a training step failed for a reason other than memory
    │   └── RehearsalError               no virtual device is possible on this machine, or a process on it failed
    ├── DeviceError                      the device cannot be used: there is none, or torch has no kernels for it
    ├── TraceError                       the training step could not be traced operation by operation
    │   ├── UnknownValueError            it failed after it read a value that only a GPU computes
    │   └── NotLinearError               it runs other operations, or needs more than in proportion, at another size
    ├── RecoveryError                    a step that ran out of memory cannot be repeated
    ├── AgreementError                   the ranks of a distributed run could not agree
    └── NothingFitsError                 not even one sequence fits the device
        └── ReachedZeroError (also a RuntimeError)  training failed at every size, down to the smallest

    SearchInterrupted (a KeyboardInterrupt)  Ctrl-C while sizes were run: it carries the results so far

The command line answers a `UsageError` with exit code 2 and a `NothingFitsError` with exit code 1.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .records import Trial


REHEARSE = (
    "It can be rehearsed, which runs the script as it is on a virtual GPU: hf-bsopt rehearse --gpu T4 -- train.py"
)
"""The next step after a step that cannot be predicted, for the message."""


class BatchSizeError(Exception):
    """The base class: ``except BatchSizeError`` catches every error that this package raises on purpose.

    In its message, words of more than 400 characters (a path, a value) are shortened.
    """

    def __str__(self) -> str:
        return re.sub(r"(\S{200})\S{101,}(\S{100})", r"\1…\2", super().__str__())


class UsageError(BatchSizeError, ValueError):
    """An invalid request of the user; the message says what is wrong and names the nearest valid choice."""


class InvalidOptionError(UsageError):
    """An invalid value of an option.

    option: the option's name. problem: the rest of the sentence, with the valid values.
    """

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
    """A model that is not in the catalog, on this disk or on the hub; the message has the nearest names."""


class UnknownGpuError(UsageError):
    """Neither a known GPU nor a memory size; the message has the nearest names and an example of a size."""


class MissingExtraError(UsageError):
    """An optional dependency that is not installed; the message has the pip command that installs it."""


class PatchError(UsageError):
    """A file that cannot be patched with certainty; the message shows the lines, and the file is unchanged."""


class DeviceError(BatchSizeError):
    """The requested device cannot be used; the message says why, and which device can."""


class ProbeError(BatchSizeError):
    """A step failed for a reason other than memory; the message has the model, the size, the device and the error."""


class RehearsalError(ProbeError):
    """No virtual CUDA device is possible on this machine (the message says why), or a process on it failed."""


class TraceError(BatchSizeError):
    """A training step did something that cannot be traced without a device; the message names the operation."""


class UnknownValueError(TraceError):
    """The step failed after the host read a value that only a GPU computes. ``original``: the step's own error."""

    def __init__(self, message: str, *, original: Exception | None = None) -> None:
        super().__init__(message)
        self.original = original


class NotLinearError(TraceError):
    """A training step whose memory at one batch size does not follow from that at others."""


class NothingFitsError(BatchSizeError):
    """Not even a micro-batch of one sequence fits; the message says how much memory it would need.

    question: the search that failed (hf_bsopt.search.answer.Question), for `advise`; None if it was real steps that ran
    out of memory rather than the prediction. largest: the largest size that fits the device at all, over the target; 0
    if none does. checked: the answer to ``check``.
    """

    question: Any = None
    largest: int = 0
    checked: Trial | None = None


class ReachedZeroError(NothingFitsError, RuntimeError):
    """No smaller size is left to try; a RuntimeError because accelerate's decorator raises one."""


class RecoveryError(BatchSizeError):
    """A step ran out of memory at a point from which it cannot be repeated; the training so far is saved."""


class AgreementError(BatchSizeError):
    """The ranks could not agree; the message says why.

    ranks: the ranks that failed or did not respond, as far as is known. reported_by: the rank that reported the failure
    first, None if this rank found it by itself. messages: what the ranks that did respond had sent, by rank.
    is_stopped: the ranks did not fail: they ended, are silent or did not respond, or were interrupted by Ctrl-C.
    """

    def __init__(
        self,
        message: str,
        ranks: tuple[int, ...] = (),
        reported_by: int | None = None,
        messages: Mapping[int, str] | None = None,
        *,
        is_stopped: bool = False,
    ) -> None:
        super().__init__(message)
        self.ranks = ranks
        self.reported_by = reported_by
        self.messages = dict(messages or {})
        self.is_stopped = is_stopped

    def explained(self, message: str) -> AgreementError:
        """Return the same error with another message."""
        return AgreementError(message, self.ranks, self.reported_by, self.messages, is_stopped=self.is_stopped)


class SearchInterrupted(KeyboardInterrupt):
    """Ctrl-C during a search. trials: the sizes that were run before it. predicted: the size to be verified."""

    def __init__(self, trials: tuple[Trial, ...], predicted: int) -> None:
        super().__init__("the search was interrupted")
        self.trials = trials
        self.predicted = predicted
