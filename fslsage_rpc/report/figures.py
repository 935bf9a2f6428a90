"""Figures of runs, by matplotlib (the `plots` extra). An algorithm has the same colour in all of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes

Line = dict[str, Any]
"""one line of metrics.jsonl"""

ALGORITHMS = {
    "fsl_sage": ("FSL-SAGE", "#0072B2"),
    "cse_fsl": ("CSE-FSL", "#009E73"),
    "splitfed_v1": ("SplitFedV1", "#D55E00"),
    "splitfed_v2": ("SplitFedV2", "#E69F00"),
    "fedavg": ("FedAvg", "#CC79A7"),
}
"""names, and colours that colour-blind readers can tell apart (Okabe and Ito)"""


@dataclass(frozen=True)
class Curve:
    """One configuration in several seeds: per seed the lines of its `metrics.jsonl`."""

    label: str
    color: str
    runs: Sequence[Sequence[Line]]
    style: str = "-"
    marker: str | None = None


def draw(axes: Axes, curve: Curve, x: Callable[[Line], float], y: Callable[[Line], float | None]) -> None:
    """The mean over seeds of y against x, and a band from the lowest to the highest seed.

    Lines in which y is None (rounds that were not evaluated) are left out. x must not depend on the seed.
    """
    lines = [[line for line in run if y(line) is not None] for run in curve.runs]
    xs = [x(line) for line in lines[0]]
    ys = np.array([[y(line) for line in run] for run in lines])  # [seeds, points]
    axes.fill_between(xs, ys.min(0), ys.max(0), color=curve.color, alpha=0.18, linewidth=0)
    axes.plot(
        xs, ys.mean(0), curve.style, color=curve.color, label=curve.label, marker=curve.marker, markersize=4
    )


def tidy(axes: Axes, title: str, x_label: str, y_label: str) -> None:
    """Title, labelled axes with units, a light grid, and no box."""
    axes.set_title(title, fontsize="medium")
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
