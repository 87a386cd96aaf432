"""An answer comes back as it was kept, or not at all; and no cache makes a search fail."""

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
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kept_answer import KEY, TRIALS, keep

from hf_bsopt.records import Trial
from hf_bsopt.search import answer_cache
from hf_bsopt.search.answer_cache import BANDS, AnswerCache, Recalled, band, default_folder

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def answers(tmp_path: Path) -> AnswerCache:
    return AnswerCache(tmp_path / "made" / "when needed")


def test_an_answer_comes_back_as_it_was_kept(answers: AnswerCache) -> None:
    days = {datetime.now(UTC).date().isoformat()}
    keep(answers)
    days.add(datetime.now(UTC).date().isoformat())
    recalled = answers.recall(KEY)
    assert recalled is not None
    assert recalled == Recalled(48, TRIALS, True, recalled.kept_on)
    assert recalled.kept_on in days


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    trials=st.lists(st.from_type(Trial), max_size=4).map(tuple),
    batch_size=st.integers(0, 2**20),
    is_settled=st.booleans(),
)
def test_any_trial_comes_back_to_the_last_digit(
    tmp_path: Path, trials: tuple[Trial, ...], batch_size: int, is_settled: bool
) -> None:
    """As it is written: 1 is not 1.0 there, -0.0 not 0.0, and nan is nan."""
    answers = AnswerCache(tmp_path)
    answers.keep(KEY, trials, batch_size, is_settled)
    recalled = answers.recall(KEY)
    assert recalled is not None
    assert repr(recalled) == repr(Recalled(batch_size, trials, is_settled, recalled.kept_on))


def test_what_was_never_kept_is_not_known_and_makes_no_folder(
    answers: AnswerCache, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG, logger=answer_cache.__name__):
        assert answers.recall(KEY) is None
    assert not answers.folder.exists()
    assert not caplog.records


def test_the_last_answer_is_the_one_that_is_known(answers: AnswerCache) -> None:
    keep(answers)
    answers.keep(KEY, TRIALS[:1], 0, False)
    recalled = answers.recall(KEY)
    assert recalled is not None
    assert (recalled.batch_size, recalled.trials, recalled.is_settled) == (0, TRIALS[:1], False)
    assert len(list(answers.folder.iterdir())) == 1


# ---- keys


def test_a_configuration_may_hold_an_infinity(answers: AnswerCache) -> None:
    """Mamba2's time_step_limit ends in one."""
    key = {**KEY, "time_step_limit": [0.0, float("inf")]}
    answers.keep(key, TRIALS, 1, True)
    assert answers.recall(key) is not None
    assert answers.recall({**key, "time_step_limit": [0.0, 1.0]}) is None


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
def test_another_question_has_another_answer(answers: AnswerCache, other: dict[str, Any]) -> None:
    keep(answers)
    assert answers.recall(other) is None
    answers.keep(other, (), 8, False)
    kept, others = answers.recall(KEY), answers.recall(other)
    assert kept is not None and others is not None
    assert (kept.batch_size, others.batch_size) == (48, 8)


def test_the_order_of_a_key_does_not_matter(answers: AnswerCache) -> None:
    keep(answers)
    turned = dict(reversed(KEY.items()))
    assert list(turned) != list(KEY)
    assert answers.recall(turned) is not None


def test_a_tuple_in_a_key_is_a_list(answers: AnswerCache) -> None:
    answers.keep({"target": (0.8, 0.9)}, TRIALS, 48, True)
    assert answers.recall({"target": [0.8, 0.9]}) is not None


def test_an_answer_that_lies_in_the_place_of_another_is_ignored(answers: AnswerCache) -> None:
    """As if two keys had the same hash."""
    path = keep(answers)
    other = {**KEY, "device": "L4"}
    answers.keep(other, (), 8, False)
    (others,) = (file for file in answers.folder.iterdir() if file != path)
    others.write_bytes(path.read_bytes())
    assert answers.recall(other) is None
    assert answers.recall(KEY) is not None


# ---- folders that can't be written, and several who write


def is_a_file(folder: Path) -> None:
    folder.parent.mkdir(parents=True)
    folder.write_text("as it was")


def is_under_a_file(folder: Path) -> None:
    folder.parent.write_text("as it was")


