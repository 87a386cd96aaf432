"""A cache file that is not exactly what was saved is ignored, and replaced by the next answer."""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cached_answer import KEY, TRIALS, save
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hf_bsopt.search import answer_cache
from hf_bsopt.search.answer_cache import AnswerCache, CachedAnswer


@pytest.fixture
def cache(tmp_path: Path) -> AnswerCache:
    return AnswerCache(tmp_path / "created" / "when needed")


def is_ignored_and_replaced(cache: AnswerCache, path: Path) -> bool:
    is_ignored = cache.load(KEY) is None
    save(cache)
    cached = cache.load(KEY)
    return is_ignored and cached is not None and cached.trials == TRIALS and list(cache.folder.iterdir()) == [path]


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
def test_a_file_with_any_other_content_is_ignored_and_replaced(cache: AnswerCache, content: bytes) -> None:
    path = save(cache)
    path.write_bytes(content)
    assert is_ignored_and_replaced(cache, path)


def test_an_answer_in_another_encoding_is_ignored_and_replaced(cache: AnswerCache) -> None:
    path = save(cache)
    content = saved_content()
    content["answer"]["trials"][0]["detail"] = "größer"
    text = json.dumps({**content, "checksum": answer_cache.checksum(content)}, ensure_ascii=False)
    path.write_text(text, encoding="utf-8")
    assert cache.load(KEY) is not None
    for encoding in ("latin-1", "utf-16", "utf-8-sig"):
        path.write_text(text, encoding=encoding)
        assert is_ignored_and_replaced(cache, path)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(content=st.binary())
def test_random_bytes_are_ignored_and_replaced(tmp_path: Path, content: bytes) -> None:
    cache = AnswerCache(tmp_path)
    path = save(cache)
    path.write_bytes(content)
    assert is_ignored_and_replaced(cache, path)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_a_truncated_file_is_ignored_and_replaced(tmp_path: Path, data: st.DataObject) -> None:
    cache = AnswerCache(tmp_path)
    path = save(cache)
    whole = path.read_bytes().rstrip()
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    assert is_ignored_and_replaced(cache, path)


