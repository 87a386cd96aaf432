"""What the rehearsing process writes is what the asking one reads."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hf_bsopt.rehearsal.outcome import Outcome, Place

WHOLE = Outcome(
    status="oom",
    steps=2,
    allocated_bytes=10,
    reserved_bytes=20,
    used_bytes=30,
    retries=1,
    caught=4,
    place=Place("train.py, line 3, in main: loss.backward()", "modeling_bert.py, line 7, in forward"),
    message="96.00 MiB more were asked for",
    exit_code=1,
    trainer={"micro_batch": 8, "accumulation": 2, "processes": 1},
    nowhere={"torch.save": 3},
)


@pytest.mark.parametrize("outcome", [WHOLE, Outcome(), Outcome(place=Place("a line"))])
def test_what_is_written_is_what_is_read(outcome: Outcome, tmp_path: Path) -> None:
    outcome.write(tmp_path / "outcome.json")
    assert Outcome.read(tmp_path / "outcome.json") == outcome


@settings(deadline=None)
@given(st.text(), st.text(), st.dictionaries(st.text(), st.integers()))
@example("a file that is not named in UTF-8: \udc80.py", "❌", {"torch.save": 1})
def test_any_text_survives(line: str, message: str, nowhere: dict[str, int]) -> None:
    outcome = Outcome(place=Place(line), message=message, nowhere=nowhere)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "outcome.json"
        outcome.write(path)
        assert Outcome.read(path) == outcome


def test_a_process_that_never_wrote_is_still_running(tmp_path: Path) -> None:
    assert Outcome.read(tmp_path / "nothing.json") == Outcome(status="running")


def test_writing_leaves_no_other_file_and_replaces_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "outcome.json"
    for steps in (1, 2):
        Outcome(steps=steps).write(path)
    assert Outcome.read(path).steps == 2
    assert list(tmp_path.iterdir()) == [path]


def test_it_is_plain_json_for_whoever_else_reads_it(tmp_path: Path) -> None:
    WHOLE.write(tmp_path / "outcome.json")
    values = json.loads((tmp_path / "outcome.json").read_text(encoding="utf-8"))
    assert values["status"] == "oom"
    assert values["place"]["below"] == "modeling_bert.py, line 7, in forward"
    assert values["nowhere"] == {"torch.save": 3}


@pytest.mark.parametrize(
    ("status", "fits"),
    [("ended", True), ("stopped", True), ("oom", False), ("timeout", False), ("failed", False), ("running", False)],
)
def test_only_what_ended_or_was_stopped_fits(status: str, fits: bool) -> None:
    assert Outcome(status=status).fits is fits  # type: ignore[arg-type]
