"""Claims about the text of a report. HF_BSOPT_UPDATE_GOLDEN=1 rewrites the golden files."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest

from hf_bsopt import Report, find_batch_size
from hf_bsopt.records import GpuSpec, Peak, Trial

GOLDEN = Path(__file__).parent / "golden" / "report.txt"
SHORT = Path(__file__).parent / "golden" / "report_short.txt"
GPU = GpuSpec("2 GiB GPU", 2 * 2**30, 75, 40, 300 * 2**20)


@pytest.fixture(scope="module")
def report() -> Report:
    return find_batch_size(
        "bert-mini",
        gpu=GPU,
        device="predict",
        max_length=64,
        effective_batch_size=4096,
        learning_rate=1e-4,
        check=9,
    )


def test_the_text_equals_the_golden_files(report: Report) -> None:
    if os.environ.get("HF_BSOPT_UPDATE_GOLDEN"):
        GOLDEN.parent.mkdir(exist_ok=True)
        GOLDEN.write_text(f"{report.format(verbose=True)}\n", encoding="utf-8")
        SHORT.write_text(f"{report}\n", encoding="utf-8")
    assert f"{report.format(verbose=True)}\n" == GOLDEN.read_text(encoding="utf-8")
    assert f"{report}\n" == SHORT.read_text(encoding="utf-8")


def test_the_short_report_fits_on_one_screen(report: Report) -> None:
    assert len(str(report).splitlines()) <= 30
    assert str(report).splitlines()[0].startswith("prajjwal1/bert-mini, token-classification, 64 tokens")


def test_no_line_is_wider_than_a_terminal(report: Report) -> None:
    assert max(len(line) for line in str(report).splitlines()) <= 78


def test_the_answer_is_last(report: Report) -> None:
    lines = str(report).splitlines()
    assert lines[-5].startswith(f"✅ OPTIMAL BATCH SIZE: {report.batch_size}")
    assert lines[-4:] == [
        "Update your config:",
        f'  CONFIG["batch_size"] = {report.batch_size}',
        f'  CONFIG["gradient_accumulation_steps"] = {report.plan.accumulation}',
        '  CONFIG["learning_rate"] = 0.0001',
    ]


def test_the_html_has_the_answer_and_needs_no_other_file(report: Report) -> None:
    page = report._repr_html_()
    assert f"OPTIMAL BATCH SIZE: {report.batch_size}" in page
    assert "http" not in page
    assert "<script" not in page


def utilizing(report: Report, fraction: float, *, bound: str = "memory") -> Report:
    """Return the report as if the chosen size used this fraction of the GPU."""
    used = int(fraction * (report.device.total_bytes or 0))
    trials = tuple(
        dataclasses.replace(trial, used_bytes=used) if trial.batch_size == report.decision.batch_size else trial
        for trial in report.trials
    )
    decision = dataclasses.replace(report.decision, bound=bound)
    return dataclasses.replace(report, trials=trials, decision=decision)


def test_low_utilization_is_mentioned(report: Report) -> None:
    assert any("under 70 %" in sentence for sentence in utilizing(report, 0.5).advice)
    assert not any("under 70 %" in sentence for sentence in utilizing(report, 0.8).advice)


def test_utilization_above_95_percent_is_warned_about(report: Report) -> None:
    assert any("over 95 %" in sentence for sentence in utilizing(report, 0.97).advice)


def test_bf16_is_warned_about_on_a_t4_and_suggested_on_an_a100(report: Report) -> None:
    in_bf16 = dataclasses.replace(report, workload=dataclasses.replace(report.workload, precision="bf16"))
    assert any("no bf16 units" in sentence for sentence in in_bf16.advice)
    ampere = dataclasses.replace(report, device=dataclasses.replace(report.device, compute_capability=80))
    assert any("--bf16" in sentence for sentence in ampere.advice)


def test_usual_totals_are_shown_only_if_no_effective_batch_was_requested(report: Report) -> None:
    assert not any("Tokens per optimizer step" in sentence for sentence in report.advice)
    free = dataclasses.replace(report, search=dataclasses.replace(report.search, effective_batch_size=None))
    assert any("Tokens per optimizer step" in sentence for sentence in free.advice)


# ---- a report whose answer was run


@pytest.fixture(scope="module")
def verified(report: Report) -> Report:
    chosen = next(trial for trial in report.trials if trial.batch_size == report.batch_size)
    assert chosen.peak is not None and chosen.used_bytes is not None
    more = 10 * 2**20
    peak = Peak(chosen.peak.allocated_bytes + more, chosen.peak.reserved_bytes + more)
    ran = dataclasses.replace(chosen, peak=peak, used_bytes=chosen.used_bytes + more, source="rehearsed")
    refused = Trial(report.batch_size + 8, "oom", None, None, "rehearsed", detail="CUDA out of memory")
    return dataclasses.replace(report, trials=(*report.trials, refused, ran), checked=refused)


def test_a_rehearsed_size_takes_precedence_over_its_prediction(report: Report, verified: Report) -> None:
    assert (report.source, verified.source) == ("predicted", "rehearsed")
    assert verified.utilization > report.utilization
    assert verified.to_dict()["source"] == "rehearsed"


def test_predicted_and_rehearsed_memory_are_side_by_side(verified: Report) -> None:
    lines = str(verified).splitlines()
    header = next(line for line in lines if line.startswith("batch size"))
    assert header.split()[2:4] == ["predicted", "rehearsed"]
    chosen = next(line for line in lines if "◀ chosen" in line)
    assert chosen.count("GiB") == 2
    assert all("as predicted" in line for line in lines if line.strip().startswith("1 ") and "fits" in line)
    assert any("The prediction is -" in line and "reserved memory" in line for line in lines)


def test_a_size_that_ran_out_of_memory_is_not_called_predicted(verified: Report) -> None:
    refused = verified.batch_size + 8
    line = next(line for line in str(verified).splitlines() if line.strip().startswith(f"{refused} "))
    assert "out of memory" in line and "as predicted" not in line
    assert f"❌ Batch size {refused} does not fit: out of memory." in str(verified)


def test_lines_of_a_verified_report_fit_in_78_columns(verified: Report) -> None:
    assert max(map(len, str(verified).splitlines())) <= 78


def test_the_data_frame_has_another_row_for_each_size_that_was_run(report: Report, verified: Report) -> None:
    frame = verified.to_dataframe()
    assert len(frame) == len(report.to_dataframe()) + 2
    assert frame[frame["chosen"]]["source"].tolist() == ["rehearsed"]
