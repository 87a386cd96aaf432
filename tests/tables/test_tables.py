"""Claims about the table of batch sizes by model, length and GPU."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from hf_bsopt import find_batch_size
from hf_bsopt.cli.main import FOUND, NOTHING_FITS, USAGE, main
from hf_bsopt.data import catalog
from hf_bsopt.errors import UnknownGpuError, UsageError
from hf_bsopt.memory.predictor import Predictor
from hf_bsopt.memory.tracing import tracer
from hf_bsopt.options import Options
from hf_bsopt.tables.table import batch_size_table
from hf_bsopt.tables.text import table_csv, table_markdown, table_text
from hf_bsopt.workloads.workload import describe

Capture = pytest.CaptureFixture[str]
GPUS = ("T4", "2GiB", "H100-80GB")


def options(**keywords: Any) -> Options:
    return Options.of(keywords, "name")


@pytest.fixture(scope="module")
def frame(once: Callable[..., Any]) -> pd.DataFrame:
    made: pd.DataFrame = once("table", lambda: batch_size_table(["bert-tiny", "no-such-bert"], GPUS, [64, 1024]))
    return made


def row_of(frame: pd.DataFrame, **wanted: object) -> dict[str, Any]:
    for name, value in wanted.items():
        frame = frame[frame[name] == value]
    (row,) = frame.to_dict("records")
    return row


def test_there_is_a_row_for_each_gpu_model_and_length(frame: pd.DataFrame) -> None:
    rows = [(row.gpu, row.model, row.max_length) for row in frame.itertuples()]
    assert rows == [(g, m, n) for g in GPUS for m in ("bert-tiny", "no-such-bert") for n in (64, 1024)]


@pytest.mark.parametrize("gpu", GPUS)
def test_a_cell_equals_the_report_of_the_model(frame: pd.DataFrame, gpu: str) -> None:
    report = find_batch_size("bert-tiny", gpu=gpu, device="predict", max_length=64, evaluation=False)
    row = row_of(frame, gpu=gpu, model="bert-tiny", max_length=64)
    decision = report.decision
    assert (row["optimal"], row["max_risky"], row["safe"]) == (decision.batch_size, decision.largest, decision.safe)
    assert row["utilization"] == report.utilization
    assert row["parameters"] == report.parameters[0]
    assert row["why"] == report.reason


def test_an_invalid_cell_has_a_reason_and_does_not_stop_the_others(frame: pd.DataFrame) -> None:
    assert "limit of 512" in row_of(frame, gpu="T4", model="bert-tiny", max_length=1024)["why"]
    assert "not in the catalog" in row_of(frame, gpu="T4", model="no-such-bert", max_length=64)["why"]
    assert frame["optimal"].isna().sum() == 9


def test_assumptions_about_a_gpu_are_in_the_notes_and_the_text(frame: pd.DataFrame) -> None:
    assert any("2GiB is read as" in note for note in frame.attrs["notes"])
    assert "2GiB is read as" in table_text(frame)


def traces(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list to which the device of each further trace is added."""
    made: list[str] = []
    record = tracer._record

    def recorded(*arguments: Any) -> Any:
        made.append(arguments[4].name)
        return record(*arguments)

    monkeypatch.setattr(tracer, "_record", recorded)
    return made


def test_a_model_is_traced_once_for_all_gpus_that_run_the_same_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    made = traces(monkeypatch)
    batch_size_table(["bert-tiny"], ["T4", "A100-40GB", "L4", "H100-80GB"], [16])
    assert made == ["T4"] * 2


def test_a_gpu_that_runs_other_kernels_has_its_own_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    made = traces(monkeypatch)
    batch_size_table(["bert-tiny"], ["T4", "A100-40GB", "L4"], [16], options=options(precision="bf16"))
    assert made == ["T4"] * 2 + ["A100-40GB"] * 2


@pytest.mark.parametrize(
    ("model", "precision", "gpus"),
    [
        ("bert-tiny", "fp16", ["P100", "L4", "H100-80GB"]),
        ("bert-tiny", "bf16", ["P100", "L4", "H100-80GB"]),
        ("bert-tiny", "fp32", ["P100", "L4"]),
        ("pythia-70m", "bf16", ["L4"]),
    ],
)
def test_a_shared_trace_equals_a_trace_for_that_gpu_to_the_byte(model: str, precision: str, gpus: list[str]) -> None:
    workload = describe(model, max_length=48, precision=precision)
    shared = Predictor(workload, catalog.gpu("T4"))
    for name in gpus:
        gpu = catalog.gpu(name)
        own = Predictor(workload, gpu)
        assert shared.on(gpu).timeline.sizes(7, gpu).tolist() == own.timeline.sizes(7, gpu).tolist()
        assert shared.on(gpu)(7) == own(7)


