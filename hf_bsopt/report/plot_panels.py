"""The panels of memory and throughput against batch size, each drawn into given axes.

Matplotlib is imported only when a panel is drawn. The colours are those of Okabe and Ito, which can be distinguished
with any kind of colour vision, and lighter ones on a dark background.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..records import Source, Trial
from .plot_data import PlotData

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MIB, GIB = 2**20, 2**30
SOURCES: tuple[Source, ...] = ("predicted", "rehearsed", "measured")
COLOURS: dict[bool, dict[str, str]] = {  # by whether the background is dark
    False: {"predicted": "#0072B2", "rehearsed": "#007F5F", "measured": "#D55E00"},
    True: {"predicted": "#56B4E9", "rehearsed": "#3DDBAA", "measured": "#FF9248"},
}
MARKERS = {"predicted": "o", "rehearsed": "s", "measured": "D"}
OVER, TOP = 1.06, 1.15
"""Fractions of the capacity: the height of a size that does not fit, and the top of the panel."""
LINEAR_FROM = 1 / 8
"""Fraction of the largest size: below it the optimizer step may need more memory than the batch does."""
RING = "recommended"
LONGEST_DEVICE, TITLE = 20, 88
"""Longest name of a device, and longest title, in characters."""
NARROW_BAND = 0.05
"""Fraction of the memory: a narrower target is labelled under the band, not in it."""
CLEARANCE = 0.05
"""Fraction of the capacity: points closer under the target than this would run into its label."""
LABEL_WIDTH, ANNOTATION_WIDTH = 0.28, 0.35
"""Fractions of the width that the label of the target and that of the recommendation need."""


@dataclass(frozen=True)
class UsedLine:
    """A linear fit: used memory is about fixed_bytes + bytes_each × batch size."""

    fixed_bytes: float
    bytes_each: float
    source: str

    def __str__(self) -> str:
        each = self.bytes_each / MIB
        per_sequence = f"{each:.0f}" if each >= 10 else f"{each:.2g}"
        return f"line: {self.fixed_bytes / GIB:.2f} GiB fixed + {per_sequence} MiB a sequence"


def used_line(trials: Sequence[Trial]) -> UsedLine | None:
    """Fit a least-squares line through the predicted sizes or, without a prediction, through those that ran.

    None if there are fewer than two sizes.
    """
    for sources in (("predicted",), ("measured",), ("rehearsed",)):
        points = {t.batch_size: t.used_bytes for t in trials if t.source in sources and t.fits and t.used_bytes}
        linear = [size for size in points if size >= LINEAR_FROM * max(points)]
        sizes = linear if len(linear) > 1 else list(points)
        if len(sizes) > 1:
            each, fixed = np.polyfit(sizes, [points[size] for size in sizes], 1)
            return UsedLine(float(fixed), float(each), sources[0])
    return None


def untested(data: PlotData) -> tuple[int, int] | None:
    """Return (first, last) of the sizes between the largest that ran and the smallest that does not fit.

    None if nothing was run or there are no sizes between.
    """
    ran = [trial for trial in data.trials if trial.source != "predicted"]
    if not ran:
        return None
    good = max((trial.batch_size for trial in ran if trial.fits), default=0)
    above = [trial.batch_size for trial in ran if not trial.fits and trial.batch_size > good]
    bad = min(above, default=data.largest + 1)
    return (good + 1, bad - 1) if bad - good > 1 else None


def short(name: str, longest: int) -> str:
    """Shorten a name to its end, which is its most specific part."""
    return name if len(name) <= longest else "…" + name[1 - longest :]


# -- memory against the batch size ---------------------------------------------------------------------------------


def draw_memory(ax: Axes, data: PlotData) -> None:
    """Draw the sizes, the fitted line, the capacity, the target, the recommended size and the untested sizes."""
    ink, colours = ink_of(ax), COLOURS[is_dark(ax)]
    capacity = data.total_bytes / GIB
    right = 1.04 * max(trial.batch_size for trial in data.trials)
    ax.set_xlim(0, right)
    ax.set_ylim(0, TOP * capacity)
    _draw_limits(ax, data, ink)
    line = used_line(data.trials)
    if line is not None:
        ends = np.array([0, right])
        used = (line.fixed_bytes + line.bytes_each * ends) / GIB
        colour = colours[line.source]
        ax.plot(ends, used, linestyle=(0, (5, 3)), linewidth=1.1, color=colour, label=str(line), zorder=2)
        ax.plot([0], [used[0]], marker="_", markersize=14, markeredgewidth=2, color=colour, clip_on=False)
    for source in SOURCES:
        of_source = [trial for trial in data.trials if trial.source == source]
        _draw_trials(ax, of_source, source, colours[source], capacity)
    gap = untested(data)
    if gap is not None:
        label = f"not run: {gap[0]} to {gap[1]}" if gap[0] < gap[1] else f"not run: {gap[0]}"
        ax.axvspan(
            gap[0] - 0.5,
            gap[1] + 0.5,
            facecolor="none",
            edgecolor=ink,
            alpha=0.25,
            hatch="///",
            linewidth=0,
            label=label,
        )
    _ring(ax, data, ink)
    ax.set_xlabel("batch size (sequences on one device)")
    ax.set_ylabel(f"used {data.memory}, GiB")
    title = f"Batch size {data.chosen.batch_size} on {short(data.device, LONGEST_DEVICE)}, {data.chosen.source}"
    ax.set_title(title, loc="left", fontsize="medium", fontweight="bold")
    ax.set_title(short(data.subject, TITLE - len(title)), loc="right", fontsize="small")
    _draw_legend(ax)


def _draw_legend(ax: Axes) -> None:
    """Draw the legend in the lower right corner, which a rising line leaves free, with a ring of the text's height."""
    handles, labels = ax.get_legend_handles_labels()
    small: list[Any] = [copy(handle) for handle in handles]
    for handle, label in zip(small, labels, strict=True):
        if label == RING:
            handle.set_markersize(9)
    ax.legend(small, labels, loc="lower right", fontsize="small", framealpha=0.85, edgecolor="none", handlelength=2.4)


