"""Pickle objects for another process, with dill if it is installed: it can pickle classes defined in a notebook."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import io
import pickle
from typing import Any

CREATED_WITH_THE_CLASS = ("__dict__", "__weakref__", "_backward_cls", "_autograd_function_id")


def pickled(value: object) -> bytes:
    """Return ``value`` pickled. Raise whatever its classes raise if they cannot be pickled."""
    out = io.BytesIO()
    if _module().__name__ == "dill":
        _dill_pickler()(out, recurse=True).dump(value)  # recurse: with the globals that the script's functions use
    else:
        pickle.dump(value, out)
    return out.getvalue()


def unpickled(data: bytes) -> Any:
    """Return the object that :func:`pickled` serialized."""
    return _module().loads(data)


@functools.cache
def _dill_pickler() -> Any:
    """Return dill's Pickler, extended to autograd functions defined in a script.

    Each such class refers to a backward class that refers back to it, and dill would pickle that one by name only.
    """
    dill = importlib.import_module("dill")
    import torch

    class Pickler(dill.Pickler):  # type: ignore[misc, name-defined]
        def reducer_override(self, value: Any) -> Any:
            is_function = isinstance(value, type) and issubclass(value, torch.autograd.Function)
            if not is_function or value.__module__ != "__main__":
                return NotImplemented
            body = {name: part for name, part in vars(value).items() if name not in CREATED_WITH_THE_CLASS}
            return type(value), (value.__name__, value.__bases__, body)

    return Pickler


def _module() -> Any:
    """Return dill if it is installed, else pickle. Both processes share an environment and choose the same."""
    return importlib.import_module("dill" if importlib.util.find_spec("dill") else "pickle")
