"""Claims about a report as HTML, which is complete, safe and self-contained, and about the files that the command line
writes.
"""

from __future__ import annotations

import base64
import dataclasses
import functools
import html
import importlib.util
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from hf_bsopt import Report, find_batch_size
from hf_bsopt.advice.result import Advice, Suggestion
from hf_bsopt.cli.main import FOUND, USAGE, main
from hf_bsopt.records import GpuSpec, Trial
from hf_bsopt.report import plots
from hf_bsopt.report.html import page
from hf_bsopt.report.text import size_rows

GPU = GpuSpec("2 GiB GPU", 2 * 2**30, 75, 40, 300 * 2**20)
VOID = {"meta", "br", "img", "source"}
HOSTILE = '<script>alert("&1")</script>'


class Reader(HTMLParser):
    """A parser that collects every tag with its attributes, the text, and the cells of each table row."""

    def __init__(self, document: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.rows: list[list[str]] = []
        self.feed(document)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th") and self.rows:
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            return
        self.text += data
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(autouse=True)
def fast_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the plots, which take a second each: most claims are not about them."""
    name = "<?xml version='1.0'?><svg>{} {} {}</svg>"
    draw = lambda pictures, format, theme="light": name.format(len(pictures), format, theme).encode()  # noqa: E731
    monkeypatch.setattr(plots, "rendered", draw)


@pytest.fixture(scope="module")
def report(once: Callable[..., Any]) -> Report:
    find = functools.partial(find_batch_size, "bert-tiny", gpu=GPU, device="predict", max_length=64, check=9)
    found: Report = once("report as html", find)
    return found


@pytest.fixture(scope="module")
def whole(report: Report) -> Reader:
    return Reader(page([(report, report.suggestions)]))


def verified(report: Report) -> Report:
    """Return the report as if real steps had been run."""
    ran = dataclasses.replace(
        report.chosen, source="measured", step_seconds=1.5, samples_per_second=20.0, tokens_per_second=1280.0
    )
    lost = Trial(report.batch_size + 8, "crash", None, None, "measured", detail="the step ended by <SIGSEGV>")
    return dataclasses.replace(report, trials=(*report.trials, ran, lost), checked=lost)


def is_self_contained(document: str) -> bool:
    """Return whether a document has no address, no script and no reference to a file."""
    reader = Reader(document)
    linked = [v for _, attributes in reader.tags for k, v in attributes.items() if k in ("src", "srcset", "href")]
    return (
        all(value is not None and value.startswith("data:image/svg+xml;base64,") for value in linked)
        and not {"script", "link", "iframe", "object"} & {tag for tag, _ in reader.tags}
        and not any(name.startswith("on") for _, attributes in reader.tags for name in attributes)
        and not any(word in re.sub(r"base64,[^\"]*", "", document) for word in ("http", "@import", "url("))
    )


def test_the_notebook_html_and_the_page_are_self_contained(report: Report) -> None:
    for each in (report, verified(report)):
        assert is_self_contained(each._repr_html_())
        assert is_self_contained(page([(each, each.suggestions)]))


def test_the_answer_and_the_table_are_on_the_page(report: Report, whole: Reader) -> None:
    titles, rows = size_rows(report)
    for reader in (Reader(report._repr_html_()), whole):
        assert f"OPTIMAL BATCH SIZE: {report.batch_size}" in reader.text
        assert f'CONFIG["batch_size"] = {report.batch_size}' in reader.text
        assert "Batch size 9 fits" in reader.text
        assert f"Why {report.reason}." in reader.text
        assert reader.rows[: len(rows) + 1] == [titles, *rows]


def test_the_row_of_the_chosen_size_is_highlighted(report: Report) -> None:
    (row,) = re.findall(r'<tr class="chosen">.*?</tr>', report._repr_html_())
    assert f"<td>{report.batch_size}</td>" in row
    assert "◀ chosen" in row


def test_the_composition_adds_up_to_the_used_memory(report: Report, whole: Reader) -> None:
    shown = {row[0]: row[1] for row in whole.rows}
    assert shown["total"] == f"{(report.chosen.used_bytes or 0) / 2**30:.2f} GiB"
    assert shown["weights"] == f"{report.composition['weights'] / 2**30:.2f} GiB"


def test_requested_suggestions_are_on_the_page(report: Report) -> None:
    now = Suggestion("now", "", 8, 1, 2**30, 2**31, 1.0, "")
    other = Suggestion("less & shorter", "--max_length 64", 16, 1, 2**30, 2**31, 0.5, "longer sequences are truncated")
    with_them = dataclasses.replace(report, suggestions=Advice(now, (other,), 0.9))
    assert html.escape(str(with_them.suggestions)) in page([(with_them, with_them.suggestions)])


def test_all_assumptions_and_all_advice_are_on_the_page(report: Report, whole: Reader) -> None:
    for sentence in (*report.workload.defaults, *report.notes, *report.advice):
        assert sentence in whole.text


def test_the_source_is_beside_the_answer(report: Report) -> None:
    assert '<span class="source">predicted</span>' in page([(report, report.suggestions)])
    document = page([(verified(report), None)])
    assert '<span class="source">measured</span>' in document
    assert f"Where the memory goes at {report.batch_size}, predicted" in document
    assert "Speed at" in Reader(document).text


def test_user_input_and_errors_are_escaped(report: Report) -> None:
    workload = dataclasses.replace(report.workload, model=HOSTILE)
    device = dataclasses.replace(report.device, name=HOSTILE)
    hostile = dataclasses.replace(verified(report), workload=workload, device=device, notes=(HOSTILE,))
    for document in (page([(hostile, None), (hostile, None)]), hostile._repr_html_()):
        assert is_self_contained(document)
        assert HOSTILE in Reader(document).text
        assert "the step ended by <SIGSEGV>" in Reader(document).text


def test_there_is_a_light_and_a_dark_plot_with_alternative_text(report: Report, whole: Reader) -> None:
    (dark,), (light,) = whole.named("source"), whole.named("img")
    assert dark["media"] == "(prefers-color-scheme: dark)"
    pictures = [base64.b64decode((value or "").split(",")[1]) for value in (dark["srcset"], light["src"])]
    assert all(picture.startswith(b"<?xml") and b"</svg>" in picture for picture in pictures)
    assert pictures[0] != pictures[1]
    assert str(report.batch_size) in (light["alt"] or "")


def test_without_matplotlib_the_page_has_no_plots_and_says_so(report: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None)
    reader = Reader(page([(report, report.suggestions)]))
    assert reader.named("img") == []
    assert "pip install matplotlib" in reader.text
    assert f"OPTIMAL BATCH SIZE: {report.batch_size}" in reader.text


def test_several_reports_are_one_page_with_a_table_of_the_answers_on_top(report: Report) -> None:
    longer = dataclasses.replace(report, workload=dataclasses.replace(report.workload, max_length=128))
    reader = Reader(page([(report, None), (longer, None)]))
    assert [row[:2] for row in reader.rows[1:3]] == [[n, str(report.batch_size)] for n in ("64", "128")]
    assert reader.text.count("OPTIMAL BATCH SIZE") == 2
    assert len(reader.named("img")) == 2


def test_a_checked_size_that_does_not_fit_is_on_the_page(report: Report) -> None:
    refused = dataclasses.replace(report, checked=Trial(999, "oom", None, None, "predicted"))
    assert "Batch size 999 does not fit: out of memory." in Reader(refused._repr_html_()).text


def test_a_file_has_the_whole_page(report: Report, tmp_path: Path) -> None:
    report.save_html(tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == page([(report, report.suggestions)])
    assert len(list(tmp_path.iterdir())) == 1


# ---- on the command line


def test_the_command_writes_all_lengths_into_one_plot_and_one_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture, document = tmp_path / "memory.png", tmp_path / "report.html"
    flags = ["--model", "bert-tiny", "--gpu", "2GiB", "--device", "predict", "--no_evaluation"]
    flags += ["--max_length", "16", "32", "--plot", str(picture), "--html", str(document)]
    assert main(flags) == FOUND
    assert b"<svg>2 png light<" in picture.read_bytes()
    assert Reader(document.read_text(encoding="utf-8")).text.count("OPTIMAL BATCH SIZE") == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["memory.png", "report.html"]
    assert capsys.readouterr().out.splitlines()[-1].startswith("  CONFIG[")  # the answer is last


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--plot", "memory.jpg"], "memory.png"),
        (["--plot", "/no/such/folder/memory.png"], "no folder"),
        (["--html", "/no/such/folder/report.html"], "no folder"),
        (["--html", ""], "not a file"),
    ],
)
def test_a_file_that_cannot_be_written_is_an_error_before_the_search(
    flags: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--model", "bert-tiny", *flags]) == USAGE
    streams = capsys.readouterr()
    assert named in streams.err
    assert streams.out == ""
