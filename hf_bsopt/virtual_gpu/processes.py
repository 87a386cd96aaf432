"""Helpers for child processes: their environment, their end, and checks of the virtual device."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..errors import RehearsalError

PR_SET_PDEATHSIG = 1
PACKAGE_PARENT = Path(__file__).resolve().parents[2]


def with_package(environment: Mapping[str, str], extra_paths: Sequence[str] = ()) -> dict[str, str]:
    """Return ``environment`` with this package on PYTHONPATH, installed or not; ``extra_paths`` come last. Empty
    entries, which Python takes for the working folder, are left out.
    """
    paths = [str(PACKAGE_PARENT), *environment.get("PYTHONPATH", "").split(os.pathsep), *extra_paths]
    return {**environment, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}


def end_with_parent(parent: int | None = None) -> None:
    """Have the kernel kill this process when its parent ends, for whatever reason. Only Linux can do that.

    ``parent``: the parent's process number; if it has ended before this call, this process ends now.
    """
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if parent is not None and os.getppid() != parent:
            os._exit(1)


def check_device() -> None:
    """Raise RehearsalError if the virtual device was not loaded into this process."""
    if not hasattr(ctypes.CDLL(None), "virtual_device_refused"):
        raise RehearsalError("the virtual device was not loaded: LD_PRELOAD has no effect in this environment")


def refused_calls() -> list[str]:
    """Return the names of the called functions that the virtual device does not implement."""
    names = ctypes.CDLL(None).virtual_device_refused
    names.restype = ctypes.c_char_p
    return names().decode().split()
