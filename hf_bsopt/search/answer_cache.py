"""Measured answers, kept between runs: what was run once on this card need not be run again.

    cache = AnswerCache(default_folder())
    key = {"workload": workload.values(), "device": gpu.name, "free": band(free, total), "torch": torch.__version__}
    if (known := cache.recall(key)) is None:
        cache.keep(key, proof.trials, proof.batch_size, proof.is_settled)

One JSON file an answer. Whatever decides the answer is in its key; what can't be read as exactly what was kept is no
answer. Nothing here makes a search fail: a cache that can't be read or written is as good as none, and says so in the
log.
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
from .._utils.files import write_atomically
from ..errors import UsageError
from ..records import Trial

FORMAT = 1
"""Changes when a file of an older one would be misread; a field more or less is noticed without."""
BANDS = 50

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recalled:
    """An answer of an earlier run, as `search.Proof` has it. kept_on: the day, in UTC, as 2026-03-31."""

    batch_size: int
    trials: tuple[Trial, ...]
    is_settled: bool
    kept_on: str


@dataclass(frozen=True)
class AnswerCache:
    """The answers in a folder, which is made when the first one is kept.

    A key is a mapping of JSON values: the workload, the device, the driver, versions, the band of free memory. Two keys
    are the same when their JSON is, in whatever order.
    """

    folder: Path

    def recall(self, key: Mapping[str, Any]) -> Recalled | None:
        """The answer that was kept for exactly this key, None where there is none that can be relied on."""
        question = _canonical(key)
        path = self._path(question)
        try:
            return _read(path.read_text(encoding="utf-8"), question)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, RecursionError) as error:
            logger.info("the answer in %s is ignored: %s", path, error)
            return None

    def keep(self, key: Mapping[str, Any], trials: tuple[Trial, ...], batch_size: int, is_settled: bool) -> None:
        """Replaces what was kept for this key. Of two processes that do so at once, the last one wins."""
        question = _canonical(key)
        path = self._path(question)
        answer = Recalled(batch_size, trials, is_settled, datetime.now(UTC).date().isoformat())
        content = {"format": FORMAT, "key": json.loads(question), "answer": dataclasses.asdict(answer)}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(path, json.dumps(content, indent=1) + "\n")
        except (OSError, UsageError) as error:
            logger.info("the answer is not kept for the next run: %s", error)

    def _path(self, question: str) -> Path:
        return self.folder / f"{hashlib.sha256(question.encode()).hexdigest()[:32]}.json"


def default_folder() -> Path:
    """Where answers are kept: under HF_BSOPT_CACHE if it is set, else in the user's cache."""
    return user_cache_folder("answers")


def band(free_bytes: int, total_bytes: int, /) -> int:
    """Which fiftieth of the device is reached by what is free on it: 0 for nothing, 50 for all of it.

    For the key of an answer. What is free differs by some MiB from run to run (a desktop, the driver), and would never
    be the same number twice; in bands of 2 % it mostly is. An answer can thus come from a run that had up to 2 % of the
    device more, which the target's upper end (90 %) has room for. At the edge of a band a small change still misses,
    and costs what a run without a cache does.
    """
    return free_bytes * BANDS // total_bytes


def _canonical(key: Mapping[str, Any]) -> str:
    return json.dumps(dict(key), sort_keys=True, separators=(",", ":"))


def _read(text: str, question: str) -> Recalled:
    """Raises ValueError for whatever ``keep`` did not write for this question."""
    content = json.loads(text)
    if not isinstance(content, dict) or content.keys() != {"format", "key", "answer"}:
        raise ValueError("it is not an answer that was kept here")
    if _restored(int, content["format"]) != FORMAT:
        raise ValueError(f"its format is {content['format']!r}, not {FORMAT}")
    if not isinstance(content["key"], dict) or _canonical(content["key"]) != question:
        raise ValueError("it answers another question")
    answer: Recalled = _restored(Recalled, content["answer"])
    date.fromisoformat(answer.kept_on)
    return answer


def _restored(kind: Any, value: Any) -> Any:
    """What JSON made of a value of this annotation, made into it again. Raises ValueError unless it is exactly one."""
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
    raise ValueError(f"{value!r:.60} stands where {kind} belongs")


def _restored_as_one_of(kinds: tuple[Any, ...], value: Any) -> Any:
    problems = []
    for kind in kinds:
        try:
            return _restored(kind, value)
        except ValueError as error:
            problems.append(str(error))
    raise ValueError(problems[0])
