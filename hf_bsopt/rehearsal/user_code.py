"""Where in the user's own code the program is: the line that a traceback should have begun with."""

from __future__ import annotations

import linecache
import os
import site
import sys
import sysconfig
import threading
import traceback
from pathlib import Path
from types import TracebackType

from .outcome import Place

Frame = traceback.FrameSummary


class UserCode:
    """Knows the script's own files from those that are installed."""

    def __init__(self, script: Path) -> None:
        self._script = str(script)
        self._folder = str(script.resolve().parent)
        paths = sysconfig.get_paths()
        installed = [paths["stdlib"], paths["platstdlib"], paths["purelib"], paths["platlib"]]
        self._installed = (*installed, *site.getsitepackages(), str(Path(__file__).resolve().parents[1]))

    def place_now(self) -> Place | None:
        """Of the main thread, from whichever thread this is called."""
        frame = sys._current_frames().get(threading.main_thread().ident or 0)
        return self._place(list(traceback.extract_stack(frame)) if frame else [])

    def place_of(self, trace: TracebackType | None) -> Place | None:
        return self._place(list(traceback.extract_tb(trace)))

    def _place(self, frames: list[Frame]) -> Place | None:
        own = [index for index, frame in enumerate(frames) if self._is_own(frame)]
        if not own:
            return None
        below = [frame for frame in frames[own[-1] + 1 :] if self._tells_something(frame)]
        return Place(_shown(frames[own[-1]]), _shown(below[-1], with_line=False) if below else "")

    def _is_own(self, frame: Frame) -> bool:
        if frame.filename == self._script:
            return True
        if frame.filename.startswith("<"):  # made by a library as it runs
            return False
        path = str(Path(frame.filename).resolve())
        return not path.startswith(self._installed) and path.startswith(self._folder + os.sep)

    def _tells_something(self, frame: Frame) -> bool:
        return "/torch/" not in frame.filename and "hf_bsopt" not in frame.filename and "<" not in frame.filename


def _shown(frame: Frame, *, with_line: bool = True) -> str:
    where = f"{Path(frame.filename).name}, line {frame.lineno}, in {frame.name}"
    line = linecache.getline(frame.filename, frame.lineno or 0).strip() if with_line else ""
    return f"{where}: {line}" if line else where
