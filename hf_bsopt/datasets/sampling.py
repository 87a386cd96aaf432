"""Draw a sample of a dataset (files, a saved dataset or a name on the hub) and count the tokens of each row."""

from __future__ import annotations

import contextlib
import logging
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._utils import progress
from .._utils.files import is_folder, is_there
from ..errors import UsageError
from ..workloads.model_config import is_hub_reachable
from .lengths import Lengths

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

SAMPLE = 10_000
"""Most rows that are tokenized: the 99th percentile then rests on the hundred longest."""
SEED = 0
CHUNK = 500
"""Rows that are tokenized at once."""
BUILDERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".csv": ("csv", {}),
    ".tsv": ("csv", {"sep": "\t"}),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".ndjson": ("json", {}),
    ".txt": ("text", {}),
    ".parquet": ("parquet", {}),
}
NO_ROWS_ERRORS = ("StopIteration", "corresponds to no data", "at least one example", "No columns to parse")
"""Parts of the error messages of the datasets library for a dataset without rows."""
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "spiece.model")


@dataclass(frozen=True)
class Sample:
    """The lengths of the rows that were drawn. source: name of the dataset. rows: rows of the whole dataset."""

    source: str
    rows: int
    tokenizer: str
    lengths: Lengths


def draw_sample(
    dataset: Sequence[str],
    tokenizer: str,
    *,
    text_columns: Sequence[str] = ("text",),
    split: str = "train",
    max_rows: int = SAMPLE,
) -> Sample:
    """Draw at most ``max_rows`` rows at random and tokenize them without truncation.

    It uses a generator of its own with a fixed seed: the sample is the same each time, the global state is unchanged.

    ``dataset``: files (csv, tsv, json, jsonl, txt, parquet), one folder that ``save_to_disk`` wrote, or one name on the
    hub. ``text_columns``: one, or two for pairs of sequences; a list of words is joined with blanks.
    ``tokenizer``: a folder, a tokenizer.json or a hub id. Raises UsageError if the dataset, a column or the
    tokenizer cannot be loaded.
    """
    if max_rows < 1:
        raise UsageError(f"a sample has at least 1 row, not {max_rows}")
    if not 1 <= len(text_columns) <= 2:
        raise UsageError("a sequence has one text column, or two for a pair")
    made = load_tokenizer(tokenizer)
    rows = load_rows(dataset, split)
    missing = [column for column in text_columns if column not in rows.column_names]
    if missing:
        raise UsageError(f"there is no column {missing[0]!r}; --text_column is one of {', '.join(rows.column_names)}")
    chosen = rows
    if len(rows) > max_rows:
        chosen = rows.select(sorted(random.Random(SEED).sample(range(len(rows)), max_rows)))
    source = ", ".join(Path(name).name if Path(name).exists() else name for name in dataset)
    return Sample(source, len(rows), tokenizer, Lengths(_counts(chosen, text_columns, made)))


def _counts(rows: Dataset, columns: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[int]:
    """Yield the number of tokens of each row, special tokens included."""
    with progress.bar(len(rows), "tokenizing") as line:
        for start in range(0, len(rows), CHUNK):
            chunk = rows[start : start + CHUNK]
            texts = [[_text(value, column) for value in chunk[column]] for column in columns]
            for tokens in tokenizer(*texts, truncation=False, padding=False)["input_ids"]:
                yield len(tokens)
            line.advance(len(texts[0]))


def _text(value: Any, column: str) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, (list, tuple)) and all(isinstance(word, str) for word in value):
        return " ".join(value)
    raise UsageError(
        f"column {column!r} contains {type(value).__name__}: --text_column must name one with text or words"
    )


