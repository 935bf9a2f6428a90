"""Figures of runs and benches, by matplotlib (the `plots` extra)."""

import io
import math
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

import matplotlib
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.textpath import TextPath
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from fslsage_rpc.report.looks import Look

Line = dict[str, Any]
"""one line of metrics.jsonl"""
Measure = Callable[[Line], float | None]
"""what is drawn of a line; None leaves the round out"""

TEXTURES = {
    "compute": (1.0, ""),
    "wait": (0.15, "////"),
    "averaging": (0.6, "...."),
    "alignment": (0.35, "xxxx"),
    "other": (0.0, ""),
}
"""how much of its algorithm's colour a part of a bar has, and its hatch"""

LEGEND_LINE = 5.2
"""letter heights that an entry of a legend takes besides its text"""
LETTER = 0.68
"""of its height: the width of a letter with room to spare"""
BAR_LABEL_LETTERS = 42
"""in a line beside a bar"""
LOG_RATIO = 5
"""the longest curve is so many times as long as the shortest: a linear axis would squeeze that one"""


@dataclass(frozen=True)
class Size:
    """How large a figure is, and what is drawn in it: inches, and points of letters and lines."""

    width: float
    height: float
    """above the legend"""
    dpi: int
    letters: float
    legend_letters: float
    line: float
    marker: float
    markers: int
    """along a curve, about"""
    ticks: int
    """along the x axis, at most"""


SCREEN = Size(9.5, 4.2, 130, 10.0, 8.33, 1.6, 4.5, 20, 10)
COLUMN = Size(3.5, 2.2, 300, 7.5, 7.0, 1.1, 3.2, 8, 6)
"""one column of a paper"""


@dataclass(frozen=True)
class Curve:
    """One configuration in several seeds: per seed the lines of its `metrics.jsonl`.

    Runs that are not finished have hollow markers and thin lines.
    """

    label: str
    look: Look
    runs: Sequence[Sequence[Line]]
    finished: bool = True


@dataclass(frozen=True)
class Bar:
    """Seconds per round by part, and the lower bound of their sum where it is known."""

    label: str
    color: str
    parts: dict[str, float | None]
    bound_seconds: float | None = None


@dataclass(frozen=True)
class Panel:
    """One pair of axes: what is drawn against what."""

    x: Measure
    y: Measure
    x_label: str
    y_label: str
    title: str = ""
    whole_numbers: bool = False
    """x is a count"""
    y_over_decades: bool = False
    """y has no upper limit"""


