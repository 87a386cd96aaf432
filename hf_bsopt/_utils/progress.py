"""What is going on, for whoever waits: a line on the terminal or a bar in a notebook, for what takes over 2 seconds.

    with progress.task("running batch size 48"):  # running batch size 48 [00:07]
        ...
    with progress.bar(len(models), "table") as line:  # 2/5 |████▊       | [00:05<00:07] table
        for model in models:
            with progress.task(model):  # told within the line of the table
                ...
            line.advance()

Written to standard error with tqdm, by rank 0 only, and not at all where that is no terminal.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

DELAY_SECONDS = 2.0
TICK_SECONDS = 0.5
TASK_FORMAT = "{desc} [{elapsed}]"
BAR_FORMAT = "{n_fmt}/{total_fmt} |{bar:12}| [{elapsed}<{remaining}] {desc}"

_silences = 0
_shown: Line | None = None


@contextlib.contextmanager
def silent(is_silent: bool = True) -> Iterator[None]:
    """Within it nothing is told."""
    global _silences
    _silences += is_silent
    try:
        yield
    finally:
        _silences -= is_silent


@contextlib.contextmanager
def task(text: str) -> Iterator[None]:
    """One thing that may take a while; within another, a word more on its line."""
    if _shown is not None:
        with _shown.saying(text):
            yield
        return
    with _line(text, None):
        yield


def bar(total: int, text: str) -> AbstractContextManager[Line]:
    """So many things, of which the line tells how many are done."""
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
    """A tqdm bar that is drawn anew while nobody moves it, as a step that runs for a minute does not."""

    def __init__(self, text: str, total: int | None) -> None:
        self._text = text
        self._lock = threading.Lock()
        self._is_over = threading.Event()
        self._ticking: threading.Thread | None = None
        self._bar = _bar(text, total) if _is_wanted() else None
        if self._bar is not None:
            self._ticking = threading.Thread(target=self._tick, daemon=True)
            self._ticking.start()

    def advance(self, count: int = 1) -> None:
        """So many more are done."""
        with self._lock:
            if self._bar is not None:
                self._bar.update(count)

    @contextlib.contextmanager
    def saying(self, text: str) -> Iterator[None]:
        """Within it, a word more."""
        before, self._text = self._text, f"{self._text}, {text}"
        self._describe()
        try:
            yield
        finally:
            self._text = before
            self._describe()

    def close(self) -> None:
        """Off the terminal."""
        self._is_over.set()
        if self._ticking is not None:
            self._ticking.join()
        if self._bar is not None:
            self._bar.close()

    def _describe(self) -> None:
        with self._lock:
            if self._bar is not None:
                self._bar.set_description_str(self._text, refresh=False)

    def _tick(self) -> None:
        seconds = DELAY_SECONDS
        while not self._is_over.wait(seconds):
            self.advance(0)
            seconds = TICK_SECONDS


def _is_wanted() -> bool:
    """Asked before tqdm is, which starts a thread of its own for bars that are never shown too."""
    is_seen = sys.stderr is not None and (sys.stderr.isatty() or "ipykernel" in sys.modules)
    is_first = os.environ.get("RANK", "0") == "0" and threading.current_thread() is threading.main_thread()
    return is_seen and is_first and not _silences


def _bar(text: str, total: int | None) -> Any:
    from tqdm.auto import tqdm

    return tqdm(
        total=total,
        desc=text,
        leave=False,
        file=sys.stderr,
        delay=DELAY_SECONDS,
        miniters=0,
        mininterval=0,
        disable=None,  # where standard error is no terminal; a notebook has its own
        bar_format=TASK_FORMAT if total is None else BAR_FORMAT,
    )
