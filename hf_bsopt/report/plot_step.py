"""The panel of memory over the training step, drawn into axes that are given."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..records import MemoryProfile
from .plot_panels import GIB, Drawing, ink_of, short

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
"""Of the peak: where the panel ends, the peak's name within."""
FREE = 0.72
"""How high of the peak the memory may be in a corner to leave room for the legend."""
APART = 0.09
"""Of the width: two names of passes."""


def operation(origin: str) -> str:
    """As the picture names it: aten.native_dropout."""
    return short(origin.removesuffix(".default"), LONGEST_OPERATION)


def draw_step(ax: Axes, drawing: Drawing, profile: MemoryProfile) -> None:
    """What is live, stacked by what it is for, over the events of a step; the peak with the operation that made it."""
    ink = ink_of(ax)
    moments = [*profile.moments, profile.length]
    parts = {name: [size / GIB for size in (*sizes, sizes[-1])] for name, sizes in profile.parts.items() if any(sizes)}
    labels = [f"{name} {profile.parts[name][profile.peak_at] / GIB:.2f} GiB" for name in parts]
    colours = [PART_COLOURS[name] for name in parts]
    step = "post" if len(profile.moments) == profile.length else None  # thinned out, each stretch has its highest point
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
    _name_peak(ax, profile, drawing.peak_origin, between)
    ax.set_xlabel("allocations and frees of one step, in order")
    ax.set_ylabel("live tensors, GiB")
    title = f"Where the memory goes over a step at {drawing.chosen.batch_size}, predicted"
    ax.set_title(title, loc="left", fontsize="medium", fontweight="bold")


def _name_peak(ax: Axes, profile: MemoryProfile, origin: str, between: tuple[float, float]) -> None:
    """Over it, as near as the edges of what is free allow."""
    ink, at, peak = ink_of(ax), profile.moments[profile.peak_at], profile.peak_bytes / GIB
    words = f"peak {peak:.2f} GiB\nmade by {operation(origin)}"
    text = ax.text(0, 1.1 * peak, words, ha="center", color=ink, fontsize="small", fontweight="bold")
    half = text.get_window_extent().width / ax.get_window_extent().width / 2 + 0.01
    text.set_x(profile.length * max(between[0] + half, min(at / profile.length, between[1] - half)))
    ax.plot([at, at], [peak, 1.08 * peak], color=ink, linewidth=1.0)
    ax.plot([at], [peak], marker="v", markersize=6, color=ink)


def _draw_passes(ax: Axes, profile: MemoryProfile, ink: str) -> None:
    """Their names in place of ticks, a line where one begins; a name that would run into the last is left out."""
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
    """Where a legend of this share of the width covers nothing; empty where it would."""
    free = FREE * profile.peak_bytes
    highest = {"upper left": 0, "upper right": 0}
    for moment, total in zip(profile.moments, profile.totals, strict=True):
        if moment < width * profile.length:
            highest["upper left"] = max(highest["upper left"], total)
        if moment > (1 - width) * profile.length:
            highest["upper right"] = max(highest["upper right"], total)
    return next((corner for corner, total in highest.items() if total < free), "")
