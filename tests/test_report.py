"""How a report is told. The golden text is made anew with HF_BSOPT_UPDATE_GOLDEN=1."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest

from hf_bsopt import Report, find_batch_size
from hf_bsopt.records import GpuSpec
from hf_bsopt.report import write_atomically

GOLDEN = Path(__file__).parent / "golden" / "report.txt"
CARD = GpuSpec("2 GiB card", 2 * 2**30, 75, 40, 300 * 2**20)


@pytest.fixture(scope="module")
def report() -> Report:
    return find_batch_size(
        "bert-mini",
        gpu=CARD,
        device="predict",
        max_length=64,
        effective_batch_size=4096,
        learning_rate=1e-4,
        check=9,
    )


def test_the_text_is_the_golden_one(report: Report) -> None:
    if os.environ.get("HF_BSOPT_UPDATE_GOLDEN"):
        GOLDEN.parent.mkdir(exist_ok=True)
        GOLDEN.write_text(f"{report}\n", encoding="utf-8")
    assert f"{report}\n" == GOLDEN.read_text(encoding="utf-8")


def test_no_line_is_wider_than_a_terminal(report: Report) -> None:
    assert max(len(line) for line in str(report).splitlines()) <= 78


def test_the_answer_stands_last(report: Report) -> None:
    lines = str(report).splitlines()
    assert lines[-5].startswith(f"✅ OPTIMAL BATCH SIZE: {report.batch_size}")
    assert lines[-4:] == [
        "Update your config:",
        f'  CONFIG["batch_size"] = {report.batch_size}',
        f'  CONFIG["gradient_accumulation_steps"] = {report.plan.accumulation}',
        '  CONFIG["learning_rate"] = 0.0001',
    ]


def test_the_html_is_the_text_and_needs_no_other_file(report: Report) -> None:
    page = report._repr_html_()
    assert f"OPTIMAL BATCH SIZE: {report.batch_size}" in page
    assert "http" not in page
    assert "<script" not in page


def full(report: Report, share: float, *, bound: str = "memory") -> Report:
    """The same report, as if the choice used this share of the card."""
    used = int(share * (report.device.total_bytes or 0))
    trials = tuple(
        dataclasses.replace(trial, used_bytes=used) if trial.batch_size == report.decision.batch_size else trial
        for trial in report.trials
    )
    decision = dataclasses.replace(report.decision, bound=bound)
    return dataclasses.replace(report, trials=trials, decision=decision)


def test_a_card_that_stays_empty_is_advised_about(report: Report) -> None:
    assert any("under 70 %" in sentence for sentence in full(report, 0.5).advice)
    assert not any("under 70 %" in sentence for sentence in full(report, 0.8).advice)


def test_a_card_that_is_too_full_is_warned_about(report: Report) -> None:
    assert any("over 95 %" in sentence for sentence in full(report, 0.97).advice)


def test_bf16_is_warned_about_on_a_t4_and_mentioned_on_an_a100(report: Report) -> None:
    in_bf16 = dataclasses.replace(report, workload=dataclasses.replace(report.workload, precision="bf16"))
    assert any("no bf16 units" in sentence for sentence in in_bf16.advice)
    ampere = dataclasses.replace(report, device=dataclasses.replace(report.device, compute_capability=80))
    assert any("--bf16" in sentence for sentence in ampere.advice)


def test_usual_totals_are_shown_only_where_no_effective_batch_was_asked_for(report: Report) -> None:
    assert not any("Tokens per optimizer step" in sentence for sentence in report.advice)
    free = dataclasses.replace(report, asked_effective_batch=False)
    assert any("Tokens per optimizer step" in sentence for sentence in free.advice)


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text("as it was")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(path, "\udcff")
    assert path.read_text() == "as it was"
    assert list(tmp_path.iterdir()) == [path]