def load_rows(dataset: Sequence[str], split: str) -> Dataset:
    """Load the rows of one split. Raises UsageError if they cannot be loaded."""
    if not dataset:
        raise UsageError("no dataset was given: name one, for example --dataset train.jsonl")
    try:
        rows = _loaded(dataset, split)
    except UsageError:
        raise
    except Exception as error:  # parsers, builders and the hub's client raise errors of many types
        reason = str(error.__cause__ or error).strip().splitlines() or [type(error.__cause__ or error).__name__]
        if any(word in reason[0] for word in NO_ROWS_ERRORS):
            raise UsageError(f"{', '.join(dataset)} has no rows") from error
        raise UsageError(f"{', '.join(dataset)} cannot be read as a dataset: {reason[0]}") from error
    if not len(rows):
        raise UsageError(f"{', '.join(dataset)} has no rows")
    return rows


def _loaded(dataset: Sequence[str], split: str) -> Dataset:
    import datasets

    paths = [Path(name) for name in dataset]
    with _quietly():
        if len(paths) == 1 and paths[0].is_dir():
            return _of_split(datasets.load_from_disk(str(paths[0])), split)
        if all(path.is_file() for path in paths):
            builder, options = _builder(paths)
            files = [str(path.resolve()) for path in paths]
            return datasets.load_dataset(builder, data_files=files, split="train", **options)
        if len(paths) > 1 or paths[0].suffix in BUILDERS:
            missing = next(path for path in paths if not path.is_file())
            raise UsageError(f"there is no file {missing}")
        if not is_hub_reachable():
            raise UsageError(f"{dataset[0]} is not a file or folder here, and the hub does not answer")
        return datasets.load_dataset(dataset[0], split=split)


def _builder(paths: Sequence[Path]) -> tuple[str, dict[str, Any]]:
    suffixes = {path.suffix.lower() for path in paths}
    if len(suffixes) > 1:
        raise UsageError(f"the files of a dataset must have the same format, not {', '.join(sorted(suffixes))}")
    suffix = suffixes.pop()
    if suffix not in BUILDERS:
        raise UsageError(f"{paths[0].name} has an unknown format: the suffix must be one of {', '.join(BUILDERS)}")
    return BUILDERS[suffix]


def _of_split(loaded: Any, split: str) -> Dataset:
    if not hasattr(loaded, "keys"):
        return loaded
    if split not in loaded:
        raise UsageError(f"there is no split {split!r}; --split is one of {', '.join(loaded)}")
    return loaded[split]


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Silence the progress bars of datasets, as :mod:`progress` shows one, and its logs, as errors are raised."""
    from datasets.utils import logging as its_logging

    was_on, level = its_logging.is_progress_bar_enabled(), its_logging.get_verbosity()
    its_logging.disable_progress_bar()
    its_logging.set_verbosity(logging.CRITICAL)
    try:
        with progress.task("loading the dataset"):
            yield
    finally:
        its_logging.set_verbosity(level)
        if was_on:
            its_logging.enable_progress_bar()


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Load a tokenizer from a folder, a tokenizer.json, or the hub and its cache. Raises UsageError if that fails."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    path = Path(name)
    if is_folder(name) and not any((path / file).is_file() for file in TOKENIZER_FILES):
        raise UsageError(
            f"there is no tokenizer in {name}; --tokenizer names the folder that tokenizer.save_pretrained wrote, or a "
            f"tokenizer.json"
        )
    try:
        with progress.task(f"loading the tokenizer {name}"):
            if path.is_file():  # raises for a name that no file can have
                return PreTrainedTokenizerFast(tokenizer_file=name)
            offline = path.is_dir() or not is_hub_reachable()
            return AutoTokenizer.from_pretrained(name, local_files_only=offline)
    except Exception as error:  # tokenizers raise errors of many types
        if is_there(name):
            raise UsageError(f"the tokenizer in {name} cannot be loaded: {error}") from error
        raise UsageError(
            f"the tokenizer of {name} is not in the hub's cache, and the hub cannot be reached; without it, tokens "
            f"cannot be counted; --tokenizer names a folder with one, or a tokenizer.json"
        ) from error
