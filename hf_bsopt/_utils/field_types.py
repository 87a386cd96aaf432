"""Check the values of annotated fields, and put their types into words."""

from __future__ import annotations

import types
import typing
from typing import Any, Literal


def is_of_type(value: Any, hint: Any) -> bool:
    """Return whether a value is of an annotated type: a class, a Literal, a tuple, or a union of these."""
    return any(_is_one(value, kind) for kind in union_members(hint))


def _is_one(value: Any, kind: Any) -> bool:
    origin = typing.get_origin(kind)
    if origin is Literal:
        return value in typing.get_args(kind)
    if origin is tuple:
        parts = typing.get_args(kind)
        if not isinstance(value, tuple):
            return False
        if parts[-1] is Ellipsis:
            return all(_is_one(part, parts[0]) for part in value)
        return len(value) == len(parts) and all(map(_is_one, value, parts))
    if kind in (int, float):
        return not isinstance(value, bool) and isinstance(value, (int, float) if kind is float else int)
    return isinstance(value, kind)


def union_members(hint: Any) -> tuple[Any, ...]:
    """Return the members of a union, or the type itself."""
    return typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)


def type_in_words(hint: Any) -> str:
    """Return the words for an annotated type in an error message."""
    kinds = [kind for kind in union_members(hint) if kind is not type(None)]
    if typing.get_origin(kinds[0]) is Literal:
        return "one of " + ", ".join(typing.get_args(kinds[0]))
    words: dict[Any, str] = {
        int: "a whole number",
        float: "a number",
        bool: "True or False",
        str: "a string",
        tuple[float, float]: "two fractions of the memory, such as (0.8, 0.9)",
        tuple[str, ...]: "a list of names",
    }
    return " or ".join(words.get(kind) or f"a {kind.__name__}" for kind in kinds)


LONGEST_SHOWN = 60


def in_short(value: Any) -> str:
    """Return a value for an error message; a long one is cut, or its length given."""
    if isinstance(value, int) and abs(value) >= 10**18:  # beyond 4,300 digits Python refuses to print it
        return f"a number of {int(value.bit_length() * 0.30103) + 1} digits"
    if isinstance(value, type):
        return f"{value.__module__}.{value.__qualname__}"
    text = repr(value)
    first = text.splitlines()[0] if text else ""
    return first if len(first) <= LONGEST_SHOWN and first == text else f"{first[:LONGEST_SHOWN]}…"