def _draw_limits(ax: Axes, data: PlotData, ink: str) -> None:
    """Draw the device's memory and the target, labelled at the left or right end, whichever has fewer points."""
    capacity, (low, high) = data.total_bytes / GIB, data.target
    ax.axhline(capacity, color=ink, linewidth=1.4, zorder=1)
    ax.axhspan(low * capacity, high * capacity, color=ink, alpha=0.10, linewidth=0, zorder=0)
    right = ax.get_xlim()[1]
    high_up = [
        trial.batch_size / right
        for trial in data.trials
        if not trial.fits or (trial.used_bytes or 0) > (low - CLEARANCE) * data.total_bytes
    ]
    is_left = min(high_up, default=1.0) > LABEL_WIDTH or max(high_up) > 1 - LABEL_WIDTH
    x, side = (0.012 * right, "left") if is_left else (0.988 * right, "right")
    style: dict[str, Any] = {"fontsize": "small", "color": ink, "ha": side}
    ax.text(x, 1.01 * capacity, f"{short(data.device, LONGEST_DEVICE)}: {capacity:.2f} GiB", va="bottom", **style)
    target = f"target: {low * 100:.0f} to {high * 100:.0f} %"
    if high - low < NARROW_BAND:
        ax.text(x, (low - 0.01) * capacity, target, va="top", **style)
    else:
        ax.text(x, (low + high) / 2 * capacity, target, va="center", **style)


def _draw_trials(ax: Axes, trials: Sequence[Trial], source: Source, colour: str, capacity: float) -> None:
    """Draw sizes that fit at their memory, and others as crosses above the capacity: what they need is not known."""
    style: dict[str, Any] = {"linestyle": "none", "color": colour, "zorder": 4}
    fitting = [trial for trial in trials if trial.fits]
    if fitting:
        face = "none" if source == "predicted" else colour
        ax.plot(
            [trial.batch_size for trial in fitting],
            [(trial.used_bytes or 0) / GIB for trial in fitting],
            marker=MARKERS[source],
            markersize=6,
            markerfacecolor=face,
            markeredgewidth=1.3,
            label=source,
            **style,
        )
    endings = {trial.batch_size: _ending(trial) for trial in trials if not trial.fits}
    for ending in dict.fromkeys(endings.values()):
        sizes = [size for size, other in endings.items() if other == ending]
        marker, width = ("x", 1.3) if source == "predicted" else ("X", 0.5)
        label = f"{ending}, {source}"
        heights = [OVER * capacity] * len(sizes)
        ax.plot(sizes, heights, marker=marker, markersize=7.5, markeredgewidth=width, label=label, **style)


