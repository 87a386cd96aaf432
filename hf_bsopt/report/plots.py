"""A report as a picture: memory against the batch size, over throughput where it was measured, over the training step.

Nothing here switches the backend: a notebook's own figure is made by pyplot, a file is drawn on a canvas of its own.
What was predicted, rehearsed and measured differs in colour, in shape and in words.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from .._utils.files import writable, write_atomically
from ..errors import MissingExtraError, UsageError
from .plot_panels import Drawing, draw_memory, draw_throughput
from .plot_step import draw_step

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

Theme = Literal["light", "dark"]

FORMATS = (".png", ".svg", ".pdf")
STYLES: dict[Theme, list[str]] = {"light": ["default"], "dark": ["default", "dark_background"]}
DARK_PAPER = "#16191d"
WIDTH_INCHES = 8.0
DOTS_PER_INCH = 120
HEIGHTS_INCHES = {"memory": 4.2, "throughput": 1.7, "step": 3.2}
PICTURES_IN_A_ROW = 2


def is_possible() -> bool:
    """Whether matplotlib is there."""
    return importlib.util.find_spec("matplotlib") is not None


def require_matplotlib() -> None:
    """Raises MissingExtraError where it is not."""
    if not is_possible():
        raise MissingExtraError("pictures need matplotlib: pip install matplotlib")


def check_file(path: Path) -> None:
    """Raises UsageError, before anything is searched for, where no picture could be written."""
    if path.suffix.lower() not in FORMATS:
        raise UsageError(f"a picture is a {', '.join(FORMATS)} file, not {str(path)!r}; for example memory.png")
    require_matplotlib()
    writable(path)


def plot(drawing: Drawing, ax: Axes | None = None) -> Axes:
    """The axes of memory against batch size: those that are given, or new ones over the other panels."""
    require_matplotlib()
    with _plain_text():
        if ax is not None:
            draw_memory(ax, drawing)
            return ax
        from matplotlib import pyplot

        return _draw(pyplot.figure(figsize=(WIDTH_INCHES, _height(drawing)), layout="constrained"), drawing)


def plot_step(drawing: Drawing, ax: Axes | None = None) -> Axes:
    """The axes of memory over one training step. Raises UsageError where the step was not traced."""
    require_matplotlib()
    if drawing.memory_profile is None:
        raise UsageError("this report knows nothing of the memory over the step: nothing was predicted")
    with _plain_text():
        if ax is None:
            from matplotlib import pyplot

            ax = pyplot.figure(figsize=(WIDTH_INCHES, HEIGHTS_INCHES["memory"]), layout="constrained").add_subplot()
        draw_step(ax, drawing, drawing.memory_profile)
    return ax


def save(drawings: Sequence[Drawing], path: Path) -> None:
    """All of them in one file, beside each other; whole or not at all."""
    check_file(path)
    write_atomically(path, rendered(drawings, path.suffix.lower().lstrip(".")))


def rendered(drawings: Sequence[Drawing], format: str, theme: Theme = "light") -> bytes:
    """The file's content, in matplotlib's own style whatever the user's is. ``format``: "png", "svg" or "pdf"."""
    require_matplotlib()
    from matplotlib import rc_context, style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(len(drawings), PICTURES_IN_A_ROW)
    rows = -(-len(drawings) // columns)
    height = max(map(_height, drawings))
    settings = {"svg.fonttype": "path", "svg.hashsalt": "hf-bsopt"}
    if theme == "dark":
        settings |= {"figure.facecolor": DARK_PAPER, "axes.facecolor": DARK_PAPER, "savefig.facecolor": DARK_PAPER}
    with style.context(STYLES[theme]), rc_context(settings), _plain_text():
        figure = Figure(figsize=(columns * WIDTH_INCHES, rows * height), layout="constrained")
        FigureCanvasAgg(figure)
        parts = figure.subfigures(rows, columns, squeeze=False).flat
        for part, drawing in zip(parts, drawings, strict=False):
            _draw(part, drawing)
        buffer = io.BytesIO()
        undated = {} if format == "png" else {"CreationDate" if format == "pdf" else "Date": None}
        figure.savefig(buffer, format=format, dpi=DOTS_PER_INCH, metadata=undated)
    return buffer.getvalue()


def _draw(figure: Figure | SubFigure, drawing: Drawing) -> Axes:
    """Every panel there is something to show in; returns the one of memory against batch size."""
    names = panels(drawing)
    grid = figure.add_gridspec(len(names), 1, height_ratios=[HEIGHTS_INCHES[name] for name in names])
    memory = figure.add_subplot(grid[0])
    draw_memory(memory, drawing)
    for row, name in enumerate(names):
        if name == "throughput":
            draw_throughput(figure.add_subplot(grid[row], sharex=memory), drawing)
            memory.tick_params(labelbottom=False)
            memory.set_xlabel("")
        elif name == "step" and drawing.memory_profile is not None:
            draw_step(figure.add_subplot(grid[row]), drawing, drawing.memory_profile)
    return memory


def panels(drawing: Drawing) -> list[str]:
    """Those that there is something to show in."""
    names = ["memory"]
    if any(trial.samples_per_second for trial in drawing.trials):
        names.append("throughput")
    if drawing.memory_profile is not None and drawing.memory_profile.moments:
        names.append("step")
    return names


def _height(drawing: Drawing) -> float:
    return sum(HEIGHTS_INCHES[name] for name in panels(drawing))


@contextlib.contextmanager
def _plain_text() -> Iterator[None]:
    """Names that users typed are no TeX."""
    from matplotlib import rc_context

    with rc_context({"text.usetex": False, "text.parse_math": False}):
        yield
