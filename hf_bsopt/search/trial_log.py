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
    """A log of sizes that are run. Within :meth:`search`, a size that failed is logged with the size tried next."""

    def __init__(self) -> None:
        self._is_searching = False
        self._failed: Trial | None = None

    @contextlib.contextmanager
    def search(self) -> Iterator[None]:
        """Hold back a size that failed until the next one is known."""
        self._is_searching = True
        try:
            yield
        finally:
            self._is_searching = False
            self._log_failed("")

    def trying(self, batch_size: int) -> None:
        """Note that a size is about to be run."""
        self._log_failed(f" → trying {batch_size}")

    def tried(self, trial: Trial) -> None:
        """Log a size that was run."""
        if self._is_searching and not trial.fits:
            self._failed = trial
        else:
            logger.info("%s", format_trial(trial))

    def _log_failed(self, what_follows: str) -> None:
        if self._failed is not None:
            logger.info("%s%s", format_trial(self._failed), what_follows)
        self._failed = None


def format_trial(trial: Trial) -> str:
    """Format a trial as one line of the log."""
    if trial.fits:
        return f"✓ Batch size {trial.batch_size} works ({(trial.used_bytes or 0) / 2**30:.2f} GiB)"
    detail = f", {trial.detail}" if trial.detail and trial.outcome != "oom" else ""
    return f"✗ Batch size {trial.batch_size}: {VERDICTS[trial.outcome]}{detail}"
