"""A Report as HTML: what a notebook shows of it, and a page of its own with pictures. Nothing is loaded from elsewhere
and nothing runs: styles are in the page, pictures are data. Light or dark as the reader's system is.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._utils.files import write_atomically
from . import plots
from .report import percent
from .text import (
    EXPECTED_PARTS,
    answer_sentences,
    checked_sentence,
    config_lines,
    failure_sentences,
    gib,
    proof_sentences,
    size_rows,
    subject_rows,
)

if TYPE_CHECKING:
    from .report import Report

# Only mid tones and what is inherited: a notebook's ground may be light or dark, whatever the system says.
FRAGMENT_STYLE = """
.hf-bsopt { font-variant-numeric: tabular-nums; line-height: 1.4; max-width: 52rem; }
.hf-bsopt table { border-collapse: collapse; margin: .6em 0; }
.hf-bsopt caption { text-align: left; font-weight: 600; padding: .3em 0; }
.hf-bsopt th, .hf-bsopt td { padding: .2em .8em; text-align: right; white-space: nowrap;
  border-bottom: 1px solid #8884; }
.hf-bsopt tr > :last-child { text-align: left; }
.hf-bsopt .parts td:first-child, .hf-bsopt .named tr > * { text-align: left; vertical-align: top; }
.hf-bsopt .named td { white-space: normal; }
.hf-bsopt .chosen td { font-weight: 700; background: #8882; }
.hf-bsopt .answer { font-size: 1.25em; font-weight: 700; margin: .2em 0; }
.hf-bsopt .source { font-size: .7em; font-weight: 600; border: 1px solid; border-radius: 1em; padding: .1em .7em;
  margin-left: .5em; vertical-align: middle; }
.hf-bsopt .gauge { position: relative; height: .9em; border: 1px solid #888; max-width: 30rem; margin: .5em 0; }
.hf-bsopt .gauge > * { position: absolute; top: 0; bottom: 0; }
.hf-bsopt .gauge .target { background: #8886; }
.hf-bsopt .gauge .used { background: #0072B2; left: 0; top: .2em; bottom: .2em; }
.hf-bsopt .bar { display: inline-block; height: .7em; background: #0072B2; vertical-align: middle; }
.hf-bsopt pre { padding: .5em .8em; background: #8882; overflow-x: auto; }
.hf-bsopt .wide { overflow-x: auto; }
.hf-bsopt ul { padding-left: 1.2em; }
"""
PAGE_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; padding: 1rem; max-width: 60rem;
  color: #1b1f24; background: #ffffff; }
h1 { font-size: 1.5rem; margin: .4em 0; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 1.6em 0 .3em; border-top: 1px solid #8886; padding-top: 1em; overflow-wrap: anywhere; }
.hf-bsopt { max-width: none; }
img { display: block; width: 100%; max-width: 50rem; height: auto; margin: 1em 0; }
footer { margin-top: 2em; font-size: .85rem; color: #667; }
@media (prefers-color-scheme: dark) { body { color: #e8e8e8; background: #16191d; } footer { color: #99a; } }
@media print { details > * { display: block; } }
"""


def fragment(report: Report) -> str:
    """What a notebook shows: the answer, what leads to it, the sizes, where the memory goes."""
    return f'<div class="hf-bsopt"><style>{FRAGMENT_STYLE}</style>{_contents(report)}</div>'


def page(reports: Sequence[Report]) -> str:
    """A whole document of one or more reports."""
    model = subject_rows(reports[0])[0][1]
    sizes = ", ".join(str(report.batch_size) for report in reports)
    title = _text(f"Batch size {sizes} for {model} on {reports[0].device.name}")
    sections = []
    for report in reports:
        heading = (
            f"<h2>{_text(f'{report.workload.length} tokens: {report.batch_size}')}</h2>" if len(reports) > 1 else ""
        )
        sections.append(f'<section class="hf-bsopt">{heading}{_contents(report, _pictures(report))}</section>')
    overview = _overview(reports) if len(reports) > 1 else ""
    versions = reports[0].to_dict()
    made_with = ", ".join(
        f"{name} {versions[name]}" for name in ("hf_bsopt", "torch", "transformers") if versions[name]
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{FRAGMENT_STYLE}{PAGE_STYLE}</style>\n</head>\n<body>\n<h1>{title}</h1>\n"
        f"{overview}{''.join(sections)}\n<footer>{_text(made_with)}</footer>\n</body>\n</html>\n"
    )


def save(reports: Sequence[Report], path: Path) -> None:
    """Writes :func:`page`, whole or not at all."""
    write_atomically(path, page(reports))


def _contents(report: Report, pictures: str = "") -> str:
    refused = report.checked if report.checked is not None and not report.checked.fits else None
    sentences = [*answer_sentences(report), *([checked_sentence(report, refused)] if refused else [])]
    proof = [*failure_sentences(report), *proof_sentences(report)]
    return (
        f'<p class="answer">✅ OPTIMAL BATCH SIZE: {report.batch_size}'
        f'<span class="source">{_text(report.source)}</span></p>'
        f"{_gauge(report)}<p>{'<br>'.join(map(_text, sentences))}</p>"
        f"<pre>{_text(chr(10).join(config_lines(report)))}</pre>"
        f"{pictures}{_size_table(report)}"
        f"{'<p>' + '<br>'.join(map(_text, proof)) + '</p>' if proof else ''}"
        f"{_composition_table(report)}{_ways_out(report)}{_list(report.advice)}{_asked(report)}"
    )


def _ways_out(report: Report) -> str:
    return "" if report.ways_out is None else f"<pre>{_text(report.ways_out)}</pre>"


def _gauge(report: Report) -> str:
    """How full the device is, and the target, as a bar; said in words beside it."""
    low, high = report.target
    used = min(1.0, report.utilization)
    return (
        f'<div class="gauge" role="img" aria-label="{_text(percent(report.utilization))} used">'
        f'<div class="target" style="left:{low:.1%};width:{high - low:.1%}"></div>'
        f'<div class="used" style="width:{used:.1%}"></div></div>'
    )


def _size_table(report: Report) -> str:
    titles, rows = size_rows(report)
    lines = [_row(cells, ' class="chosen"' if cells[0] == str(report.decision.batch_size) else "") for cells in rows]
    head = "".join(f'<th scope="col">{_text(title)}</th>' for title in titles)
    return _table("Sizes", f"<thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody>")


def _composition_table(report: Report) -> str:
    if not report.composition:
        return ""
    total = report.device.total_bytes or 1
    lines = []
    for name, size in report.composition.items():
        if size or name in EXPECTED_PARTS:
            bar = f'<span class="bar" style="width:{14 * max(0.0, size / total):.2f}em"></span>'
            lines.append(f"<tr>{_cells([name, gib(size), percent(size / total)])}<td>{bar}</td></tr>")
    together = sum(report.composition.values())
    lines.append(_row(["together", gib(together), percent(together / total), ""]))
    label = ", predicted" if report.ran else f", {report.source}"
    caption = f"Where the memory goes at {report.decision.batch_size}{label}"
    return _table(caption, f"<tbody>{''.join(lines)}</tbody>", "parts")


def _asked(report: Report) -> str:
    rows = "".join(f'<tr><th scope="row">{_text(name)}</th><td>{_text(value)}</td></tr>' for name, value in
                   subject_rows(report))  # fmt: skip
    notes = _list((*report.workload.defaults, *report.notes))
    table = f'<table class="named"><tbody>{rows}</tbody></table>'
    return f"<details><summary>What was asked, and what was assumed</summary>{table}{notes}</details>"


def _overview(reports: Sequence[Report]) -> str:
    """The answers of several lengths beside each other."""
    rows = "".join(
        _row([
            f"{report.workload.length:,}",
            str(report.batch_size),
            gib(report.chosen.used_bytes),
            percent(report.utilization),
            report.source,
        ])
        for report in reports
    )  # fmt: skip
    titles = ["tokens", "batch size", "used", f"of {reports[0].memory}", "known"]
    head = "".join(f'<th scope="col">{_text(title)}</th>' for title in titles)
    table = _table("In short", f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody>")
    return f'<section class="hf-bsopt">{table}</section>'


def _pictures(report: Report) -> str:
    if not plots.is_possible():
        return "<p>There are no pictures here, since matplotlib is missing: pip install matplotlib</p>"
    light, dark = (_data(plots.rendered([report.drawing], "svg", theme)) for theme in ("light", "dark"))  # type: ignore[arg-type]
    words = (
        f"Memory against batch size: {report.batch_size} uses {gib(report.chosen.used_bytes)} of "
        f"{gib(report.device.total_bytes)}, {report.source}. Below it, where the memory goes over a training step."
    )
    return (
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img src="{light}" alt="{_text(words)}"></picture>'
    )


def _data(svg: bytes) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg).decode("ascii")


def _table(caption: str, rows: str, kind: str = "") -> str:
    return f'<div class="wide {kind}"><table><caption>{_text(caption)}</caption>{rows}</table></div>'


def _row(cells: Sequence[str], attributes: str = "") -> str:
    return f"<tr{attributes}>{_cells(cells)}</tr>"


def _cells(cells: Sequence[str]) -> str:
    return "".join(f"<td>{_text(cell)}</td>" for cell in cells)


def _list(sentences: Sequence[str]) -> str:
    items = "".join(f"<li>{_text(sentence)}</li>" for sentence in sentences)
    return f"<ul>{items}</ul>" if items else ""


def _text(value: Any) -> str:
    return html.escape(str(value))