def _ending(trial: Trial) -> str:
    if trial.outcome == "oom":
        return "out of memory"
    return "does not fit" if trial.is_about_memory else trial.outcome


def _ring(ax: Axes, data: PlotData, ink: str) -> None:
    """Draw a ring around the recommended size, and label it with its memory.

    The label is left of the ring or, if it would leave the axes, above the points to the right of it.
    """
    chosen, right, capacity = data.chosen, ax.get_xlim()[1], data.total_bytes / GIB
    x, y = chosen.batch_size, (chosen.used_bytes or 0) / GIB
    ring: dict[str, Any] = {"marker": "o", "markersize": 15, "markerfacecolor": "none", "markeredgewidth": 1.8}
    ax.plot([x], [y], linestyle="none", color=ink, label=RING, zorder=5, **ring)
    label = f"{x}: {y:.2f} GiB, {y / capacity * 100:.0f} %"
    style: dict[str, Any] = {"color": ink, "fontweight": "bold", "fontsize": "medium", "va": "bottom"}
    if x > ANNOTATION_WIDTH * right:
        ax.annotate(label, (x, y), xytext=(-13, 2), textcoords="offset points", ha="right", **style)
        return
    reach = x + ANNOTATION_WIDTH * right
    under = [(t.used_bytes or 0) / GIB for t in data.trials if t.fits and x <= t.batch_size <= reach]
    above = min(max(under) + 0.05 * capacity, 0.93 * capacity)
    line: dict[str, Any] = {"arrowstyle": "-", "color": ink, "linewidth": 0.8, "shrinkB": 9}
    ax.annotate(label, (x, y), xytext=(max(x, 0.012 * right), above), ha="left", arrowprops=line, **style)


# -- throughput ----------------------------------------------------------------------------------------------------


def draw_throughput(ax: Axes, data: PlotData) -> None:
    """Draw the measured samples per second. An error bar is the spread of the step times."""
    ink, colours = ink_of(ax), COLOURS[is_dark(ax)]
    timed = sorted((t for t in data.trials if t.fits and t.samples_per_second), key=lambda t: t.batch_size)
    sizes = [trial.batch_size for trial in timed]
    speeds = [trial.samples_per_second or 0 for trial in timed]
    spreads = [(trial.samples_per_second or 0) * (trial.step_seconds_spread or 0) / 2 for trial in timed]
    ax.errorbar(
        sizes, speeds, spreads, color=colours["measured"], marker=MARKERS["measured"], markersize=5, linewidth=0.8,
        capsize=3, label="measured",
    )  # fmt: skip
    if data.chosen.samples_per_second:
        ring: dict[str, Any] = {"marker": "o", "markersize": 15, "markerfacecolor": "none", "markeredgewidth": 1.8}
        ax.plot([data.chosen.batch_size], [data.chosen.samples_per_second], color=ink, zorder=5, **ring)
    ax.set_ylim(0, 1.25 * max(speed + spread for speed, spread in zip(speeds, spreads, strict=True)))
    ax.set_xlabel("batch size (sequences on one device)")
    ax.set_ylabel("samples/s")


# -- light and dark ------------------------------------------------------------------------------------------------


def is_dark(ax: Axes) -> bool:
    """Return whether the text of the axes is light: the background itself may be transparent."""
    from matplotlib.colors import to_rgb

    red, green, blue = to_rgb(ink_of(ax))
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.5


def ink_of(ax: Axes) -> str:
    """Return the colour of the text of the axes."""
    return ax.xaxis.label.get_color()
