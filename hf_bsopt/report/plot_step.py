"""The panel of memory over one training step, drawn into given axes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..records import MemoryProfile
from .plot_data import PlotData
from .plot_panels import GIB, ink_of, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PART_COLOURS = {
    "weights": "#0072B2",
    "optimizer": "#56B4E9",
    "gradients": "#009E73",
    "activations": "#E69F00",
    "temporary": "#CC79A7",
}
LONGEST_OPERATION = 36
TOP = 1.28
"""Multiple of the peak: the top of the panel, which leaves room for the label of the peak."""
FREE = 0.72
"""Fraction of the peak: the legend fits in a corner in which memory stays below it."""
APART = 0.09
"""Fraction of the width: the least distance between two labels of passes."""


def operation(origin: str) -> str:
    """Return the name of an operation as it is shown: aten.native_dropout."""
    return short(origin.removesuffix(".default"), LONGEST_OPERATION)


def draw_step(ax: Axes, data: PlotData, profile: MemoryProfile) -> None:
    """Draw live memory over the events of a step, stacked by use, and label the peak with its operation."""
    ink = ink_of(ax)
    moments = [*profile.moments, profile.length]
    parts = {name: [size / GIB for size in (*sizes, sizes[-1])] for name, sizes in profile.parts.items() if any(sizes)}
    labels = [f"{name} {profile.parts[name][profile.peak_at] / GIB:.2f} GiB" for name in parts]
    colours = [PART_COLOURS[name] for name in parts]
    step = (
        "post" if len(profile.moments) == profile.length else None
    )  # if points were thinned out, each is the highest of its stretch
    areas = ax.stackplot(moments, *parts.values(), labels=labels, colors=colours, step=step, linewidth=0)
    ax.set_xlim(0, profile.length)
    ax.set_ylim(0, TOP * profile.peak_bytes / GIB)
    _draw_passes(ax, profile, ink)
    legend = ax.legend(areas[::-1], labels[::-1], title="at the peak", fontsize="small", title_fontsize="small",
                       framealpha=0.85, edgecolor="none", alignment="left", loc="upper left")  # fmt: skip
    taken = legend.get_window_extent().width / ax.get_window_extent().width + 0.01
    corner = _free_corner(profile, taken)
    if corner:
        legend.set_loc(corner)
    else:
        legend.set_bbox_to_anchor((1.01, 1.0), ax.transAxes)
    between = {"upper left": (taken, 1.0), "upper right": (0.0, 1 - taken)}.get(corner, (0.0, 1.0))
    _name_peak(ax, profile, data.peak_origin, between)
    ax.set_xlabel("allocations and frees of one step, in order")
    ax.set_ylabel("live tensors, GiB")
    title = f"Where the memory goes over a step at {data.chosen.batch_size}, predicted"
    ax.set_title(title, loc="left", fontsize="medium", fontweight="bold")


def _name_peak(ax: Axes, profile: MemoryProfile, origin: str, between: tuple[float, float]) -> None:
    """Label the peak above it, as near as the legend and the edges allow."""
    ink, at, peak = ink_of(ax), profile.moments[profile.peak_at], profile.peak_bytes / GIB
    label = f"peak {peak:.2f} GiB\nmade by {operation(origin)}"
    text = ax.text(0, 1.1 * peak, label, ha="center", color=ink, fontsize="small", fontweight="bold")
    half = text.get_window_extent().width / ax.get_window_extent().width / 2 + 0.01
    text.set_x(profile.length * max(between[0] + half, min(at / profile.length, between[1] - half)))
    ax.plot([at, at], [peak, 1.08 * peak], color=ink, linewidth=1.0)
    ax.plot([at], [peak], marker="v", markersize=6, color=ink)


def _draw_passes(ax: Axes, profile: MemoryProfile, ink: str) -> None:
    """Draw a line where each pass begins, and its name as a tick label unless it would overlap the previous one."""
    begins = [at for at, _ in profile.phases]
    ticks: list[float] = []
    names: list[str] = []
    for (begin, name), end in zip(profile.phases, [*begins[1:], profile.length], strict=True):
        if begin:
            ax.vlines(begin, 0, profile.peak_bytes / GIB, color=ink, linewidth=0.8, linestyle=":")
        middle = (begin + end) / 2
        if not ticks or middle - ticks[-1] > APART * profile.length:
            ticks.append(middle)
            names.append(name.replace("_", "\n"))  # "optimizer step" in one line would run into "backward"
    ax.set_xticks(ticks, names)
    ax.tick_params(axis="x", length=0)


def _free_corner(profile: MemoryProfile, width: float) -> str:
    """Return the corner in which a legend of this fraction of the width covers nothing, "" if there is none."""
    free = FREE * profile.peak_bytes
    highest = {"upper left": 0, "upper right": 0}
    for moment, total in zip(profile.moments, profile.totals, strict=True):
        if moment < width * profile.length:
            highest["upper left"] = max(highest["upper left"], total)
        if moment > (1 - width) * profile.length:
            highest["upper right"] = max(highest["upper right"], total)
    return next((corner for corner, total in highest.items() if total < free), "")
