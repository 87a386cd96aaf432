"""Objects handed to another process: with dill where it is installed, which takes classes of a notebook along."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import io
import pickle
from typing import Any

MADE_FOR_EACH_CLASS = ("__dict__", "__weakref__", "_backward_cls", "_autograd_function_id")


def pickled(value: object) -> bytes:
    """Raises whatever the object's classes raise where they can't be pickled."""
    out = io.BytesIO()
    if _module().__name__ == "dill":
        _dill_pickler()(out, recurse=True).dump(value)  # with the names of a script that its functions and classes use
    else:
        pickle.dump(value, out)
    return out.getvalue()


def unpickled(data: bytes) -> Any:
    return _module().loads(data)


@functools.cache
def _dill_pickler() -> Any:
    """Dill's, for a script's own autograd functions too: each of these classes holds one that holds it again, which
    dill takes for a class that is found by its name.
    """
    dill = importlib.import_module("dill")
    import torch

    class Pickler(dill.Pickler):  # type: ignore[misc, name-defined]
        def reducer_override(self, value: Any) -> Any:
            is_function = isinstance(value, type) and issubclass(value, torch.autograd.Function)
            if not is_function or value.__module__ != "__main__":
                return NotImplemented
            body = {name: part for name, part in vars(value).items() if name not in MADE_FOR_EACH_CLASS}
            return type(value), (value.__name__, value.__bases__, body)

    return Pickler


def _module() -> Any:
    """Both processes run in the same environment, so that they choose the same."""
    return importlib.import_module("dill" if importlib.util.find_spec("dill") else "pickle")
