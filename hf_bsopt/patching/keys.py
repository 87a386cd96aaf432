"""What a name means: `per_device_train_batch_size`, `TRAIN_BS` and `micro_batch_size` are all the batch size.

Names are compared as words: `trainBatchSize`, `TRAIN_BATCH_SIZE`, `--train-batch-size` are one. Only whole names in
data/patch_names.json count: `eval_batch_size` and `gradient_accumulation_kwargs` are never taken for what they contain.
"""

from __future__ import annotations

import difflib
import functools
import json
import math
import re
from collections.abc import Iterable, Mapping
from importlib import resources
from typing import Any, Literal, cast, get_args

from ..errors import UsageError

Meaning = Literal["batch_size", "gradient_accumulation_steps", "learning_rate", "warmup_steps", "max_length"]
MEANINGS: tuple[Meaning, ...] = get_args(Meaning)
ACCUMULATION: Meaning = "gradient_accumulation_steps"

TRANSFORMERS = frozenset({"per_device_train_batch_size", "per_gpu_train_batch_size"})
"""Where one of these stands, transformers reads `gradient_accumulation_steps` beside it."""


@functools.cache
def _table() -> dict[str, Any]:
    return cast(
        dict[str, Any], json.loads(resources.files("hf_bsopt").joinpath("data/patch_names.json").read_text("utf-8"))
    )


@functools.cache
def vocabulary(about: Literal["evaluation", "debugging", "settings", "mappings"]) -> frozenset[str]:
    """Words in names that say evaluation or debugging; the last words of what holds settings (TrainingArguments,
    SFTConfig, Accelerator); the calls that hold what they are given (dict, SimpleNamespace).
    """
    return frozenset(_table()[about])


@functools.cache
def names(meaning: Meaning) -> tuple[frozenset[str], ...]:
    """From the most to the least particular: where one container has several, the first row wins."""
    return tuple(frozenset(row) for row in _table()["names"][meaning])


@functools.cache
def words(name: str) -> tuple[str, ...]:
    """("train", "batch", "size") for "trainBatchSize" and for "--train-batch-size"."""
    apart = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name)
    return tuple(word for word in re.split(r"[^0-9a-z]+", apart.lower()) if word)


def spelled(name: str) -> str:
    return "_".join(words(name))


def rank(meaning: Meaning, name: str) -> int | None:
    """How particular a name is about a meaning, 0 the most; None where it has another."""
    word = spelled(name)
    return next((row for row, known in enumerate(names(meaning)) if word in known), None)


def speaks_of(about: Literal["evaluation", "debugging"], name: str) -> bool:
    """Is one of its words in the vocabulary? A name that says "train" as well speaks of training."""
    said = words(name)
    return "train" not in said and not vocabulary(about).isdisjoint(said)


def parse_keys(given: Iterable[str]) -> dict[str, str]:
    """What --key means: `micro_bs` (the batch size is called that) or `gradient_accumulation_steps=CFG.every`.

    Raises UsageError for a meaning that there isn't, and for an empty name.
    """
    keys: dict[str, str] = {}
    for item in given:
        meaning, equals, name = item.partition("=")
        if not equals:
            meaning, name = "batch_size", item
        check_meaning(meaning.strip())
        if not name.strip():
            raise UsageError(f"--key {item!r} names nothing; for example --key batch_size=CONFIG.train_bs")
        keys[meaning.strip()] = name.strip()
    return keys


def check_meaning(meaning: str) -> Meaning:
    """The same word, known to be one. Raises UsageError with the nearest."""
    for known in MEANINGS:
        if meaning == known:
            return known
    near = difflib.get_close_matches(meaning, MEANINGS, n=1, cutoff=0.0)[0]
    raise UsageError(f"there is no value called {meaning!r} to patch; did you mean {near}? All: {', '.join(MEANINGS)}")


def check_values(values: Mapping[str, object]) -> dict[Meaning, int | float]:
    """The values, in the order of MEANINGS. Raises UsageError for one that no training could have."""
    if not values:
        raise UsageError("there are no values to patch; for example {'batch_size': 48}")
    named = {check_meaning(name): value for name, value in values.items()}
    checked: dict[Meaning, int | float] = {}
    for meaning in MEANINGS:
        if meaning not in named:
            continue
        value = named[meaning]
        is_rate = meaning == "learning_rate"
        least = 0 if meaning == "warmup_steps" else 1
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise UsageError(f"{meaning} is a number, not {value!r}")
        if is_rate and value <= 0:
            raise UsageError(f"learning_rate is above 0, not {value}")
        if not is_rate and (value != int(value) or value < least):
            raise UsageError(f"{meaning} is a whole number from {least} on, not {value}")
        checked[meaning] = float(value) if is_rate else int(value)
    return checked
