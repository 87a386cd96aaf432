"""Show progress for work that takes more than 2 seconds: a line on the terminal or a bar in a notebook.

    with progress.task("running batch size 48"):  # running batch size 48 [00:07]
        ...
    with progress.bar(len(models), "table") as line:  # 2/5 |████▊       | [00:05<00:07] table
        for model in models:
            with progress.task(model):  # appended to the table's line
                ...
            line.advance()

Written to standard error with tqdm, by rank 0 only, and only if standard error is a terminal.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

from .terminal import printable

DELAY_SECONDS = 2.0
TICK_SECONDS = 0.5
TASK_FORMAT = "{desc} [{elapsed}]"
BAR_FORMAT = "{n_fmt}/{total_fmt} |{bar:12}| [{elapsed}<{remaining}] {desc}"

_silences = 0
_shown: Line | None = None


@contextlib.contextmanager
def silent(is_silent: bool = True) -> Iterator[None]:
    """Show no progress within this context."""
    global _silences
    _silences += is_silent
    try:
        yield
    finally:
        _silences -= is_silent


@contextlib.contextmanager
def task(text: str) -> Iterator[None]:
    """Show ``text`` and the elapsed time; within another task or bar, append ``text`` to its line."""
    if _shown is not None:
        with _shown.suffix(text):
            yield
        return
    with _line(text, None):
        yield


def bar(total: int, text: str) -> AbstractContextManager[Line]:
    """Show a bar of ``total`` items; call ``advance`` on it for each one that is done."""
    return _line(text, total)


@contextlib.contextmanager
def _line(text: str, total: int | None) -> Iterator[Line]:
    global _shown
    before, line = _shown, Line(text, total)
    _shown = line
    try:
        yield line
    finally:
        _shown = before
        line.close()


class Line:
    """A tqdm bar that is redrawn by a thread, so that its clock advances during a step that runs for a minute."""

    def __init__(self, text: str, total: int | None) -> None:
        self._text = text
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None
        self._bar = _bar(text, total) if _is_visible() else None
        if self._bar is not None:
            self._thread = threading.Thread(target=self._tick, daemon=True)
            self._thread.start()

    def advance(self, count: int = 1) -> None:
        """Count ``count`` more items as done."""
        with self._lock:
            if self._bar is not None:
                self._bar.update(count)

    @contextlib.contextmanager
    def suffix(self, text: str) -> Iterator[None]:
        """Append ``text`` to the description within this context."""
        before, self._text = self._text, f"{self._text}, {text}"
        self._describe()
        try:
            yield
        finally:
            self._text = before
            self._describe()

    def close(self) -> None:
        """Remove the line from the terminal."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join()
        if self._bar is not None:
            self._bar.close()

    def _describe(self) -> None:
        with self._lock:
            if self._bar is not None:
                self._bar.set_description_str(printable(self._text), refresh=False)

    def _tick(self) -> None:
        seconds = DELAY_SECONDS
        while not self._stopped.wait(seconds):
            self.advance(0)
            seconds = TICK_SECONDS


def _is_visible() -> bool:
    """Return True if a bar would be shown; tqdm starts a monitor thread even for bars that are never shown."""
    has_display = sys.stderr is not None and (sys.stderr.isatty() or "ipykernel" in sys.modules)
    is_rank_0 = os.environ.get("RANK", "0") == "0" and threading.current_thread() is threading.main_thread()
    return has_display and is_rank_0 and not _silences


def _bar(text: str, total: int | None) -> Any:
    from tqdm.auto import tqdm

    return tqdm(
        total=total,
        desc=printable(text),
        leave=False,
        file=sys.stderr,
        delay=DELAY_SECONDS,
        miniters=0,
        mininterval=0,
        disable=None,  # None: disabled if standard error is not a terminal; a notebook has its own widget
        bar_format=TASK_FORMAT if total is None else BAR_FORMAT,
    )