def test_an_error_that_concerns_every_cell_is_raised() -> None:
    with pytest.raises(UnknownGpuError, match="T4"):
        batch_size_table(["bert-tiny"], ["T44"])
    with pytest.raises(UsageError, match="fp8"):
        batch_size_table(["bert-tiny"], ["T4"], options=options(precision="fp8"))
    with pytest.raises(UsageError, match="lists"):
        batch_size_table("bert-tiny", ["T4"])
    with pytest.raises(UsageError, match="swapped"):
        batch_size_table(["bert-tiny"], ["T4"], options=options(target=(0.9, 0.8)))


def test_flash_attention_is_an_error_for_the_t4_only() -> None:
    frame = batch_size_table(["bert-tiny"], ["T4", "L4"], [16], options=options(attention="flash_attention_2"))
    assert frame["optimal"].isna().tolist() == [True, False]
    assert "compute capability 8.0" in frame["why"].iloc[0]


# ---- the formats


def test_the_text_fits_in_78_columns_and_has_each_reason_once_per_gpu(frame: pd.DataFrame) -> None:
    text = table_text(frame)
    assert max(map(len, text.splitlines())) <= 78
    assert text.count("limit of 512 positions") == text.replace("\n", " ").count("max_length 1024") == len(GPUS)
    optimal = row_of(frame, gpu="T4", model="bert-tiny", max_length=64)["optimal"]
    assert any(line.split()[:4] == ["bert-tiny", "4M", "64", str(optimal)] for line in text.splitlines())


def test_bf16_on_a_t4_has_a_warning() -> None:
    text = table_text(batch_size_table(["bert-tiny"], ["T4"], [16], options=options(precision="bf16")))
    assert "[1]" in text and "no bf16 units" in text


def test_every_row_of_the_markdown_has_the_same_number_of_cells(frame: pd.DataFrame) -> None:
    lines = [line for line in table_markdown(frame).splitlines() if line.startswith("|")]
    assert {line.count("|") for line in lines} == {8}
    assert len(lines) == len(GPUS) * 6


def test_the_csv_is_read_back_unchanged(frame: pd.DataFrame) -> None:
    again = pd.read_csv(io.StringIO(table_csv(frame)))
    assert again["optimal"].tolist()[0] == frame["optimal"].tolist()[0]
    assert list(again) == list(frame)
    assert again["why"].tolist() == frame["why"].tolist()


# ---- the command

COMMAND = ["--models", "bert-tiny", "--gpus", "T4", "2GiB", "--max_length", "16"]


def test_the_command_prints_the_table_and_nothing_else(capsys: Capture, tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    assert main([*COMMAND, "--format", "csv", "--json", str(path)]) == FOUND
    streams = capsys.readouterr()
    assert streams.err == ""
    assert pd.read_csv(io.StringIO(streams.out))["gpu"].tolist() == ["T4", "2GiB"]
    saved = json.loads(path.read_text())
    assert [row["max_length"] for row in saved["table"]] == [16, 16]
    assert saved["target"] == [0.8, 0.9]


def test_a_table_without_sizes_exits_with_1_and_says_what_one_sequence_needs(capsys: Capture) -> None:
    assert main(["--models", "bert-base-uncased", "--gpu", "1GiB", "--max_length", "16"]) == NOTHING_FITS
    out = capsys.readouterr().out
    assert "109M" in out and "one sequence needs" in out


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["--check", "8"], "--check"),
        (["--effective_batch_size", "8"], "--effective_batch_size"),
        (["--device", "cpu"], "--device cpu"),
        (["--model", "bert-mini"], "--models"),
        (["--gpu", "T4"], "--gpus"),
        (["--format", "html"], "markdown"),
        (["--patch", "a.py"], "--patch"),
        (["--training_args", "args.json"], "--training_args"),
    ],
)
def test_options_for_one_model_are_usage_errors(
    more: list[str], named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "args.json").write_text('{"learning_rate": 1e-4}')
    assert main([*COMMAND, *more]) == USAGE
    assert named in capsys.readouterr().err


def test_a_format_without_a_table_is_a_usage_error(capsys: Capture) -> None:
    assert main(["--model", "bert-tiny", "--format", "csv"]) == USAGE
    assert "--models" in capsys.readouterr().err
