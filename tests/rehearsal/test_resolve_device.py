"""Whether an answer is predicted or rehearsed, and why."""

from __future__ import annotations

import pytest

from hf_bsopt import api, find_batch_size
from hf_bsopt.api import DEVICES, DEVICES_TO_COME, resolve_device
from hf_bsopt.errors import RehearsalError, UsageError

NO_COMPILER = "there is no C compiler (cc, gcc or clang) to build the virtual device with"


@pytest.fixture(params=[None, NO_COMPILER])
def reason(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str | None:
    """Why nothing can be rehearsed, or None where it can."""
    found: str | None = request.param
    monkeypatch.setattr(api.rehearsal, "why_not", lambda: found)
    return found


def test_auto_rehearses_where_it_can_and_says_why_where_it_cannot(reason: str | None) -> None:
    rehearses, how = resolve_device("auto")
    assert rehearses is (reason is None)
    assert how == f"predicted, not rehearsed: {NO_COMPILER}" if reason else how.startswith("rehearsed: real training")


def test_predict_never_rehearses(reason: str | None) -> None:
    assert resolve_device("predict") == (False, "predicted: from one traced training step, as asked")


def test_a_rehearsal_that_was_asked_for_is_had_or_refused_with_the_way_out(reason: str | None) -> None:
    if reason is None:
        assert resolve_device("rehearse")[0] is True
    else:
        with pytest.raises(RehearsalError, match=r"can't rehearse here: there is no C compiler.*--device predict"):
            resolve_device("rehearse")


@pytest.mark.parametrize("device", DEVICES_TO_COME)
def test_a_device_that_is_to_come_is_said_to_be(device: str) -> None:
    with pytest.raises(UsageError, match=f"--device {device} would measure .* not built yet.*{', '.join(DEVICES)}"):
        resolve_device(device)


@pytest.mark.parametrize("device", ["", "gpu", "Rehearse", "tpu"])
def test_any_other_device_is_refused_with_those_that_there_are(device: str) -> None:
    with pytest.raises(UsageError, match="is not one of auto, predict, rehearse"):
        resolve_device(device)


def test_the_report_says_which_it_was() -> None:
    report = find_batch_size("bert-mini", gpu="2GiB", max_length=16, device="predict", evaluation=False)
    assert "predicted: from one traced training step, as asked" in report.notes
    assert {trial.source for trial in report.trials} == {"predicted"}


def test_a_rehearsal_that_cannot_be_had_ends_before_anything_is_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api.rehearsal, "why_not", lambda: NO_COMPILER)
    monkeypatch.setattr(api, "describe", lambda *_, **__: pytest.fail("a model was described"))
    with pytest.raises(RehearsalError, match="no C compiler"):
        find_batch_size("bert-mini", gpu="2GiB", device="rehearse")
