"""Claims about the output of the command during the search, and with --quiet."""

from __future__ import annotations

import errno
import json
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from hf_bsopt._utils import files
from hf_bsopt.cli.main import FOUND, NOTHING_FITS, USAGE, main
from hf_bsopt.errors import RehearsalError
from hf_bsopt.probing.devices import Schedule
from hf_bsopt.records import GpuSpec, Outcome, Peak, Trial
from hf_bsopt.search import trial_log
from hf_bsopt.search.verifier import Verifier
from hf_bsopt.workloads.trainable import Phase, Trainable
from hf_bsopt.workloads.workload import describe

Capture = pytest.CaptureFixture[str]
MINI = ["--model", "bert-tiny", "--gpu", "2GiB", "--device", "predict", "--evaluation", "False", "--batch_size", "64"]


def test_quiet_prints_the_two_config_lines_and_nothing_else(capsys: Capture) -> None:
    assert main([*MINI, "--max_length", "16", "--quiet"]) == FOUND
    streams = capsys.readouterr()
    assert streams.out == 'CONFIG["batch_size"] = 64\nCONFIG["gradient_accumulation_steps"] = 1\n'
    assert streams.err == ""


def test_quiet_output_of_several_lengths_can_be_run(capsys: Capture) -> None:
    assert main([*MINI, "--max_length", "16", "32", "-q"]) == FOUND
    out = capsys.readouterr().out
    assert [line for line in out.splitlines() if line.startswith("#")] == ["# max_length 16", "# max_length 32"]
    config: dict[str, int] = {}
    exec(out, {"CONFIG": config})
    assert config == {"batch_size": 64, "gradient_accumulation_steps": 1}


def test_quiet_still_reports_a_checked_size_that_does_not_fit(capsys: Capture) -> None:
    assert main([*MINI, "--max_length", "16", "--quiet", "--check", "10000000"]) == NOTHING_FITS
    streams = capsys.readouterr()
    assert len(streams.out.splitlines()) == 2
    assert "10000000 does not fit" in streams.err


def test_quiet_and_verbose_together_are_a_usage_error(capsys: Capture) -> None:
    assert main([*MINI, "-q", "-v"]) == USAGE
    assert "--quiet" in capsys.readouterr().err


# ---- the log of sizes that are run

GPU = GpuSpec("1000-byte GPU", 1000, 75, 40, 0)


def ran(batch_size: int, outcome: Outcome = "fits", detail: str = "") -> Trial:
    return Trial(batch_size, outcome, Peak(0, 0), 2**30, "rehearsed", detail=detail)


def logged(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == trial_log.__name__]


@pytest.fixture(autouse=True)
def verbose(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger=trial_log.__name__)


def test_a_size_that_failed_is_logged_with_the_next_size(caplog: pytest.LogCaptureFixture) -> None:
    log = trial_log.TrialLog()
    with log.search():
        for trial in (ran(19), ran(36, "oom", "CUDA out of memory. Tried to allocate"), ran(27)):
            log.trying(trial.batch_size)
            log.tried(trial)
    assert logged(caplog) == [
        "✓ Batch size 19 works (1.00 GiB)",
        "✗ Batch size 36: out of memory → trying 27",
        "✓ Batch size 27 works (1.00 GiB)",
    ]


def test_the_last_size_that_failed_is_logged_without_a_next_size(caplog: pytest.LogCaptureFixture) -> None:
    log = trial_log.TrialLog()
    with log.search():
        log.trying(36)
        log.tried(ran(36, "oom"))
    log.trying(8)
    log.tried(ran(8, "crash", "SIGSEGV"))
    assert logged(caplog) == ["✗ Batch size 36: out of memory", "✗ Batch size 8: crash, SIGSEGV"]


class StubClient:
    """A probe client with given results."""

    def __init__(self, answer: Callable[[int], Trial]) -> None:
        self.answer = answer
        self.device = self
        self.source = "rehearsed"
        self.spec = GPU
        self.schedule = Schedule()

    def __call__(self, workload: Trainable, batch_size: int, phase: Phase, *, timed_steps: int = 0) -> Trial:
        return self.answer(batch_size)


def test_a_search_logs_every_size_that_it_runs(caplog: pytest.LogCaptureFixture) -> None:
    def answer(size: int) -> Trial:
        return Trial(size, "fits" if size <= 27 else "oom", Peak(0, 0), 10 * size, "rehearsed")

    workload = describe("bert-tiny", max_length=8)
    verifier = Verifier(StubClient(answer), workload, 1.0)  # type: ignore[arg-type]
    verification = verifier.verify(24, lambda size: size, None)
    assert 0.75 * 27 <= verification.batch_size <= 27
    lines = logged(caplog)
    assert len(lines) == len(verification.trials)
    failed = [trial.batch_size for trial in verification.trials if not trial.fits]
    after = {a.batch_size: b.batch_size for a, b in zip(verification.trials, verification.trials[1:], strict=False)}
    for size in failed:
        follows = f" → trying {after[size]}" if size in after else ""
        assert f"✗ Batch size {size}: out of memory{follows}" in lines


def test_a_search_that_fails_logs_the_failed_size(caplog: pytest.LogCaptureFixture) -> None:
    verifier = Verifier(StubClient(lambda size: ran(size, "error", "no kernel")), describe("bert-tiny"), 1.0)  # type: ignore[arg-type]
    with pytest.raises(RehearsalError, match="no kernel"):
        verifier.verify(24, lambda size: size, None)
    assert logged(caplog) == ["✗ Batch size 24: error, no kernel"]


def test_a_disk_that_fills_up_during_the_search_costs_no_answer_and_no_other_file(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    page, values = tmp_path / "page.html", tmp_path / "values.json"

    def refuse_json(target: Path, content: bytes, check: object = None) -> None:
        if target == values:
            raise OSError(errno.ENOSPC, "No space left on device")
        page.write_bytes(content)

    monkeypatch.setattr(files, "replace_file", refuse_json)
    assert main([*MINI, "--html", str(page), "--json", str(values)]) == USAGE
    out, err = capsys.readouterr()
    assert "OPTIMAL BATCH SIZE" in out
    assert err == f"error: cannot write {values}: No space left on device\n"
    assert page.exists() and not values.exists()


@pytest.mark.slow
def test_a_full_disk_behind_standard_output_is_one_sentence() -> None:
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", "hf_bsopt", "env"], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert (done.returncode, done.stderr) == (USAGE, "error: No space left on device\n")


def test_control_characters_in_names_do_not_reach_the_terminal(tmp_path: Path, capsys: Capture) -> None:
    folder = tmp_path / "bert\x1b]0;title\x07"
    folder.mkdir()
    config = {"model_type": "bert", "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 128, "vocab_size": 100}))
    for model in (str(folder), "no\x1b[2Jmodel"):
        main([*MINI, "--model", model])
    out, err = capsys.readouterr()
    assert r"bert\x1b]0;title\x07" in out and r"no\x1b[2Jmodel" in err
    assert "\x1b" not in out + err and "\x07" not in out + err
