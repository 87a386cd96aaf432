"""Plots of a report: memory against batch size, measured throughput, and memory over one training step.

The matplotlib backend is never switched: a figure in a notebook is made by pyplot, a file is drawn on a canvas of its
own. Predicted, rehearsed and measured sizes differ in colour, in shape and in the legend.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from .._utils.files import check_writable, write_atomically
from ..errors import MissingExtraError, UsageError
from .plot_data import PlotData
from .plot_panels import draw_memory, draw_throughput
from .plot_step import draw_step

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

Theme = Literal["light", "dark"]

FORMATS = (".png", ".svg", ".pdf")
STYLES: dict[Theme, list[str]] = {"light": ["default"], "dark": ["default", "dark_background"]}
DARK_BACKGROUND = "#16191d"
WIDTH_INCHES = 8.0
DOTS_PER_INCH = 120
HEIGHTS_INCHES = {"memory": 4.2, "throughput": 1.7, "step": 3.2}
PLOTS_PER_ROW = 2


def is_possible() -> bool:
    """Return whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def require_matplotlib() -> None:
    """Raise MissingExtraError if matplotlib is not installed."""
    if not is_possible():
        raise MissingExtraError("plots need matplotlib: pip install matplotlib")


def check_file(path: Path) -> None:
    """Raise UsageError if no plot can be written to ``path``. Called before the search.

    Raises MissingExtraError without matplotlib.
    """
    check_suffix(path)
    require_matplotlib()
    check_writable(path)


def check_suffix(path: Path) -> None:
    """Raise UsageError unless the name ends as that of a plot."""
    if path.suffix.lower() not in FORMATS:
        raise UsageError(f"a plot is a {', '.join(FORMATS)} file, not {str(path)!r}; for example memory.png")


def plot(data: PlotData, ax: Axes | None = None) -> Axes:
    """Plot memory against batch size into the given axes, or into a new figure with all panels. Return these axes."""
    require_matplotlib()
    with _plain_text():
        if ax is not None:
            draw_memory(ax, data)
            return ax
        from matplotlib import pyplot

        return _draw(pyplot.figure(figsize=(WIDTH_INCHES, _height(data)), layout="constrained"), data)


def plot_step(data: PlotData, ax: Axes | None = None) -> Axes:
    """Plot memory over one training step and return its axes. Raises UsageError if no step was traced."""
    require_matplotlib()
    if data.memory_profile is None:
        raise UsageError("there is no memory over the step in this report: nothing was predicted")
    with _plain_text():
        if ax is None:
            from matplotlib import pyplot

            ax = pyplot.figure(figsize=(WIDTH_INCHES, HEIGHTS_INCHES["memory"]), layout="constrained").add_subplot()
        draw_step(ax, data, data.memory_profile)
    return ax


def save(plotted: Sequence[PlotData], path: Path) -> None:
    """Write all plots side by side into one file, which is replaced atomically."""
    check_suffix(path)
    write_atomically(path, rendered(plotted, path.suffix.lower().lstrip(".")))


def rendered(plotted: Sequence[PlotData], format: str, theme: Theme = "light") -> bytes:
    """Return the content of a file, in matplotlib's default style. ``format``: "png", "svg" or "pdf"."""
    require_matplotlib()
    from matplotlib import rc_context, style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(len(plotted), PLOTS_PER_ROW)
    rows = -(-len(plotted) // columns)
    height = max(map(_height, plotted))
    settings = {"svg.fonttype": "path", "svg.hashsalt": "hf-bsopt"}
    if theme == "dark":
        settings |= {
            "figure.facecolor": DARK_BACKGROUND,
            "axes.facecolor": DARK_BACKGROUND,
            "savefig.facecolor": DARK_BACKGROUND,
        }
    with style.context(STYLES[theme]), rc_context(settings), _plain_text():
        figure = Figure(figsize=(columns * WIDTH_INCHES, rows * height), layout="constrained")
        FigureCanvasAgg(figure)
        parts = figure.subfigures(rows, columns, squeeze=False).flat
        for part, data in zip(parts, plotted, strict=False):
            _draw(part, data)
        buffer = io.BytesIO()
        undated = {} if format == "png" else {"CreationDate" if format == "pdf" else "Date": None}
        figure.savefig(buffer, format=format, dpi=DOTS_PER_INCH, metadata=undated)
    return buffer.getvalue()


def _draw(figure: Figure | SubFigure, data: PlotData) -> Axes:
    """Draw every panel for which there is data, and return the axes of memory against batch size."""
    names = panels(data)
    grid = figure.add_gridspec(len(names), 1, height_ratios=[HEIGHTS_INCHES[name] for name in names])
    memory = figure.add_subplot(grid[0])
    draw_memory(memory, data)
    for row, name in enumerate(names):
        if name == "throughput":
            draw_throughput(figure.add_subplot(grid[row], sharex=memory), data)
            memory.tick_params(labelbottom=False)
            memory.set_xlabel("")
        elif name == "step" and data.memory_profile is not None:
            draw_step(figure.add_subplot(grid[row]), data, data.memory_profile)
    return memory


def panels(data: PlotData) -> list[str]:
    """Return the names of the panels for which there is data."""
    names = ["memory"]
    if any(trial.samples_per_second for trial in data.trials):
        names.append("throughput")
    if data.memory_profile is not None and data.memory_profile.moments:
        names.append("step")
    return names


def _height(data: PlotData) -> float:
    return sum(HEIGHTS_INCHES[name] for name in panels(data))


@contextlib.contextmanager
def _plain_text() -> Iterator[None]:
    """Turn off TeX and math: names are shown as the user typed them."""
    from matplotlib import rc_context

    with rc_context({"text.usetex": False, "text.parse_math": False}):
        yield
