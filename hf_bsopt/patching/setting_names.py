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

Setting = Literal["batch_size", "gradient_accumulation_steps", "learning_rate", "warmup_steps", "max_length"]
SETTINGS: tuple[Setting, ...] = get_args(Setting)
ACCUMULATION: Setting = "gradient_accumulation_steps"

TRANSFORMERS_BATCH_SIZES = frozenset({"per_device_train_batch_size", "per_gpu_train_batch_size"})
"""Where one of these stands, transformers reads `gradient_accumulation_steps` beside it."""


@functools.cache
def _table() -> dict[str, Any]:
    return cast(
        dict[str, Any], json.loads(resources.files("hf_bsopt").joinpath("data/patch_names.json").read_text("utf-8"))
    )


@functools.cache
def word_list(kind: Literal["evaluation", "debugging", "settings", "mappings"]) -> frozenset[str]:
    """Words in names that say evaluation or debugging; the last words of what holds settings (TrainingArguments,
    SFTConfig, Accelerator); the calls that hold what they are given (dict, SimpleNamespace).
    """
    return frozenset(_table()[kind])


@functools.cache
def known_names(setting: Setting) -> tuple[frozenset[str], ...]:
    """From the most to the least particular: where one container has several, the first row wins."""
    return tuple(frozenset(row) for row in _table()["names"][setting])


@functools.cache
def split_words(name: str) -> tuple[str, ...]:
    """("train", "batch", "size") for "trainBatchSize" and for "--train-batch-size"."""
    apart = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name)
    return tuple(word for word in re.split(r"[^0-9a-z]+", apart.lower()) if word)


def snake_case(name: str) -> str:
    return "_".join(split_words(name))


def specificity_rank(setting: Setting, name: str) -> int | None:
    """How particular a name is about a setting, 0 the most; None where it has another."""
    word = snake_case(name)
    return next((row for row, known in enumerate(known_names(setting)) if word in known), None)


def mentions(kind: Literal["evaluation", "debugging"], name: str) -> bool:
    """Is one of its words in the list? A name that says "train" as well speaks of training."""
    said = split_words(name)
    return "train" not in said and not word_list(kind).isdisjoint(said)


def parse_keys(given: Iterable[str]) -> dict[str, str]:
    """What --key means: `micro_bs` (the batch size is called that) or `gradient_accumulation_steps=CFG.every`.

    Raises UsageError for a setting that there isn't, and for an empty name.
    """
    keys: dict[str, str] = {}
    for item in given:
        setting, equals, name = item.partition("=")
        if not equals:
            setting, name = "batch_size", item
        as_setting(setting.strip())
        if not name.strip():
            raise UsageError(f"--key {item!r} names nothing; for example --key batch_size=CONFIG.train_bs")
        keys[setting.strip()] = name.strip()
    return keys


def as_setting(setting: str) -> Setting:
    """The same word, known to be one. Raises UsageError with the nearest."""
    for known in SETTINGS:
        if setting == known:
            return known
    near = difflib.get_close_matches(setting, SETTINGS, n=1, cutoff=0.0)[0]
    raise UsageError(f"there is no value called {setting!r} to patch; did you mean {near}? All: {', '.join(SETTINGS)}")


def check_values(values: Mapping[str, object]) -> dict[Setting, int | float]:
    """The values, in the order of SETTINGS. Raises UsageError for one that no training could have."""
    if not values:
        raise UsageError("there are no values to patch; for example {'batch_size': 48}")
    named = {as_setting(name): value for name, value in values.items()}
    checked: dict[Setting, int | float] = {}
    for setting in SETTINGS:
        if setting not in named:
            continue
        value = named[setting]
        is_rate = setting == "learning_rate"
        least = 0 if setting == "warmup_steps" else 1
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise UsageError(f"{setting} is a number, not {value!r}")
        if is_rate and value <= 0:
            raise UsageError(f"learning_rate is above 0, not {value}")
        if not is_rate and (value != int(value) or value < least):
            raise UsageError(f"{setting} is a whole number from {least} on, not {value}")
        checked[setting] = float(value) if is_rate else int(value)
    return checked