def has_a_folder_where_the_answer_belongs(folder: Path) -> None:
    path = keep(AnswerCache(folder))
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("happens", [is_a_file, is_under_a_file, has_a_folder_where_the_answer_belongs])
def test_a_folder_that_cannot_be_written_keeps_nothing_and_fails_nobody(
    answers: AnswerCache, caplog: pytest.LogCaptureFixture, happens: Callable[[Path], None]
) -> None:
    happens(answers.folder)
    with caplog.at_level(logging.INFO, logger=answer_cache.__name__):
        answers.keep(KEY, TRIALS, 48, True)
        assert "is not kept for the next run" in caplog.text
        assert answers.recall(KEY) is None
    assert {record.levelno for record in caplog.records} == {logging.INFO}


def test_a_full_disk_leaves_the_answer_before(
    answers: AnswerCache, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = keep(answers)

    def full(source: str, target: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    with caplog.at_level(logging.INFO, logger=answer_cache.__name__):
        answers.keep(KEY, (), 8, False)
    assert "No space left on device" in caplog.text
    recalled = answers.recall(KEY)
    assert recalled is not None and recalled.batch_size == 48
    assert list(answers.folder.iterdir()) == [path]


WRITER = """
import sys
from pathlib import Path
from hf_bsopt.search.answer_cache import AnswerCache
from hf_bsopt.records import Peak, Trial

size = int(sys.argv[2])
trials = tuple(Trial(size, "fits", Peak(n, n), n, "measured", detail=str(size) * 50) for n in range(size))
for _ in range(200):
    AnswerCache(Path(sys.argv[1])).keep({"of": "both"}, trials, size, True)
"""


def test_of_two_who_write_at_once_one_is_read_whole(answers: AnswerCache) -> None:
    sizes = (16, 48)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    commands = [[sys.executable, "-c", WRITER, str(answers.folder), str(size)] for size in sizes]
    writers = [subprocess.Popen(command, env=environment) for command in commands]
    seen = []
    try:
        while any(writer.poll() is None for writer in writers):
            seen.append(answers.recall({"of": "both"}))
    finally:
        codes = [writer.wait() for writer in writers]
    assert codes == [0, 0]
    known = list(itertools.dropwhile(lambda recalled: recalled is None, [*seen, answers.recall({"of": "both"})]))
    assert known
    assert None not in known  # once there was one, there always is
    assert all(
        [trial.batch_size for trial in kept.trials] == [kept.batch_size] * kept.batch_size for kept in known if kept
    )
    assert {kept.batch_size for kept in known if kept} <= set(sizes)
    assert len(list(answers.folder.iterdir())) == 1


# ---- where, and how much is free


def test_the_folder_that_the_user_names_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_BSOPT_CACHE", str(tmp_path))
    assert default_folder() == tmp_path / "answers"
    AnswerCache(default_folder()).keep(KEY, TRIALS, 48, True)
    assert len(list((tmp_path / "answers").iterdir())) == 1


@pytest.mark.parametrize("unset", [True, False])
def test_otherwise_answers_lie_in_the_users_cache(monkeypatch: pytest.MonkeyPatch, unset: bool) -> None:
    import platformdirs

    monkeypatch.setenv("HF_BSOPT_CACHE", "")
    if unset:
        monkeypatch.delenv("HF_BSOPT_CACHE")
    assert default_folder() == Path(platformdirs.user_cache_dir("hf_bsopt")) / "answers"


def test_without_platformdirs_they_lie_in_the_cache_of_the_users_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_BSOPT_CACHE", raising=False)
    monkeypatch.setitem(sys.modules, "platformdirs", None)
    assert default_folder() == Path.home() / ".cache" / "hf_bsopt" / "answers"


def test_the_module_costs_its_user_nothing() -> None:
    script = "import sys, hf_bsopt.search.answer_cache; print(*{'torch', 'platformdirs', 'pandas'} & set(sys.modules))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


@given(total=st.integers(1, 2**40), data=st.data())
def test_what_is_free_falls_into_a_fiftieth_of_the_device(total: int, data: st.DataObject) -> None:
    free = data.draw(st.integers(0, total))
    here = band(free, total)
    assert 0 <= here <= BANDS
    assert here * total <= free * BANDS < (here + 1) * total


@given(total=st.integers(BANDS, 2**40), data=st.data())
def test_a_small_change_stays_in_its_band_or_goes_to_the_next(total: int, data: st.DataObject) -> None:
    free = data.draw(st.integers(0, total - total // BANDS))
    more = free + data.draw(st.integers(0, total // BANDS))
    assert band(free, total) <= band(more, total) <= band(free, total) + 1


def test_a_desktop_that_grew_by_some_mib_is_in_the_same_band() -> None:
    t4 = 14_913 * 2**20
    assert band(t4 - 430 * 2**20, t4) == band(t4 - 560 * 2**20, t4) == 48
    assert band(t4, t4) == 50
    assert band(0, t4) == 0
