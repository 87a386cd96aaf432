"""A file that is not exactly what was kept is no answer, and is replaced by the next."""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kept_answer import KEY, TRIALS, keep

from hf_bsopt.search import answer_cache
from hf_bsopt.search.answer_cache import AnswerCache, Recalled


@pytest.fixture
def answers(tmp_path: Path) -> AnswerCache:
    return AnswerCache(tmp_path / "made" / "when needed")


def is_ignored_and_replaced(answers: AnswerCache, path: Path) -> bool:
    ignored = answers.recall(KEY) is None
    keep(answers)
    recalled = answers.recall(KEY)
    return ignored and recalled is not None and recalled.trials == TRIALS and list(answers.folder.iterdir()) == [path]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b"48",
        b'"48"',
        b"{}",
        b"\xff\xfe{\x00}\x00",
        b"\xef\xbb\xbf{}",
        '{"größer": 1}'.encode("latin-1"),
        b"[" * 100_000,
        b"1" * 10_000,
        b"\0" * 512,
    ],
)
def test_a_file_of_anything_else_is_ignored_and_replaced(answers: AnswerCache, content: bytes) -> None:
    path = keep(answers)
    path.write_bytes(content)
    assert is_ignored_and_replaced(answers, path)


def test_an_answer_in_another_encoding_is_ignored_and_replaced(answers: AnswerCache) -> None:
    path = keep(answers)
    content = kept_content()
    content["answer"]["trials"][0]["detail"] = "größer"
    text = json.dumps(content, ensure_ascii=False)
    path.write_text(text, encoding="utf-8")
    assert answers.recall(KEY) is not None
    for encoding in ("latin-1", "utf-16", "utf-8-sig"):
        path.write_text(text, encoding=encoding)
        assert is_ignored_and_replaced(answers, path)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(content=st.binary())
def test_random_bytes_are_ignored_and_replaced(tmp_path: Path, content: bytes) -> None:
    answers = AnswerCache(tmp_path)
    path = keep(answers)
    path.write_bytes(content)
    assert is_ignored_and_replaced(answers, path)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_a_file_that_ends_too_early_is_ignored_and_replaced(tmp_path: Path, data: st.DataObject) -> None:
    answers = AnswerCache(tmp_path)
    path = keep(answers)
    whole = path.read_bytes().rstrip()
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    assert is_ignored_and_replaced(answers, path)


def places(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """The way to every part of a JSON value, its own included."""
    yield path
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, part in parts:
        yield from places(part, (*path, name))


def kept_content() -> dict[str, Any]:
    answer = dataclasses.asdict(Recalled(48, TRIALS, True, "2026-03-31"))
    content: dict[str, Any] = json.loads(json.dumps({"format": answer_cache.FORMAT, "key": KEY, "answer": answer}))
    return content


def at(content: Any, place: tuple[str | int, ...]) -> Any:
    for name in place:
        content = content[name]
    return content


PLACES = list(places(kept_content()))[1:]
SECONDS = ("step_seconds", "step_seconds_spread", "samples_per_second", "tokens_per_second")


def test_the_file_is_what_these_tests_take_it_for(answers: AnswerCache) -> None:
    path = keep(answers)
    content = json.loads(path.read_text())
    content["answer"]["kept_on"] = "2026-03-31"
    assert content == kept_content()
    path.write_text(json.dumps(content))
    recalled = answers.recall(KEY)
    assert recalled is not None and recalled.kept_on == "2026-03-31"


@pytest.mark.parametrize("place", PLACES, ids=str)
def test_a_part_of_the_wrong_type_is_ignored_and_replaced(answers: AnswerCache, place: tuple[str | int, ...]) -> None:
    path = keep(answers)
    for wrong in ({"a": 1}, [[]], "no such word", -0.5, True, None):
        content = kept_content()
        parent, name = at(content, place[:-1]), place[-1]
        was = copy.deepcopy(parent[name])
        if type(wrong) is type(was) or is_allowed(place, wrong):
            continue
        parent[name] = wrong
        path.write_text(json.dumps(content))
        assert is_ignored_and_replaced(answers, path), wrong


def is_allowed(place: tuple[str | int, ...], value: object) -> bool:
    """Where a Trial may have a number or nothing."""
    if value is None:
        return place[-1] in ("peak", "used_bytes", *SECONDS)
    return isinstance(value, float) and place[-1] in SECONDS


@pytest.mark.parametrize("place", [place for place in PLACES if isinstance(place[-1], str)], ids=str)
def test_a_missing_part_is_ignored_and_replaced(answers: AnswerCache, place: tuple[str | int, ...]) -> None:
    """Also one that has a default: the file is of a version that did not know it."""
    path = keep(answers)
    content = kept_content()
    del at(content, place[:-1])[place[-1]]
    path.write_text(json.dumps(content))
    assert is_ignored_and_replaced(answers, path)


@pytest.mark.parametrize(
    "place", [place for place in ((), *PLACES) if isinstance(at(kept_content(), place), dict)], ids=str
)
def test_an_unknown_part_is_ignored_and_replaced(answers: AnswerCache, place: tuple[str | int, ...]) -> None:
    path = keep(answers)
    content = kept_content()
    at(content, place)["one more"] = 1
    path.write_text(json.dumps(content))
    assert is_ignored_and_replaced(answers, path)


@pytest.mark.parametrize("found", [0, answer_cache.FORMAT + 1, True, 1.0, "1", None])
def test_a_file_of_another_format_is_ignored_and_replaced(answers: AnswerCache, found: object) -> None:
    path = keep(answers)
    path.write_text(json.dumps({**kept_content(), "format": found}))
    assert is_ignored_and_replaced(answers, path)


@pytest.mark.parametrize(
    ("field", "wrong"), [("outcome", "maybe"), ("source", "guessed"), ("batch_size", 48.0), ("detail", None)]
)
def test_a_word_or_a_number_that_a_trial_cannot_have_is_ignored(
    answers: AnswerCache, field: str, wrong: object
) -> None:
    path = keep(answers)
    content = kept_content()
    content["answer"]["trials"][0][field] = wrong
    path.write_text(json.dumps(content))
    assert is_ignored_and_replaced(answers, path)


def test_a_day_that_is_none_is_ignored(answers: AnswerCache) -> None:
    path = keep(answers)
    content = kept_content()
    content["answer"]["kept_on"] = "yesterday"
    path.write_text(json.dumps(content))
    assert is_ignored_and_replaced(answers, path)


def test_what_is_ignored_is_said_in_the_log(answers: AnswerCache, caplog: pytest.LogCaptureFixture) -> None:
    path = keep(answers)
    content = kept_content()
    content["answer"]["trials"][1]["peak"]["reserved_bytes"] = "many"
    path.write_text(json.dumps(content))
    with caplog.at_level(logging.INFO, logger=answer_cache.__name__):
        assert answers.recall(KEY) is None
    (record,) = caplog.records
    assert record.levelno == logging.INFO
    assert str(path) in record.getMessage() and "'many'" in record.getMessage()
