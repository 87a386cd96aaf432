"""Claims about `hf_bsopt.report.plots`, most of them with invented numbers."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import pytest
from matplotlib import pyplot
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure

from hf_bsopt.errors import MissingExtraError, UsageError
from hf_bsopt.records import MemoryProfile, Outcome, Peak, Source, Trial
from hf_bsopt.report import plots
from hf_bsopt.report.plot_data import PlotData
from hf_bsopt.report.plot_panels import COLOURS, draw_memory, draw_throughput, short, untested, used_line
from hf_bsopt.report.plot_step import draw_step

GIB = 2**30
FIXED, EACH = 2 * GIB, GIB // 4
CAPACITY = 16 * GIB


def trial(size: int, source: Source = "predicted", outcome: Outcome = "fits", more: int = 0, **speed: float) -> Trial:
    used = FIXED + EACH * size + more
    return Trial(size, outcome, Peak(used, used), used, source, **speed)  # type: ignore[arg-type]


PROFILE = MemoryProfile(
    length=100,
    moments=(0, 20, 45, 70, 95),
    parts={
        "weights": (GIB,) * 5,
        "optimizer": (2 * GIB,) * 5,
        "gradients": (0, 0, 0, GIB, 0),
        "activations": (0, 3 * GIB, 7 * GIB, 2 * GIB, 0),
        "temporary": (0, GIB, 2 * GIB, 0, 0),
    },
    peak_at=2,
    phases=((0, "forward"), (45, "backward"), (92, "optimizer_step")),
)
PREDICTED = (*(trial(size) for size in (1, 2, 4, 8, 16, 32, 48, 56)), trial(57, outcome="oom"))
PREDICTED_DATA = PlotData(
    subject="dmis-lab/biobert-v1.1, 512 tokens, fp16",
    device="T4",
    memory="VRAM",
    total_bytes=CAPACITY,
    target=(0.8, 0.9),
    trials=PREDICTED,
    chosen=PREDICTED[6],
    largest=56,
    memory_profile=PROFILE,
    peak_origin="aten._log_softmax.default",
)
RAN = (trial(6, "measured", samples_per_second=20.0), trial(40, "measured", more=GIB // 8, samples_per_second=30.0))
MEASURED_DATA = dataclasses.replace(
    PREDICTED_DATA, trials=(*PREDICTED, *RAN, trial(48, "measured", "oom")), chosen=RAN[1], memory="VRAM"
)


@pytest.fixture(autouse=True)
def close_figures() -> Any:
    yield
    pyplot.close("all")


def drawn(
    data: PlotData, draw: Callable[..., None] = draw_memory, *more: object, style: str = "default", width: float = 8
) -> Any:
    with matplotlib.style.context(style):
        figure = Figure(figsize=(width, 4.2), layout="constrained")
        FigureCanvasAgg(figure)
        ax = figure.add_subplot()
        draw(ax, data, *more)
    return ax


def line(ax: Any, label: str) -> Any:
    (found,) = [line for line in ax.get_lines() if line.get_label() == label]
    return found


def points(ax: Any, label: str) -> dict[int, float]:
    return {int(x): float(y) for x, y in line(ax, label).get_xydata()}


def labels(ax: Any) -> list[str]:
    return [text.get_text() for text in ax.texts]


# ---- memory against the batch size


def test_every_size_that_fits_is_a_point_at_its_used_memory() -> None:
    found = points(drawn(PREDICTED_DATA), "predicted")
    assert found == {t.batch_size: pytest.approx((t.used_bytes or 0) / GIB) for t in PREDICTED if t.fits}


def test_measured_and_predicted_sizes_differ_in_colour_and_shape() -> None:
    ax = drawn(MEASURED_DATA)
    assert points(ax, "measured") == {6: pytest.approx(3.5), 40: pytest.approx(12.125)}
    assert 48 in points(ax, "predicted")
    predicted, measured = line(ax, "predicted"), line(ax, "measured")
    assert predicted.get_marker() != measured.get_marker()
    assert predicted.get_color() != measured.get_color()
    assert predicted.get_markerfacecolor() == "none"  # hollow: not run
    assert measured.get_markerfacecolor() == measured.get_color()


@pytest.mark.parametrize("style", ["default", "dark_background"])
def test_predicted_rehearsed_and_measured_have_three_colours(style: str) -> None:
    ran = tuple(trial(8, source) for source in ("rehearsed", "measured"))  # type: ignore[arg-type]
    ax = drawn(dataclasses.replace(PREDICTED_DATA, trials=(*PREDICTED, *ran)), style=style)
    colours = {line(ax, source).get_color() for source in ("predicted", "rehearsed", "measured")}
    assert colours == set(COLOURS[style == "dark_background"].values())
    assert len(colours) == 3


def test_a_size_that_does_not_fit_is_a_cross_above_the_capacity() -> None:
    ax = drawn(MEASURED_DATA)
    for label, size in (("out of memory, predicted", 57), ("out of memory, measured", 48)):
        ((x, y),) = points(ax, label).items()
        assert (x, y > CAPACITY / GIB) == (size, True)
    assert ax.get_ylim()[1] > y


def test_a_size_with_another_outcome_is_labelled_with_it() -> None:
    ax = drawn(dataclasses.replace(MEASURED_DATA, trials=(*MEASURED_DATA.trials, trial(44, "measured", "timeout"))))
    assert list(points(ax, "timeout, measured")) == [44]


def test_the_band_is_the_target_and_the_line_above_it_the_capacity() -> None:
    ax = drawn(PREDICTED_DATA)
    (band,) = [patch for patch in ax.patches if patch.get_y() > 0 and patch.get_height() < CAPACITY / GIB]
    assert (band.get_y(), band.get_y() + band.get_height()) == pytest.approx((12.8, 14.4))
    assert any(list(line.get_ydata()) == [16.0, 16.0] for line in ax.get_lines())
    assert "T4: 16.00 GiB" in labels(ax)
    assert "target: 80 to 90 %" in labels(ax)


def test_the_recommended_size_has_a_ring_and_a_label_with_its_memory() -> None:
    for data, size, used in ((PREDICTED_DATA, 48, "14.00 GiB, 88 %"), (MEASURED_DATA, 40, "12.12 GiB, 76 %")):
        ax = drawn(data)
        assert list(points(ax, "recommended")) == [size]
        assert f"{size}: {used}" in labels(ax)
        assert ax.get_title(loc="left") == f"Batch size {size} on T4, {data.chosen.source}"
        assert ax.get_title(loc="right") == PREDICTED_DATA.subject


def test_the_fitted_line_has_the_fixed_memory_and_the_memory_per_sequence() -> None:
    found = used_line(PREDICTED)
    assert found is not None
    assert (found.fixed_bytes, found.bytes_each) == pytest.approx((FIXED, EACH))
    assert str(found) == "line: 2.00 GiB fixed + 256 MiB a sequence"
    assert points(drawn(PREDICTED_DATA), str(found))[0] == pytest.approx(2.0)


def test_small_sizes_limited_by_the_optimizer_step_do_not_change_the_line() -> None:
    bent = tuple(dataclasses.replace(t, used_bytes=5 * GIB) if t.batch_size < 7 else t for t in PREDICTED)
    found = used_line(bent)
    assert found is not None
    assert (found.fixed_bytes, found.bytes_each) == pytest.approx((FIXED, EACH))


def test_the_line_fits_the_prediction_if_there_is_one_and_needs_two_sizes() -> None:
    assert (used_line(MEASURED_DATA.trials) or RAN).source == "predicted"  # type: ignore[union-attr]
    assert (used_line(RAN) or RAN).source == "measured"  # type: ignore[union-attr]
    assert used_line(RAN[:1]) is None
    assert points(drawn(dataclasses.replace(MEASURED_DATA, trials=RAN[:1])), "measured") == {6: pytest.approx(3.5)}


def test_sizes_between_the_largest_that_ran_and_the_smallest_oom_are_shaded_as_not_run() -> None:
    assert untested(MEASURED_DATA) == (41, 47)
    (gap,) = [patch for patch in drawn(MEASURED_DATA).patches if patch.get_label() == "not run: 41 to 47"]
    assert (gap.get_x(), gap.get_x() + gap.get_width()) == (40.5, 47.5)


def test_without_an_oom_the_shading_ends_at_the_predicted_maximum() -> None:
    assert untested(dataclasses.replace(MEASURED_DATA, trials=(*PREDICTED, *RAN))) == (41, 56)
    assert untested(dataclasses.replace(MEASURED_DATA, trials=(*RAN, trial(41, "measured", "oom")))) is None
    assert untested(PREDICTED_DATA) is None  # nothing was run


# ---- labels do not overlap


def plotted_examples() -> dict[str, PlotData]:
    small = tuple(trial(size) for size in (1, 2, 4, 8, 16, 32, 48, 56))
    nearly_full = tuple(
        dataclasses.replace(trial(n, outcome="fits" if n < 3 else "oom"), used_bytes=13 * GIB + n * GIB // 2)
        for n in (1, 2, 3)
    )
    return {
        "predicted": PREDICTED_DATA,
        "measured": MEASURED_DATA,
        "long names": dataclasses.replace(MEASURED_DATA, subject="x" * 300, device="y" * 300),
        "small choice": dataclasses.replace(MEASURED_DATA, chosen=RAN[0]),
        "one sequence": dataclasses.replace(PREDICTED_DATA, trials=nearly_full, chosen=nearly_full[0], largest=2),
        "limited": dataclasses.replace(PREDICTED_DATA, trials=small, chosen=small[3]),
        "narrow target": dataclasses.replace(PREDICTED_DATA, target=(0.99, 1.0)),
        "whole GPU": dataclasses.replace(PREDICTED_DATA, target=(0.0, 1.0), chosen=PREDICTED[7]),
    }


@pytest.mark.parametrize("name", list(plotted_examples()))
def test_no_label_covers_another_label_or_the_recommended_size(name: str) -> None:
    ax = drawn(plotted_examples()[name])
    ax.figure.draw_without_rendering()
    boxes = {text.get_text(): text.get_window_extent() for text in ax.texts}
    boxes["legend"] = ax.get_legend().get_window_extent()
    boxes["title"], boxes["subject"] = ax._left_title.get_window_extent(), ax._right_title.get_window_extent()
    for (one, first), (other, second) in itertools.combinations(boxes.items(), 2):
        assert not first.overlaps(second), (one, other)
    ring = ax.transData.transform(line(ax, "recommended").get_xydata())[0]
    assert not any(box.contains(*ring) for box in boxes.values())
    assert all(ax.figure.bbox.x0 <= box.x0 <= box.x1 <= ax.figure.bbox.x1 for box in boxes.values())


@pytest.mark.parametrize("width", [6.5, 8.0])
@pytest.mark.parametrize("peak_at", [0.03, 0.25, 0.5, 0.8, 0.97])
def test_the_peak_label_and_the_legend_of_the_step_cover_nothing(peak_at: float, width: float) -> None:
    moments = tuple(range(0, 100, 2))
    heights = tuple(int(GIB * max(0.5, 9 - abs(moment - 100 * peak_at) / 5)) for moment in moments)
    peak = heights.index(max(heights))
    profile = MemoryProfile(100, moments, {"weights": (GIB,) * 50, "activations": heights}, peak, PROFILE.phases)
    ax = drawn(dataclasses.replace(PREDICTED_DATA, peak_origin="aten." + "x" * 80), draw_step, profile, width=width)
    ax.figure.draw_without_rendering()
    (name,) = [text.get_window_extent() for text in ax.texts]
    legend = ax.get_legend().get_window_extent()
    assert not name.overlaps(legend)
    assert ax.bbox.x0 <= name.x0 <= name.x1 <= ax.figure.bbox.x1
    tops = [
        ax.transData.transform((moment, total / GIB)) for moment, total in zip(moments, profile.totals, strict=True)
    ]
    assert not any(legend.contains(x, y) or name.contains(x, y) for x, y in tops)


def test_a_name_with_dollars_and_backslashes_is_not_parsed_as_math() -> None:
    odd = dataclasses.replace(PREDICTED_DATA, subject=r"$\frac{ a_b % #", device="$x^$")
    assert plots.rendered([odd], "png").startswith(b"\x89PNG")


def test_a_long_name_is_shortened_to_its_end() -> None:
    assert short("/a/very/long/path/to/model", 12) == "…th/to/model"
    assert short("bert", 12) == "bert"


# ---- throughput, and memory over the step


def test_throughput_is_drawn_only_if_it_was_measured() -> None:
    ax = drawn(MEASURED_DATA, draw_throughput)
    drawn_points = {(int(x), float(y)) for each in ax.get_lines() for x, y in each.get_xydata()}
    assert {(6, 20.0), (40, 30.0)} <= drawn_points
    assert ax.get_ylim()[0] == 0
    assert plots.panels(MEASURED_DATA) == ["memory", "throughput", "step"]
    assert plots.panels(PREDICTED_DATA) == ["memory", "step"]
    assert plots.panels(dataclasses.replace(PREDICTED_DATA, memory_profile=None)) == ["memory"]


def test_the_stack_over_the_step_is_as_high_as_the_live_memory() -> None:
    ax = drawn(PREDICTED_DATA, draw_step, PROFILE)
    tops = [max(y for path in area.get_paths() for _, y in path.vertices) for area in ax.collections[:5]]
    assert tops == pytest.approx([1, 3, 4, 10, 12])
    assert ax.get_xlim() == (0, 100)


def test_the_peak_is_labelled_with_its_operation_and_the_legend_has_each_part_at_the_peak() -> None:
    ax = drawn(PREDICTED_DATA, draw_step, PROFILE)
    assert labels(ax) == ["peak 12.00 GiB\nmade by aten._log_softmax"]
    legend = [text.get_text() for text in ax.get_legend().get_texts()]
    assert legend == [
        "temporary 2.00 GiB", "activations 7.00 GiB", "gradients 0.00 GiB", "optimizer 2.00 GiB", "weights 1.00 GiB",
    ]  # fmt: skip
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["forward", "backward", "optimizer\nstep"]
    assert "predicted" in ax.get_title(loc="left")


# ---- axes, figures and files


def test_given_axes_are_drawn_into_and_nothing_else_is() -> None:
    figure, (left, right) = pyplot.subplots(1, 2)
    assert plots.plot(MEASURED_DATA, left) is left
    assert plots.plot_step(MEASURED_DATA, right) is right
    assert figure.axes == [left, right]
    assert left.get_lines() and right.collections
    assert pyplot.get_fignums() == [figure.number]


def test_a_new_figure_is_made_by_pyplot_with_every_panel_and_the_same_backend() -> None:
    backend = matplotlib.get_backend()
    memory = plots.plot(MEASURED_DATA)
    assert pyplot.gcf() is memory.figure
    assert [ax.get_ylabel() for ax in memory.figure.axes] == ["used VRAM, GiB", "samples/s", "live tensors, GiB"]
    assert matplotlib.get_backend() == backend


def test_on_a_dark_background_lines_and_text_are_light() -> None:
    ax = drawn(PREDICTED_DATA, style="dark_background")
    assert to_rgba(line(ax, "recommended").get_markeredgecolor()) == to_rgba("white")
    assert to_rgba(line(drawn(PREDICTED_DATA), "recommended").get_markeredgecolor()) == to_rgba("black")


def test_a_file_is_drawn_in_the_default_style_and_leaves_the_users_style_and_no_figure() -> None:
    with matplotlib.rc_context({"font.size": 30, "text.color": "red"}):
        before = dict(matplotlib.rcParams)
        large = plots.rendered([PREDICTED_DATA], "png")
        assert dict(matplotlib.rcParams) == before
    assert large == plots.rendered([PREDICTED_DATA], "png")
    assert pyplot.get_fignums() == []


def test_the_suffix_determines_the_format(tmp_path: Path) -> None:
    for name, start in (("a.png", b"\x89PNG"), ("a.SVG", b"<?xml"), ("a.pdf", b"%PDF")):
        plots.save([dataclasses.replace(PREDICTED_DATA, memory_profile=None)], tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(start)
    assert len(list(tmp_path.iterdir())) == 3
    for name in ("a.jpg", "a", "a.png.txt"):
        with pytest.raises(UsageError, match=r"\.png, \.svg, \.pdf .*memory\.png"):
            plots.check_file(tmp_path / name)
    with pytest.raises(UsageError, match="there is no folder"):
        plots.check_file(tmp_path / "nowhere" / "a.png")


def test_several_reports_are_side_by_side_in_one_file() -> None:
    def size(picture: bytes) -> tuple[int, int]:
        return int.from_bytes(picture[16:20]), int.from_bytes(picture[20:24])  # PNG's header

    memory = dataclasses.replace(PREDICTED_DATA, memory_profile=None)
    width, height = size(plots.rendered([memory], "png"))
    assert size(plots.rendered([memory] * 3, "png")) == (2 * width, 2 * height)


def test_without_matplotlib_the_error_has_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None)
    for attempt in (lambda: plots.plot(PREDICTED_DATA), lambda: plots.check_file(tmp_path / "a.png")):
        with pytest.raises(MissingExtraError, match=r"pip install matplotlib"):
            attempt()


def test_a_step_that_was_not_traced_cannot_be_plotted() -> None:
    with pytest.raises(UsageError, match="nothing was predicted"):
        plots.plot_step(dataclasses.replace(PREDICTED_DATA, memory_profile=None))
