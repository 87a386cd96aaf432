"""A cached answer is restored exactly or not at all, and a broken cache never makes a search fail."""

from __future__ import annotations

import errno
import itertools
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from cached_answer import KEY, TRIALS, save
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hf_bsopt.records import Trial
from hf_bsopt.search import answer_cache
from hf_bsopt.search.answer_cache import BANDS, AnswerCache, CachedAnswer, band, default_folder

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def cache(tmp_path: Path) -> AnswerCache:
    return AnswerCache(tmp_path / "created" / "when needed")


def test_a_cached_answer_is_loaded_as_it_was_saved(cache: AnswerCache) -> None:
    days = {datetime.now(UTC).date().isoformat()}
    save(cache)
    days.add(datetime.now(UTC).date().isoformat())
    cached = cache.load(KEY)
    assert cached is not None
    assert cached == CachedAnswer(48, TRIALS, True, cached.kept_on)
    assert cached.kept_on in days


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    trials=st.lists(st.builds(Trial, batch_size=st.integers(1, 2**20)), max_size=4).map(tuple),
    below=st.integers(0, 2**20),
    is_settled=st.booleans(),
)
def test_every_trial_is_restored_exactly(
    tmp_path: Path, trials: tuple[Trial, ...], below: int, is_settled: bool
) -> None:
    """The representations are compared: 1 differs from 1.0 and -0.0 from 0.0, and nan equals nan."""
    cache = AnswerCache(tmp_path)
    batch_size = max(0, max((trial.batch_size for trial in trials), default=0) - below)
    cache.save(KEY, trials, batch_size, is_settled)
    cached = cache.load(KEY)
    assert cached is not None
    assert repr(cached) == repr(CachedAnswer(batch_size, trials, is_settled, cached.kept_on))


def test_loading_a_missing_answer_returns_none_and_creates_no_folder(
    cache: AnswerCache, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG, logger=answer_cache.__name__):
        assert cache.load(KEY) is None
    assert not cache.folder.exists()
    assert not caplog.records


def test_saving_again_replaces_the_answer(cache: AnswerCache) -> None:
    save(cache)
    cache.save(KEY, TRIALS[:1], 0, False)
    cached = cache.load(KEY)
    assert cached is not None
    assert (cached.batch_size, cached.trials, cached.is_settled) == (0, TRIALS[:1], False)
    assert len(list(cache.folder.iterdir())) == 1


# ---- keys


def test_a_key_may_contain_infinity(cache: AnswerCache) -> None:
    """The upper end of Mamba2's time_step_limit is infinite."""
    key = {**KEY, "time_step_limit": [0.0, float("inf")]}
    cache.save(key, TRIALS, 1, True)
    assert cache.load(key) is not None
    assert cache.load({**key, "time_step_limit": [0.0, 1.0]}) is None


@pytest.mark.parametrize(
    "other",
    [
        {**KEY, "driver": "550.55"},
        {**KEY, "free": band(8, 10)},
        {**KEY, "free": float(band(9, 10))},
        {**KEY, "more": None},
        {name: part for name, part in KEY.items() if name != "driver"},
        {},
    ],
)
def test_different_keys_have_different_answers(cache: AnswerCache, other: dict[str, Any]) -> None:
    save(cache)
    assert cache.load(other) is None
    cache.save(other, TRIALS, 8, False)
    first, second = cache.load(KEY), cache.load(other)
    assert first is not None and second is not None
    assert (first.batch_size, second.batch_size) == (48, 8)


def test_the_order_of_a_key_does_not_matter(cache: AnswerCache) -> None:
    save(cache)
    reordered = dict(reversed(KEY.items()))
    assert list(reordered) != list(KEY)
    assert cache.load(reordered) is not None


def test_a_tuple_in_a_key_equals_a_list(cache: AnswerCache) -> None:
    cache.save({"target": (0.8, 0.9)}, TRIALS, 48, True)
    assert cache.load({"target": [0.8, 0.9]}) is not None


def test_a_file_with_the_answer_to_another_key_is_ignored(cache: AnswerCache) -> None:
    """Two keys with the same hash would lead to this."""
    path = save(cache)
    other = {**KEY, "device": "L4"}
    cache.save(other, TRIALS, 8, False)
    (other_path,) = (file for file in cache.folder.iterdir() if file != path)
    other_path.write_bytes(path.read_bytes())
    assert cache.load(other) is None
    assert cache.load(KEY) is not None


# ---- folders that cannot be written, and several writers


def is_a_file(folder: Path) -> None:
    folder.parent.mkdir(parents=True)
    folder.write_text("unchanged")


def is_under_a_file(folder: Path) -> None:
    folder.parent.write_text("unchanged")


