"""Objects handed to another process: with dill where it is installed, which takes classes of a notebook along."""

from __future__ import annotations

import importlib
import importlib.util
import io
from typing import Any


def pickled(value: object) -> bytes:
    """Raises whatever the object's classes raise where they can't be pickled."""
    out = io.BytesIO()
    module = _module()
    if module.__name__ == "dill":
        module.dump(value, out, recurse=True)  # with the names of a script that its functions and classes use
    else:
        module.dump(value, out)
    return out.getvalue()


def unpickled(data: bytes) -> Any:
    return _module().loads(data)


def _module() -> Any:
    """Both processes run in the same environment, so that they choose the same."""
    return importlib.import_module("dill" if importlib.util.find_spec("dill") else "pickle")
