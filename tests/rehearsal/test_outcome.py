"""The outcome file: what the child process writes, the parent process reads."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hf_bsopt.rehearsal.outcome import CodeLocation, ScriptOutcome

FULL = ScriptOutcome(
    status="oom",
    steps=2,
    allocated_bytes=10,
    reserved_bytes=20,
    used_bytes=30,
    retries=1,
    caught=4,
    location=CodeLocation("train.py, line 3, in main: loss.backward()", "modeling_bert.py, line 7, in forward"),
    message="96.00 MiB more were requested",
    exit_code=1,
    trainer={"micro_batch": 8, "accumulation": 2, "processes": 1},
    not_saved={"torch.save": 3},
)


@pytest.mark.parametrize("outcome", [FULL, ScriptOutcome(), ScriptOutcome(location=CodeLocation("a line"))])
def test_an_outcome_is_read_as_it_was_written(outcome: ScriptOutcome, tmp_path: Path) -> None:
    outcome.write(tmp_path / "outcome.json")
    assert ScriptOutcome.read(tmp_path / "outcome.json") == outcome


@settings(deadline=None)
@given(st.text(), st.text(), st.dictionaries(st.text(), st.integers()))
@example("a file that is not named in UTF-8: \udc80.py", "❌", {"torch.save": 1})
def test_any_text_survives(line: str, message: str, not_saved: dict[str, int]) -> None:
    outcome = ScriptOutcome(location=CodeLocation(line), message=message, not_saved=not_saved)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "outcome.json"
        outcome.write(path)
        assert ScriptOutcome.read(path) == outcome


def test_the_status_is_running_if_nothing_was_written(tmp_path: Path) -> None:
    assert ScriptOutcome.read(tmp_path / "nothing.json") == ScriptOutcome(status="running")


def test_writing_replaces_the_file_and_leaves_no_other(tmp_path: Path) -> None:
    path = tmp_path / "outcome.json"
    for steps in (1, 2):
        ScriptOutcome(steps=steps).write(path)
    assert ScriptOutcome.read(path).steps == 2
    assert list(tmp_path.iterdir()) == [path]


def test_the_file_is_plain_json(tmp_path: Path) -> None:
    FULL.write(tmp_path / "outcome.json")
    values = json.loads((tmp_path / "outcome.json").read_text(encoding="utf-8"))
    assert values["status"] == "oom"
    assert values["location"]["below"] == "modeling_bert.py, line 7, in forward"
    assert values["not_saved"] == {"torch.save": 3}


@pytest.mark.parametrize(
    ("status", "fits"),
    [("ended", True), ("stopped", True), ("oom", False), ("timeout", False), ("failed", False), ("running", False)],
)
def test_only_scripts_that_ended_or_were_stopped_fit(status: str, fits: bool) -> None:
    assert ScriptOutcome(status=status).fits is fits  # type: ignore[arg-type]
