"""Checks of what the user asked for: a value from a list of choices, an optional package that is installed."""

from __future__ import annotations

import difflib
import importlib.util

from .._utils.field_types import in_short
from ..errors import MissingExtraError, UsageError


def check_choice(option: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise UsageError, with the nearest choice, unless the value is one of the choices."""
    if value not in choices:
        near = difflib.get_close_matches(value, choices, n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UsageError(f"{option} {in_short(value)} is not one of {', '.join(choices)}{hint}")


def require_package(package: str, feature: str) -> None:
    """Raise MissingExtraError, with the command that installs it, unless the package that a feature needs is there."""
    if importlib.util.find_spec(package) is None:
        raise MissingExtraError(f"{feature} needs {package}: pip install {package}")
