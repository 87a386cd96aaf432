"""A table of batch sizes as text (at most 78 columns wide), Markdown or CSV."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

WIDTH = 78
MODEL_WIDTH = 26
OPTIONS = ("task", "precision", "optimizer", "attention")
"""Columns that the caption names if they are the same in all rows."""


def table_text(frame: pd.DataFrame) -> str:
    """Format the table for a terminal: what all rows have in common, then one part for each GPU."""
    parts = ["\n".join([_wrapped(_caption(frame), ""), *(_wrapped(f"· {note}", "  ") for note in _assumed(frame))])]
    for gpu, rows in _by_gpu(frame):
        header = f"{'model':{MODEL_WIDTH}} {'params':>7} {'length':>6} {'optimal':>7} {'max (risky)':>11} {'safe':>5}"
        lines = [gpu, f"{header} {'VRAM':>5}"]
        notes = _Notes()
        for row in rows:
            sizes = f"{_size(row['optimal']):>7} {_size(row['max_risky']):>11} {_size(row['safe']):>5}"
            share = _share(row["utilization"])
            lines.append(
                f"{_shortened(row['model']):{MODEL_WIDTH}} {_millions(row['parameters']):>7} "
                f"{_size(row['max_length']):>6} {sizes} {share:>5}{notes.mark(row)}"
            )
        lines += [_wrapped(note, "    ") for note in notes.lines()]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def table_markdown(frame: pd.DataFrame) -> str:
    """Format the table as Markdown."""
    parts = [_caption(frame), *_assumed(frame)]
    for gpu, rows in _by_gpu(frame):
        lines = [
            f"### {gpu}",
            "",
            "| Model | Params | Max length | Optimal | Max (risky) | Safe fallback | VRAM |",
            "|---|---:|---:|---:|---:|---:|---:|",
        ]
        notes = _Notes()
        for row in rows:
            mark = notes.mark(row)
            optimal = _size(row["optimal"])
            cells = [
                row["model"],
                _millions(row["parameters"]),
                _size(row["max_length"]),
                f"**{optimal}**" if row["optimal"] is not None else f"{optimal}{mark}",
                _size(row["max_risky"]),
                _size(row["safe"]),
                _share(row["utilization"]) + (mark if row["optimal"] is not None else ""),
            ]
            lines.append("| " + " | ".join(cells) + " |")
        lines += ["", *notes.lines()] if notes.lines() else []
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def table_csv(frame: pd.DataFrame) -> str:
    """Format all columns as CSV."""
    return str(frame.to_csv(index=False)).rstrip("\n")


FORMATS: dict[str, Callable[[pd.DataFrame], str]] = {"text": table_text, "markdown": table_markdown, "csv": table_csv}


class _Notes:
    """Footnotes: why there is no size, or a warning about it. Each sentence is listed once, under a number."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def mark(self, row: dict[str, Any]) -> str:
        """Return the footnote mark of a row, such as " [1]", or an empty string."""
        why = row["why"] if row["optimal"] is None else row["why"].partition("; ")[2]
        return f" [{self._numbers.setdefault(why, len(self._numbers) + 1)}]" if why else ""

    def lines(self) -> list[str]:
        return [f"[{number}] {why}" for why, number in self._numbers.items()]


def _caption(frame: pd.DataFrame) -> str:
    """Return what all rows have in common, and what the columns mean."""
    given = [value for name in OPTIONS if (value := _only(frame[name])) is not None]
    target = frame.attrs.get("target")
    meaning = ""
    if target is not None:
        multiple = frame.attrs["multiple_of"]
        what = f"largest multiple of {multiple}" if multiple > 1 else "largest size"
        meaning = (
            f" Optimal: {what} that uses at most {target[1]:.0%} of the GPU's memory; safe: at most 70%; "
            f"max: the largest that fits at all."
        )
    return f"Predicted batch sizes{' for ' + ', '.join(given) if given else ''}.{meaning}"


def _assumed(frame: pd.DataFrame) -> list[str]:
    notes: list[str] = frame.attrs.get("notes", [])
    return notes


def _only(column: pd.Series) -> str | None:
    values = set(column.dropna())
    return str(values.pop()) if len(values) == 1 else None


def _by_gpu(frame: pd.DataFrame) -> list[tuple[str, list[dict[str, Any]]]]:
    """Return (heading, rows) for each GPU, with None for missing values."""
    parts = []
    for (gpu, memory), rows in frame.groupby(["gpu", "memory_gib"], sort=False):
        whole = rows.astype(object).where(rows.notna(), None)
        parts.append((f"{gpu}, {memory:.2f} GiB", whole.to_dict("records")))
    return parts


def _size(value: Any) -> str:
    return "–" if value is None else str(value)


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value * 100:.0f} %"


def _millions(parameters: int | None) -> str:
    if parameters is None:
        return "–"
    return f"{parameters / 1e6:.0f}M" if parameters < 9.995e8 else f"{parameters / 1e9:.2f}B"


def _shortened(model: str) -> str:
    """Shorten a name to its end, which is more specific than its owner."""
    return model if len(model) <= MODEL_WIDTH else "…" + model[-(MODEL_WIDTH - 1) :]


def _wrapped(text: str, indent: str) -> str:
    return textwrap.fill(text, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
