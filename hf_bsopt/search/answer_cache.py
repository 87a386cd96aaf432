"""A cache of measured answers on disk, so that a search need not be repeated on the same GPU.

    cache = AnswerCache(default_folder())
    key = {"workload": workload.values(), "device": gpu.name, "free": band(free, total), "torch": torch.__version__}
    if (cached := cache.load(key)) is None:
        cache.save(key, verification.trials, verification.batch_size, verification.is_settled)

There is one JSON file per answer. Everything that decides an answer is in its key. A file that cannot be restored to
exactly what was saved is ignored. A cache that cannot be read or written never makes a search fail: it is logged, and
the search runs as without a cache.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import types
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from .._utils.cache_folder import user_cache_folder
from .._utils.files import read_text, write_atomically
from ..errors import UsageError
from ..records import Trial

FORMAT = 2
"""Incremented when older files would be misread. Added or removed fields are detected without it."""
BANDS = 50
"""Bands of free memory: each is 2 % of the device."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CachedAnswer:
    """An answer of an earlier run, with the fields of `verify.Verification`.

    kept_on: the day on which it was saved, in UTC, such as 2026-03-31.
    """

    batch_size: int
    trials: tuple[Trial, ...]
    is_settled: bool
    kept_on: str


@dataclass(frozen=True)
class AnswerCache:
    """The cached answers in a folder, which is created when the first one is saved.

    A key is a mapping of JSON values: the workload, the device, the driver, versions, the band of free memory. Two keys
    are equal if their JSON is, in any order.
    """

    folder: Path

    def load(self, key: Mapping[str, Any]) -> CachedAnswer | None:
        """Return the answer saved for exactly this key, None if there is none or its file is not valid."""
        question = _canonical(key)
        path = self._path(question)
        try:
            return _parse(read_text(path, follows_links=False), question)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, RecursionError) as error:
            logger.info("the answer in %s is ignored: %s", path, error)
            return None

    def save(self, key: Mapping[str, Any], trials: tuple[Trial, ...], batch_size: int, is_settled: bool) -> None:
        """Save the answer, in place of an earlier one for this key. If two processes do so at once, the last wins."""
        question = _canonical(key)
        path = self._path(question)
        answer = CachedAnswer(batch_size, trials, is_settled, datetime.now(UTC).date().isoformat())
        content: dict[str, Any] = {"format": FORMAT, "key": json.loads(question), "answer": dataclasses.asdict(answer)}
        content["checksum"] = checksum(content)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(path, json.dumps(content, indent=1) + "\n", follows_links=False)
        except (OSError, UsageError) as error:
            logger.info("the answer is not cached for the next run: %s", error)

    def _path(self, question: str) -> Path:
        return self.folder / f"{hashlib.sha256(question.encode()).hexdigest()[:32]}.json"


def default_folder() -> Path:
    """Return the folder of cached answers: under HF_BSOPT_CACHE if it is set, else in the user's cache."""
    return user_cache_folder("answers")


def band(free_bytes: int, total_bytes: int, /) -> int:
    """Return free memory in fiftieths of the device, rounded down: 0 if nothing is free, 50 if all of it is.

    It is part of an answer's key. Free memory varies by some MiB from run to run (a desktop, the driver), so the exact
    number would never match twice; in bands of 2 % it mostly does. A cached answer can thus come from a run with up to
    2 % of the device more, for which the upper end of the target (90 %) leaves room. At the edge of a band a small
    change is still a miss, which costs as much as a run without a cache.
    """
    return free_bytes * BANDS // total_bytes


def _canonical(key: Mapping[str, Any]) -> str:
    return json.dumps(dict(key), sort_keys=True, separators=(",", ":"))


def _parse(text: str, question: str) -> CachedAnswer:
    """Parse a file. Raises ValueError unless it is what :meth:`AnswerCache.save` writes for this question."""
    content = json.loads(text)
    if not isinstance(content, dict) or content.keys() != {"format", "key", "answer", "checksum"}:
        raise ValueError("it is not a cached answer")
    if content.pop("checksum") != checksum(content):
        raise ValueError("it is not as it was written: its checksum differs")
    if _restored(int, content["format"]) != FORMAT:
        raise ValueError(f"its format is {content['format']!r}, not {FORMAT}")
    if not isinstance(content["key"], dict) or _canonical(content["key"]) != question:
        raise ValueError("it answers another question")
    answer: CachedAnswer = _restored(CachedAnswer, content["answer"])
    date.fromisoformat(answer.kept_on)
    sizes = [trial.batch_size for trial in answer.trials]
    if min(sizes, default=1) < 1 or not 0 <= answer.batch_size <= max(sizes, default=0):
        raise ValueError(f"a batch size of {answer.batch_size} does not follow from the sizes that were run")
    return answer


def checksum(content: Mapping[str, Any]) -> str:
    """Return the checksum of a file's other values."""
    return hashlib.sha256(_canonical(content).encode()).hexdigest()


def _restored(kind: Any, value: Any) -> Any:
    """Return a value of the type ``kind`` from its JSON form. Raises ValueError if ``value`` is not exactly one."""
    options = get_args(kind)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        hints = get_type_hints(kind)
        names = {field.name for field in dataclasses.fields(kind)}
        if isinstance(value, dict) and value.keys() == names:
            return kind(**{name: _restored(hints[name], part) for name, part in value.items()})
    elif get_origin(kind) is tuple:
        if isinstance(value, list) and options[1:] == (...,):
            return tuple(_restored(options[0], part) for part in value)
    elif get_origin(kind) in (Union, types.UnionType):
        return _restored_as_one_of(options, value)
    elif get_origin(kind) is Literal:
        if isinstance(value, str) and value in options:
            return value
    elif type(value) is kind or (kind is float and type(value) is int):
        return value
    raise ValueError(f"expected {kind}, got {value!r:.60}")


def _restored_as_one_of(kinds: tuple[Any, ...], value: Any) -> Any:
    problems = []
    for kind in kinds:
        try:
            return _restored(kind, value)
        except ValueError as error:
            problems.append(str(error))
    raise ValueError(problems[0])
