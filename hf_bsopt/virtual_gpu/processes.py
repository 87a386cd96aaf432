"""What a child process needs, and does for itself at its start."""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..errors import RehearsalError

PR_SET_PDEATHSIG = 1
PACKAGE_PARENT = Path(__file__).resolve().parents[2]


def with_package(environment: Mapping[str, str], extra_paths: Sequence[str] = ()) -> dict[str, str]:
    """The environment of a Python that imports this very package, installed or not; ``extra_paths`` come last."""
    paths = [str(PACKAGE_PARENT), environment.get("PYTHONPATH", ""), *extra_paths]
    return {**environment, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}


def end_with_parent() -> None:
    """The system ends this process when the one that started it is gone, however that went."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def check_device() -> None:
    """Raises RehearsalError where the virtual device was not loaded into this process."""
    if not hasattr(ctypes.CDLL(None), "virtual_device_refused"):
        raise RehearsalError("the virtual device was not loaded: LD_PRELOAD has no effect in this environment")


def refused_calls() -> list[str]:
    """The functions that the device was asked for and does not know."""
    names = ctypes.CDLL(None).virtual_device_refused
    names.restype = ctypes.c_char_p
    return names().decode().split()