def has_a_folder_at_the_path_of_the_file(folder: Path) -> None:
    path = save(AnswerCache(folder))
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("make_unwritable", [is_a_file, is_under_a_file, has_a_folder_at_the_path_of_the_file])
def test_a_folder_that_cannot_be_written_is_logged_and_raises_nothing(
    cache: AnswerCache, caplog: pytest.LogCaptureFixture, make_unwritable: Callable[[Path], None]
) -> None:
    make_unwritable(cache.folder)
    with caplog.at_level(logging.INFO, logger=answer_cache.__name__):
        cache.save(KEY, TRIALS, 48, True)
        assert "is not cached for the next run" in caplog.text
        assert cache.load(KEY) is None
    assert {record.levelno for record in caplog.records} == {logging.INFO}


def test_a_full_disk_leaves_the_previous_answer(
    cache: AnswerCache, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(cache)

    def full(source: str, target: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    with caplog.at_level(logging.INFO, logger=answer_cache.__name__):
        cache.save(KEY, TRIALS, 8, False)
    assert "No space left on device" in caplog.text
    cached = cache.load(KEY)
    assert cached is not None and cached.batch_size == 48
    assert list(cache.folder.iterdir()) == [path]


WRITER = """
import sys
from pathlib import Path
from hf_bsopt.search.answer_cache import AnswerCache
from hf_bsopt.records import Peak, Trial

size = int(sys.argv[2])
trials = tuple(Trial(size, "fits", Peak(n, n), n, "measured", detail=str(size) * 50) for n in range(size))
for _ in range(200):
    AnswerCache(Path(sys.argv[1])).save({"writers": "both"}, trials, size, True)
"""


def test_with_two_concurrent_writers_a_complete_answer_is_read(cache: AnswerCache) -> None:
    sizes = (16, 48)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    commands = [[sys.executable, "-c", WRITER, str(cache.folder), str(size)] for size in sizes]
    writers = [subprocess.Popen(command, env=environment) for command in commands]
    seen = []
    try:
        while any(writer.poll() is None for writer in writers):
            seen.append(cache.load({"writers": "both"}))
    finally:
        codes = [writer.wait() for writer in writers]
    assert codes == [0, 0]
    loaded = list(itertools.dropwhile(lambda answer: answer is None, [*seen, cache.load({"writers": "both"})]))
    assert loaded
    assert None not in loaded  # after the first write there is always an answer
    assert all(
        [trial.batch_size for trial in answer.trials] == [answer.batch_size] * answer.batch_size
        for answer in loaded
        if answer
    )
    assert {answer.batch_size for answer in loaded if answer} <= set(sizes)
    assert len(list(cache.folder.iterdir())) == 1


# ---- the folder, and the bands of free memory


def test_the_users_cache_folder_has_precedence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_BSOPT_CACHE", str(tmp_path))
    assert default_folder() == tmp_path / "answers"
    AnswerCache(default_folder()).save(KEY, TRIALS, 48, True)
    assert len(list((tmp_path / "answers").iterdir())) == 1


@pytest.mark.parametrize("unset", [True, False])
def test_by_default_answers_are_in_the_users_cache_folder(monkeypatch: pytest.MonkeyPatch, unset: bool) -> None:
    import platformdirs

    monkeypatch.setenv("HF_BSOPT_CACHE", "")
    if unset:
        monkeypatch.delenv("HF_BSOPT_CACHE")
    assert default_folder() == Path(platformdirs.user_cache_dir("hf_bsopt")) / "answers"


def test_without_platformdirs_answers_are_in_the_cache_folder_of_the_home_directory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("HF_BSOPT_CACHE", raising=False)
    monkeypatch.setitem(sys.modules, "platformdirs", None)
    assert default_folder() == Path.home() / ".cache" / "hf_bsopt" / "answers"


def test_importing_the_module_imports_no_heavy_package() -> None:
    script = "import sys, hf_bsopt.search.answer_cache; print(*{'torch', 'platformdirs', 'pandas'} & set(sys.modules))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


@given(total=st.integers(1, 2**40), data=st.data())
def test_a_band_is_a_fiftieth_of_the_device(total: int, data: st.DataObject) -> None:
    free = data.draw(st.integers(0, total))
    here = band(free, total)
    assert 0 <= here <= BANDS
    assert here * total <= free * BANDS < (here + 1) * total


@given(total=st.integers(BANDS, 2**40), data=st.data())
def test_a_change_of_up_to_one_band_moves_to_the_next_band_at_most(total: int, data: st.DataObject) -> None:
    free = data.draw(st.integers(0, total - total // BANDS))
    more = free + data.draw(st.integers(0, total // BANDS))
    assert band(free, total) <= band(more, total) <= band(free, total) + 1


def test_a_desktop_that_takes_some_mib_more_stays_in_the_same_band() -> None:
    t4 = 14_913 * 2**20
    assert band(t4 - 430 * 2**20, t4) == band(t4 - 560 * 2**20, t4) == 48
    assert band(t4, t4) == 50
    assert band(0, t4) == 0