def draw(
    axes: Axes,
    curve: Curve,
    x: Measure,
    y: Measure,
    mark: Callable[[Line], bool] | None = None,
    size: Size = SCREEN,
) -> None:
    """The mean over seeds of y against that of x, round by round, and a band from the lowest to the highest
    y.

    Rounds in which y is None (those that were not evaluated) are left out. Beyond the last round that all
    seeds have, each goes on as a thin line of its own. Markers stand at the rounds that `mark` picks, else
    at as many as the size has.
    """
    runs = [{line["round"]: line for line in run if y(line) is not None} for run in curve.runs]
    runs = [run for run in runs if run]
    if not runs:
        return
    shared = [round for round in runs[0] if all(round in run for run in runs)]
    xs = [fmean(_drawn(x, run[round]) for run in runs) for round in shared]
    ys = np.array([[_drawn(y, run[round]) for round in shared] for run in runs])  # [seeds, rounds]
    if len(runs) > 1:
        axes.fill_between(xs, ys.min(0), ys.max(0), color=curve.look.color, alpha=0.18, linewidth=0)
    if mark is None:
        marked: Any = max(1, len(shared) // size.markers)
    else:
        marked = [i for i, round in enumerate(shared) if any(mark(run[round]) for run in runs)]
    axes.plot(xs, ys.mean(0), **_look(curve, size), markevery=marked)
    for run in runs:
        rest = [line for round, line in run.items() if not shared or round >= shared[-1]]
        if len(rest) > 1 or not shared:
            axes.plot(
                [_drawn(x, line) for line in rest],
                [_drawn(y, line) for line in rest],
                linestyle=curve.look.style,
                color=curve.look.color,
                linewidth=size.line / 2,
            )


def tidy(axes: Axes, title: str, x_label: str, y_label: str, size: Size = SCREEN) -> None:
    """Title, labelled axes with units, a light grid, and no box."""
    axes.set_title(title, fontsize=size.letters)
    axes.set_xlabel(x_label, fontsize=size.letters)
    axes.set_ylabel(y_label, fontsize=size.letters)
    axes.tick_params(labelsize=size.letters)
    axes.grid(color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def curves_figure(
    curves: Sequence[Curve],
    panels: Sequence[Panel],
    mark: Callable[[Line], bool] | None = None,
    size: Size = SCREEN,
) -> Figure:
    """All curves in each panel, the legend below; panels of the same y share its axis.

    An axis is logarithmic where a linear one would squeeze a curve, and says so.
    """
    handles = [Line2D([], [], **_look(curve, size)) for curve in curves]
    same_y = len({panel.y_label for panel in panels}) == 1
    figure = _figure(handles, size)
    grid = figure.subplots(1, len(panels), squeeze=False, sharey=same_y)[0]
    for number, (axes, panel) in enumerate(zip(grid, panels, strict=True)):
        for curve in curves:
            draw(axes, curve, panel.x, panel.y, mark, size)
        y_label = "" if same_y and number else panel.y_label
        tidy(axes, panel.title, panel.x_label, y_label, size)
        lengths = [_longest(curve, panel) for curve in curves]
        if not panel.whole_numbers and max(lengths) >= LOG_RATIO * min(lengths) > 0:
            _make_logarithmic(axes, panel.x_label)
        else:
            axes.set_xlim(left=0)
            steps = [1, 2, 5, 10]
            axes.xaxis.set_major_locator(MaxNLocator(size.ticks, steps=steps, integer=panel.whole_numbers))
        low, high = axes.dataLim.intervaly
        if panel.y_over_decades and high >= 100 * low > 0:
            axes.set_yscale("log")
            axes.set_ylabel(f"{y_label} (log scale)")
    return figure


def bars_figure(bars: Sequence[Bar], x_label: str) -> Figure:
    """One stacked bar for each of `bars`, from top to bottom, its sum beside it, and a tick at its lower
    bound.
    """
    handles: list[Artist] = [_patch("#444444", part) for part in TEXTURES]
    if any(bar.bound_seconds is not None for bar in bars):
        handles.append(
            Line2D([], [], color="black", marker="|", markersize=12, mew=3, linestyle="", label="lower bound")
        )
    labels = [_in_lines(bar.label) for bar in bars]
    lines = sum(max(2, label.count("\n") + 1) for label in labels)
    figure = _figure(handles, replace(SCREEN, height=1.0 + 0.26 * lines))
    axes = figure.subplots()
    tidy(axes, "", x_label, "")
    axes.grid(visible=False, axis="y")
    for position, bar in enumerate(bars):
        _draw_bar(axes, position, bar)
    axes.set_yticks(range(len(bars)), labels, fontsize="small")
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(bars) - 0.4, -0.6)
    axes.margins(x=0.1)
    axes.set_xlim(left=0)
    return figure


def rendered(figure: Figure, form: str = "png") -> bytes:
    """The picture as a file of this format: png, pdf or svg."""
    buffer = io.BytesIO()
    with matplotlib.rc_context({"pdf.fonttype": 42}):  # publishers refuse Type 3, matplotlib's default
        figure.savefig(buffer, format=form)
    return buffer.getvalue()


def _draw_bar(axes: Axes, position: int, bar: Bar) -> None:
    left = 0.0
    for part in TEXTURES:
        seconds = bar.parts.get(part) or 0.0
        if seconds <= 0:  # a remainder can be a rounding error below it
            continue
        patch = _patch(bar.color, part)
        axes.barh(
            position,
            seconds,
            left=left,
            height=0.62,
            facecolor=patch.get_facecolor(),
            edgecolor=patch.get_edgecolor(),
            hatch=patch.get_hatch(),
            linewidth=0.8,
        )
        left += seconds
    end = max(left, bar.bound_seconds or 0.0)
    axes.annotate(
        f"{left:#.3g} s",
        (end, position),
        xytext=(7, 0),
        textcoords="offset points",
        va="center",
        fontsize="small",
    )
    if bar.bound_seconds is not None:
        ends = [position - 0.4, position + 0.4]
        axes.plot([bar.bound_seconds] * 2, ends, color="white", linewidth=5, solid_capstyle="butt", zorder=3)
        axes.plot([bar.bound_seconds] * 2, ends, color="black", linewidth=3, solid_capstyle="butt", zorder=4)


def _patch(color: str, part: str) -> Patch:
    """A part of a bar in its algorithm's colour, mixed with white."""
    share, hatch = TEXTURES[part]
    red, green, blue = (share * channel + 1 - share for channel in to_rgb(color))
    return Patch(facecolor=(red, green, blue), edgecolor=color, hatch=hatch, linewidth=0.8, label=part)


def _figure(handles: Sequence[Artist], size: Size) -> Figure:
    """A figure above a legend, which lies outside the axes in as many rows as it needs."""
    letter = size.legend_letters / 72  # inches
    room, line = size.width - 0.2, LEGEND_LINE * letter
    for handle in handles:
        handle.set_label(_wrap(str(handle.get_label()), int((room - line) / (LETTER * letter))))
    lines_of_labels = [line for handle in handles for line in str(handle.get_label()).split("\n")]
    widest = max((_inches(line, size) for line in lines_of_labels), default=0.0)
    columns = max(1, min(len(handles), int(room / (widest + line))))
    lines = max((str(handle.get_label()).count("\n") + 1 for handle in handles), default=0)
    rows = math.ceil(len(handles) / columns) * lines
    inches = (size.width, size.height + 1.73 * letter * rows)
    figure = Figure(figsize=inches, dpi=size.dpi, layout="constrained")
    figure.legend(
        handles=list(handles),
        loc="outside lower center",
        ncols=columns,
        fontsize=size.legend_letters,
        handlelength=3,
        columnspacing=1.4,
    )
    return figure


def _look(curve: Curve, size: Size) -> dict[str, Any]:
    """The curve's line, for matplotlib."""
    return {
        "label": curve.label,
        "color": curve.look.color,
        "linestyle": curve.look.style,
        "marker": curve.look.marker,
        "markersize": size.marker,
        "linewidth": size.line if curve.finished else size.line / 2,
        "markerfacecolor": curve.look.color if curve.finished else "white",
    }


def _make_logarithmic(axes: Axes, x_label: str) -> None:
    """A logarithmic x axis that says so, with plain numbers beside its ticks."""
    axes.set_xscale("log")
    axes.set_xlabel(f"{x_label} (log scale)")
    low, high = axes.get_xlim()
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 1000 * low else (1,)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())


def _in_lines(label: str) -> str:
    """A label beside a bar: where it is long, each setting on a line of its own."""
    parts = [label] if len(label) <= BAR_LABEL_LETTERS else label.replace(", ", ",\n").split("\n")
    return "\n".join(_wrap(part, BAR_LABEL_LETTERS) for part in parts)


def _wrap(label: str, width: int) -> str:
    """In lines of so many letters, with dollar signs as they are: matplotlib reads formulas between two."""
    return "\n".join(textwrap.wrap(label, width, break_on_hyphens=False)).replace("$", r"\$")


def _inches(line: str, size: Size) -> float:
    """The width of a line of a legend."""
    path = TextPath((0, 0), line, size=size.legend_letters) if line else None
    return float(path.get_extents().width) / 72 if path else 0.0


def _longest(curve: Curve, panel: Panel) -> float:
    """How far a curve reaches along x."""
    return max(
        (_drawn(panel.x, line) for run in curve.runs for line in run if panel.y(line) is not None),
        default=0.0,
    )


def _drawn(measure: Measure, line: Line) -> float:
    """The measure of a line that is drawn, in which it is known."""
    value = measure(line)
    return float("nan") if value is None else value
