"""Check and convert the values of options: their types and ranges."""

from __future__ import annotations

import dataclasses
import math
import typing
from typing import Any

from ..errors import InvalidOptionError
from ..records import GpuSpec
from .field_types import in_short, is_of_type, type_in_words, union_members


def validate(options: Any) -> None:
    """Raise InvalidOptionError for a field whose value is not of its type or range.

    Lists are taken as tuples, a string as a list of names separated by commas, whole numbers as floats, numpy's numbers
    as Python's, and PyTorch's dtypes and optimizer classes as their names.
    """
    hints = typing.get_type_hints(type(options))
    for entry in dataclasses.fields(options):
        value = _normalized(getattr(options, entry.name), hints[entry.name])
        object.__setattr__(options, entry.name, value)
        if not is_of_type(value, hints[entry.name]):
            raise InvalidOptionError(entry.name, f"is {type_in_words(hints[entry.name])}, not {in_short(value)}")
        if value is None or isinstance(value, (bool, str, tuple, GpuSpec)):
            continue
        at_least, above, at_most = (entry.metadata[bound] for bound in ("at_least", "above", "at_most"))
        if at_least is not None and not value >= at_least:
            raise InvalidOptionError(entry.name, f"is at least {at_least}, not {in_short(value)}")
        if above is not None and not above < value < math.inf:
            raise InvalidOptionError(entry.name, f"is above {above}, not {in_short(value)}")
        if value > at_most:
            raise InvalidOptionError(entry.name, f"is at most {at_most:,}, not {in_short(value)}")


def _normalized(value: Any, hint: Any) -> Any:
    kinds = union_members(hint)
    if any(typing.get_origin(kind) is tuple for kind in kinds):
        if isinstance(value, list):
            value = tuple(value)
        if tuple[str, ...] in kinds and isinstance(value, (str, tuple)):
            names = (value,) if isinstance(value, str) else value
            if all(isinstance(name, str) for name in names):
                return tuple(part.strip() for name in names for part in name.split(",") if part.strip()) or None
        return value
    module, kind = type(value).__module__, type(value).__name__
    if str in kinds and (module, kind) == ("torch", "dtype"):
        return str(value).removeprefix("torch.")
    if str in kinds and isinstance(value, type) and value.__module__.startswith("torch.optim"):
        return f"torch.optim.{value.__name__}"
    if (int in kinds or float in kinds) and module == "numpy" and getattr(value, "shape", None) == ():
        return value.item()
    return value
