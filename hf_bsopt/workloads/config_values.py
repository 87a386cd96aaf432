"""Values of a configuration that no model can have: found before transformers builds anything from them."""

from __future__ import annotations

from typing import Any

from .._utils.field_types import in_short
from ..errors import UsageError

DEEPEST = 50
"""Levels of nested values; transformers copies them by recursion."""
LARGEST = 10**12
LAYERS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers")
LARGEST_OF = {"num_labels": 10**6, **dict.fromkeys(LAYERS, 10**4)}
"""transformers builds a name for each label and a module for each layer."""
LONGEST_ERROR = 240


def check_values(values: Any, where: str) -> None:
    """Raise UsageError, with the name of the field, for a number that is too large, a field with the name of a method,
    or values that are nested too deeply. ``where``: the file, for the message.
    """
    from transformers import PreTrainedConfig

    for name in values if isinstance(values, dict) else ():
        if callable(getattr(PreTrainedConfig, name, None)):
            raise UsageError(f"{where}: {name} is a method of every configuration, and cannot be a field: remove it")
    _check(values, "", where)


def _check(values: Any, name: str, where: str) -> None:
    """Walk through the values without recursion."""
    left = [(values, name, 0)]
    while left:
        value, name, depth = left.pop()
        if depth > DEEPEST:
            raise UsageError(f"{where}: {name[:40]}… is nested more than {DEEPEST} levels deep")
        if isinstance(value, dict):
            left += [(part, f"{name}.{key}" if name else str(key), depth + 1) for key, part in value.items()]
        elif isinstance(value, list):
            left += [(part, name, depth + 1) for part in value]
        elif isinstance(value, int):
            largest = LARGEST_OF.get(name.rsplit(".", 1)[-1], LARGEST)
            if value > largest:
                raise UsageError(f"{where}: {name} is {in_short(value)}, and no model has more than {largest:,}")


def in_one_line(error: BaseException) -> str:
    """Return the message of an error in one line, without its middle where it is long; its type if it has none."""
    text = " ".join(str(error).split()) or type(error).__name__
    half = LONGEST_ERROR // 2
    return text if len(text) <= LONGEST_ERROR else f"{text[:half]} … {text[-half:]}"