def places(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Yield the path to every part of a JSON value, that of the value itself included."""
    yield path
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, part in parts:
        yield from places(part, (*path, name))


def saved_content() -> dict[str, Any]:
    answer = dataclasses.asdict(CachedAnswer(48, TRIALS, True, "2026-03-31"))
    content: dict[str, Any] = json.loads(json.dumps({"format": answer_cache.FORMAT, "key": KEY, "answer": answer}))
    return content


def write(path: Path, content: dict[str, Any]) -> None:
    """Write the content with its checksum, so that what is wrong with it is all that is wrong."""
    path.write_text(json.dumps({**content, "checksum": answer_cache.checksum(content)}))


def at(content: Any, place: tuple[str | int, ...]) -> Any:
    for name in place:
        content = content[name]
    return content


PLACES = list(places(saved_content()))[1:]
SECONDS = ("step_seconds", "step_seconds_spread", "samples_per_second", "tokens_per_second")


def test_a_saved_file_has_the_content_that_these_tests_assume(cache: AnswerCache) -> None:
    path = save(cache)
    content = json.loads(path.read_text())
    assert content.pop("checksum") == answer_cache.checksum(content)
    content["answer"]["kept_on"] = "2026-03-31"
    assert content == saved_content()
    write(path, content)
    cached = cache.load(KEY)
    assert cached is not None and cached.kept_on == "2026-03-31"


@pytest.mark.parametrize("place", PLACES, ids=str)
def test_a_value_of_the_wrong_type_is_ignored_and_replaced(cache: AnswerCache, place: tuple[str | int, ...]) -> None:
    path = save(cache)
    for wrong in ({"a": 1}, [[]], "no such word", -0.5, True, None):
        content = saved_content()
        parent, name = at(content, place[:-1]), place[-1]
        was = copy.deepcopy(parent[name])
        if type(wrong) is type(was) or is_allowed(place, wrong):
            continue
        parent[name] = wrong
        write(path, content)
        assert is_ignored_and_replaced(cache, path), wrong


def is_allowed(place: tuple[str | int, ...], value: object) -> bool:
    """Return whether a Trial may have this value, a number or None, at this place."""
    if value is None:
        return place[-1] in ("peak", "used_bytes", *SECONDS)
    return isinstance(value, float) and place[-1] in SECONDS


@pytest.mark.parametrize("place", [place for place in PLACES if isinstance(place[-1], str)], ids=str)
def test_a_missing_field_is_ignored_and_replaced(cache: AnswerCache, place: tuple[str | int, ...]) -> None:
    """Fields with a default too: the file was written by a version without them."""
    path = save(cache)
    content = saved_content()
    del at(content, place[:-1])[place[-1]]
    write(path, content)
    assert is_ignored_and_replaced(cache, path)


@pytest.mark.parametrize(
    "place", [place for place in ((), *PLACES) if isinstance(at(saved_content(), place), dict)], ids=str
)
def test_an_unknown_field_is_ignored_and_replaced(cache: AnswerCache, place: tuple[str | int, ...]) -> None:
    path = save(cache)
    content = saved_content()
    at(content, place)["one more"] = 1
    write(path, content)
    assert is_ignored_and_replaced(cache, path)


@pytest.mark.parametrize("found", [0, answer_cache.FORMAT + 1, True, 1.0, "1", None])
def test_a_file_of_another_format_is_ignored_and_replaced(cache: AnswerCache, found: object) -> None:
    path = save(cache)
    write(path, {**saved_content(), "format": found})
    assert is_ignored_and_replaced(cache, path)


@pytest.mark.parametrize(
    ("field", "wrong"), [("outcome", "maybe"), ("source", "guessed"), ("batch_size", 48.0), ("detail", None)]
)
def test_a_word_or_a_number_that_a_trial_cannot_have_is_ignored_and_replaced(
    cache: AnswerCache, field: str, wrong: object
) -> None:
    path = save(cache)
    content = saved_content()
    content["answer"]["trials"][0][field] = wrong
    write(path, content)
    assert is_ignored_and_replaced(cache, path)


@pytest.mark.parametrize("size", [-1, 49, 10**400])
def test_a_size_that_no_trial_bears_out_is_ignored_and_replaced(cache: AnswerCache, size: int) -> None:
    path = save(cache)
    content = saved_content()
    content["answer"]["batch_size"] = size if size != 49 else max(trial.batch_size for trial in TRIALS) + 1
    write(path, content)
    assert is_ignored_and_replaced(cache, path)


@pytest.mark.parametrize("size", [-1, 0])
def test_a_trial_of_no_sequence_is_ignored_and_replaced(cache: AnswerCache, size: int) -> None:
    path = save(cache)
    content = saved_content()
    content["answer"]["trials"][0]["batch_size"] = size
    write(path, content)
    assert is_ignored_and_replaced(cache, path)


def test_a_value_that_was_changed_is_ignored_and_replaced(cache: AnswerCache) -> None:
    path = save(cache)
    text = path.read_text()
    assert text.count('"batch_size": 48') >= 1
    path.write_text(text.replace('"batch_size": 48', '"batch_size": 40'))
    assert is_ignored_and_replaced(cache, path)
    path.write_text(text.replace('"checksum": "', '"checksum": "0'))
    assert is_ignored_and_replaced(cache, path)


def test_a_link_is_neither_followed_for_reading_nor_for_writing(cache: AnswerCache, tmp_path: Path) -> None:
    path = save(cache)
    elsewhere = path.rename(tmp_path / "elsewhere.json")
    path.symlink_to(elsewhere)
    before = elsewhere.read_bytes()
    assert is_ignored_and_replaced(cache, path)
    assert not path.is_symlink() and elsewhere.read_bytes() == before


def test_an_invalid_date_is_ignored_and_replaced(cache: AnswerCache) -> None:
    path = save(cache)
    content = saved_content()
    content["answer"]["kept_on"] = "yesterday"
    write(path, content)
    assert is_ignored_and_replaced(cache, path)


def test_an_ignored_file_is_logged(cache: AnswerCache, caplog: pytest.LogCaptureFixture) -> None:
    path = save(cache)
    content = saved_content()
    content["answer"]["trials"][1]["peak"]["reserved_bytes"] = "many"
    write(path, content)
    with caplog.at_level(logging.INFO, logger=answer_cache.__name__):
        assert cache.load(KEY) is None
    (record,) = caplog.records
    assert record.levelno == logging.INFO
    assert str(path) in record.getMessage() and "'many'" in record.getMessage()
