"""Names that scripts give to a setting: `per_device_train_batch_size`, `TRAIN_BS` and `micro_batch_size` are all the
batch size.

Names are compared word by word: `trainBatchSize`, `TRAIN_BATCH_SIZE` and `--train-batch-size` are the same name. Only
whole names from data/patch_names.json match: `eval_batch_size` and `gradient_accumulation_kwargs` do not match because
of the name that they contain.
"""

from __future__ import annotations

import difflib
import functools
import json
import re
from collections.abc import Iterable, Mapping
from importlib import resources
from typing import Any, Literal, cast, get_args

from ..errors import UsageError

Setting = Literal["batch_size", "gradient_accumulation_steps", "learning_rate", "warmup_steps", "max_length"]
SETTINGS: tuple[Setting, ...] = get_args(Setting)
ACCUMULATION: Setting = "gradient_accumulation_steps"

TRANSFORMERS_BATCH_SIZES = frozenset({"per_device_train_batch_size", "per_gpu_train_batch_size"})
"""Names read by transformers, which also reads `gradient_accumulation_steps` from the same place."""


@functools.cache
def _table() -> dict[str, Any]:
    return cast(
        dict[str, Any], json.loads(resources.files("hf_bsopt").joinpath("data/patch_names.json").read_text("utf-8"))
    )


@functools.cache
def word_list(kind: Literal["evaluation", "debugging", "settings", "mappings"]) -> frozenset[str]:
    """Return one of the word lists of data/patch_names.json.

    evaluation, debugging: words that mark a name as one for evaluation or debugging.
    settings: the last word of the name of a class that holds settings (TrainingArguments, SFTConfig, Accelerator).
    mappings: callables that store their keyword arguments (dict, SimpleNamespace).
    """
    return frozenset(_table()[kind])


@functools.cache
def known_names(setting: Setting) -> tuple[frozenset[str], ...]:
    """Return the names of a setting in rows, the most specific names first.

    If one container has names of several rows, the name of the first such row is the one to change.
    """
    return tuple(frozenset(map(snake_case, row)) for row in _table()["names"][setting])


@functools.cache
def split_words(name: str) -> tuple[str, ...]:
    """Split a name into lower-case words: ("train", "batch", "size") for "trainBatchSize" and "--train-batch-size"."""
    apart = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name)
    return tuple(word for word in re.split(r"[^0-9a-z]+", apart.lower()) if word)


def snake_case(name: str) -> str:
    return "_".join(split_words(name))


def specificity_rank(setting: Setting, name: str) -> int | None:
    """Return 0 for the most specific names of a setting, 1 and 2 for the less specific, None if it is not its name."""
    word = snake_case(name)
    return next((row for row, known in enumerate(known_names(setting)) if word in known), None)


def mentions(kind: Literal["evaluation", "debugging"], name: str) -> bool:
    """Return True if a word of the name is in the list. A name that contains "train" is one for training: False."""
    words = split_words(name)
    return "train" not in words and not word_list(kind).isdisjoint(words)


LARGEST_VALUE = 1 << 62


def parse_keys(given: Iterable[str]) -> dict[str, str]:
    """Parse the values of --key, and return the name for each setting.

    A value is NAME (the name of the batch size: `micro_bs`) or SETTING=NAME (`gradient_accumulation_steps=CFG.every`).
    Raises UsageError for an unknown setting and for an empty name.
    """
    keys: dict[str, str] = {}
    if not isinstance(given, Iterable) or isinstance(given, str):
        raise UsageError(f"the keys are a list of names, not {given!r:.80}")
    for item in given:
        if not isinstance(item, str):
            raise UsageError(f"--key {item!r:.80} is not a name; for example --key batch_size=CONFIG.train_bs")
        setting, equals, name = item.partition("=")
        if not equals:
            setting, name = "batch_size", item
        as_setting(setting.strip())
        if not name.strip():
            raise UsageError(f"--key {item!r} contains no name; for example --key batch_size=CONFIG.train_bs")
        keys[setting.strip()] = name.strip()
    return keys


def as_setting(setting: str) -> Setting:
    """Return ``setting`` if it is one of SETTINGS. Raise UsageError with the nearest one if it is not."""
    for known in SETTINGS:
        if setting == known:
            return known
    near = difflib.get_close_matches(str(setting), SETTINGS, n=1, cutoff=0.0)[0]
    raise UsageError(
        f"{setting!r} is not a setting that can be patched; did you mean {near}? Valid: {', '.join(SETTINGS)}"
    )


def check_keys(keys: Mapping[str, str]) -> dict[Setting, str]:
    """Return the name for each setting. Raise UsageError for anything else than names."""
    if not isinstance(keys, Mapping):
        raise UsageError(f"keys is a mapping such as {{'batch_size': 'CONFIG.train_bs'}}, not {keys!r:.80}")
    wrong = [name for name in keys.values() if not isinstance(name, str)]
    if wrong:
        raise UsageError(f"a key is the name of a value in the file, such as 'CONFIG.train_bs', not {wrong[0]!r:.80}")
    return {as_setting(setting): name for setting, name in keys.items()}


def check_values(values: Mapping[str, object]) -> dict[Setting, int | float]:
    """Return the values in the order of SETTINGS. Raise UsageError for a value that no training run can have."""
    if values and not isinstance(values, Mapping):
        raise UsageError(f"the values to patch are a mapping such as {{'batch_size': 48}}, not {values!r:.80}")
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
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= LARGEST_VALUE:
            raise UsageError(f"{setting} must be a number, not {value!r:.80}")
        if is_rate and value <= 0:
            raise UsageError(f"learning_rate must be above 0, not {value}")
        if not is_rate and (value != int(value) or value < least):
            raise UsageError(f"{setting} must be an integer of at least {least}, not {value}")
        checked[setting] = float(value) if is_rate else int(value)
    return checked
