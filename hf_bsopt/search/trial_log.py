"""The log of what is run, a line for each size.

✓ Batch size 19 works (1.20 GiB)
✗ Batch size 36: out of memory → trying 27
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

from ..records import VERDICTS, Trial

logger = logging.getLogger(__name__)


class TrialLog:
    """Within :meth:`search`, what failed is told together with the size that is tried next."""

    def __init__(self) -> None:
        self._is_searching = False
        self._failed: Trial | None = None

    @contextlib.contextmanager
    def search(self) -> Iterator[None]:
        """Sizes that follow from each other."""
        self._is_searching = True
        try:
            yield
        finally:
            self._is_searching = False
            self._tell_failed("")

    def trying(self, batch_size: int) -> None:
        """This size is about to be run."""
        self._tell_failed(f" → trying {batch_size}")

    def tried(self, trial: Trial) -> None:
        """It was run."""
        if self._is_searching and not trial.fits:
            self._failed = trial
        else:
            logger.info("%s", told_trial(trial))

    def _tell_failed(self, what_follows: str) -> None:
        if self._failed is not None:
            logger.info("%s%s", told_trial(self._failed), what_follows)
        self._failed = None


def told_trial(trial: Trial) -> str:
    """One line, as the log shows it."""
    if trial.fits:
        return f"✓ Batch size {trial.batch_size} works ({(trial.used_bytes or 0) / 2**30:.2f} GiB)"
    detail = f", {trial.detail}" if trial.detail and trial.outcome != "oom" else ""
    return f"✗ Batch size {trial.batch_size}: {VERDICTS[trial.outcome]}{detail}"
