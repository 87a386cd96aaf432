"""A Report as HTML: the output of a notebook cell, and a self-contained page with plots.

Nothing is loaded from elsewhere and no script runs: styles are in the page, plots are data URIs. The page is light or
dark as the reader's system is.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .._utils.files import write_atomically
from .._utils.package_versions import package_version
from ..advice.result import Advice
from ..search.answer import Answer
from . import plots
from .plot_data import PlotData
from .text import (
    EXPECTED_PARTS,
    answer_sentences,
    checked_sentence,
    config_lines,
    failure_sentences,
    size_rows,
    subject_rows,
    verification_sentences,
)
from .wording import answer_line, gib, hints, memory_name, percent, warnings

Item = tuple[Answer, Advice | None]
"""An answer, and the advice if it was requested."""

# Mid tones and inherited colours only: a notebook may be light or dark, whatever the system's setting.
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


def fragment(answer: Answer, suggestions: Advice | None = None) -> str:
    """Return the HTML for a notebook: the answer with its reasons, the sizes, the composition of the memory."""
    return f'<div class="hf-bsopt"><style>{FRAGMENT_STYLE}</style>{_contents(answer, suggestions)}</div>'


def page(items: Sequence[Item]) -> str:
    """Return an HTML document with one or more reports."""
    answers = [answer for answer, _ in items]
    model = subject_rows(answers[0])[0][1]
    sizes = ", ".join(str(answer.batch_size) for answer in answers)
    title = _text(f"Batch size {sizes} for {model} on {answers[0].device.name}")
    sections = []
    for answer, suggestions in items:
        heading = (
            f"<h2>{_text(f'{answer.workload.length} tokens: {answer.batch_size}')}</h2>" if len(answers) > 1 else ""
        )
        sections.append(
            f'<section class="hf-bsopt">{heading}{_contents(answer, suggestions, _pictures(answer))}</section>'
        )
    overview = _overview(answers) if len(answers) > 1 else ""
    versions = {name: package_version(name) for name in ("hf-bsopt", "torch", "transformers")}
    made_with = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{FRAGMENT_STYLE}{PAGE_STYLE}</style>\n</head>\n<body>\n<h1>{title}</h1>\n"
        f"{overview}{''.join(sections)}\n<footer>{_text(made_with)}</footer>\n</body>\n</html>\n"
    )


def save(items: Sequence[Item], path: Path) -> None:
    """Write :func:`page` to a file, which is replaced atomically."""
    write_atomically(path, page(items))


def _contents(answer: Answer, suggestions: Advice | None, pictures: str = "") -> str:
    refused = answer.checked if answer.checked is not None and not answer.checked.fits else None
    sentences = [*answer_sentences(answer), *([checked_sentence(answer, refused)] if refused else [])]
    advice = [*warnings(answer, has_suggestions=suggestions is not None), *hints(answer)]
    verification = [*failure_sentences(answer), *verification_sentences(answer)]
    return (
        f'<p class="answer">{answer_line(answer)}'
        f'<span class="source">{_text(answer.source)}</span></p>'
        f"{_gauge(answer)}<p>{'<br>'.join(map(_text, sentences))}</p>"
        f"<pre>{_text(chr(10).join(config_lines(answer)))}</pre>"
        f"{pictures}{_size_table(answer)}"
        f"{'<p>' + '<br>'.join(map(_text, verification)) + '</p>' if verification else ''}"
        f"{_composition_table(answer)}{_suggestions(suggestions)}{_list(advice)}{_inputs(answer)}"
    )


def _suggestions(suggestions: Advice | None) -> str:
    return "" if suggestions is None else f"<pre>{_text(suggestions)}</pre>"


def _gauge(answer: Answer) -> str:
    """Return a bar with the utilization of the device and the target."""
    low, high = answer.target
    used = min(1.0, answer.utilization)
    return (
        f'<div class="gauge" role="img" aria-label="{_text(percent(answer.utilization))} used">'
        f'<div class="target" style="left:{low:.1%};width:{high - low:.1%}"></div>'
        f'<div class="used" style="width:{used:.1%}"></div></div>'
    )


def _size_table(answer: Answer) -> str:
    titles, rows = size_rows(answer)
    lines = [_row(cells, ' class="chosen"' if cells[0] == str(answer.decision.batch_size) else "") for cells in rows]
    head = "".join(f'<th scope="col">{_text(title)}</th>' for title in titles)
    return _table("Sizes", f"<thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody>")


def _composition_table(answer: Answer) -> str:
    if not answer.composition:
        return ""
    total = answer.device.total_bytes or 1
    lines = []
    for name, size in answer.composition.items():
        if size or name in EXPECTED_PARTS:
            bar = f'<span class="bar" style="width:{14 * max(0.0, size / total):.2f}em"></span>'
            lines.append(f"<tr>{_cells([name, gib(size), percent(size / total)])}<td>{bar}</td></tr>")
    total_used = sum(answer.composition.values())
    lines.append(_row(["total", gib(total_used), percent(total_used / total), ""]))
    label = ", predicted" if answer.ran else f", {answer.source}"
    caption = f"Where the memory goes at {answer.decision.batch_size}{label}"
    return _table(caption, f"<tbody>{''.join(lines)}</tbody>", "parts")


def _inputs(answer: Answer) -> str:
    rows = "".join(f'<tr><th scope="row">{_text(name)}</th><td>{_text(value)}</td></tr>' for name, value in
                   subject_rows(answer))  # fmt: skip
    notes = _list((*answer.workload.defaults, *answer.notes))
    table = f'<table class="named"><tbody>{rows}</tbody></table>'
    return f"<details><summary>Inputs and assumptions</summary>{table}{notes}</details>"


def _overview(answers: Sequence[Answer]) -> str:
    """Return a table of the answers for several lengths."""
    rows = "".join(
        _row([
            f"{answer.workload.length:,}",
            str(answer.batch_size),
            gib(answer.chosen.used_bytes),
            percent(answer.utilization),
            answer.source,
        ])
        for answer in answers
    )  # fmt: skip
    titles = ["tokens", "batch size", "used", f"of {memory_name(answers[0])}", "source"]
    head = "".join(f'<th scope="col">{_text(title)}</th>' for title in titles)
    table = _table("Summary", f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody>")
    return f'<section class="hf-bsopt">{table}</section>'


def _pictures(answer: Answer) -> str:
    if not plots.is_possible():
        return "<p>The plots are missing, since matplotlib is not installed: pip install matplotlib</p>"
    light, dark = (_data(plots.rendered([PlotData.of(answer)], "svg", theme)) for theme in ("light", "dark"))  # type: ignore[arg-type]
    description = (
        f"Memory against batch size: {answer.batch_size} uses {gib(answer.chosen.used_bytes)} of "
        f"{gib(answer.device.total_bytes)}, {answer.source}. Below it, memory over one training step."
    )
    return (
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img src="{light}" alt="{_text(description)}"></picture>'
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
