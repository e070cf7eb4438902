# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Curves are drawn as SVG in the colours of the page's style sheet."""

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..drawing.curves import SCORES, Series
from .average_precision import Curves

# Okabe and Ito's colours, which colour-blind people can tell apart, and their names in the style
# sheet, which has others for dark pages.
_SERIES = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"]
_INK, _GRID = "#111111", "#bbbbbb"
_VARIABLES = {
    _INK: "currentColor",
    _GRID: "var(--rule)",
    **{color: f"var(--series-{number})" for number, color in enumerate(_SERIES, start=1)},
}
_DASHES = ["-", "--", "-.", ":"]  # lines that share a colour have other dashes

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text is not converted to outlines
    "svg.hashsalt": "vovnet_d2",
    "text.parse_math": False,
    "text.color": _INK,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "grid.color": _GRID,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "font.size": 9,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
}
_SIZE = (4.3, 3.2)  # inches; narrow, so that it can be read on a telephone
_CHARACTERS = 60  # characters in a row of a legend
_MAX_POINTS = 400  # more points of a curve than its pixels only make the page heavy


def draw_training(series: Series) -> dict[str, Markup]:
    """Draw the losses, the learning rate and the metrics that a run has.

    A curve of many points is drawn by the medians of neighbours.
    """
    losses = {name: points for name, points in series.items() if "loss" in name}
    losses = dict(sorted(losses.items(), key=lambda item: item[0] != "total_loss"))
    scores = {name: points for name, points in series.items() if name.endswith(SCORES)}
    rates = {name: points for name, points in series.items() if name == "lr"}
    panels = {"Losses": losses, "Learning rate": rates, "On the validation data (%)": scores}
    figures = {}
    for title, curves in panels.items():
        drawn = {name: np.array(points, float) for name, points in curves.items()}
        drawn = {name: points for name, points in drawn.items() if np.isfinite(points).all(1).any()}
        if drawn:
            figures[title] = _draw_by_iteration(drawn)
    return figures


def _draw_by_iteration(curves: Mapping[str, np.ndarray]) -> Markup:
    with matplotlib.rc_context(_STYLE):
        figure, axes = _new_figure()
        styles = iter(_line_styles(len(curves)))
        curves = {name: _thin(points) for name, points in curves.items()}
        for name, points in curves.items():
            color, dashes = (_INK, "-") if name == "total_loss" else next(styles)
            x, y = points.T
            axes.plot(x, y, dashes, color=color, label=name, marker="o" if len(x) < 20 else None)
        values = np.concatenate([points[:, 1] for points in curves.values()])
        values = values[np.isfinite(values)]
        axes.set_ylim(min(0, values.min()), 1.06 * max(values.max(), 0) or 1)
        axes.set_xlabel("iteration")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10], integer=True))
        _add_legend(axes)
        return _to_svg(figure)


def _thin(points: np.ndarray) -> np.ndarray:
    if len(points) <= _MAX_POINTS:
        return points
    return np.array([np.median(part, axis=0) for part in np.array_split(points, _MAX_POINTS)])


def draw_precision_recall(recalls: np.ndarray, curves: Curves, labels: Sequence[str]) -> Markup:
    """Draw precision over recall, with a line for each curve."""
    with matplotlib.rc_context(_STYLE):
        figure, axes = _new_figure()
        styles = _line_styles(len(curves))
        for values, label, (color, dashes) in zip(curves.values(), labels, styles, strict=True):
            axes.plot(recalls, values, dashes, color=color, label=label)
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1.02)
        axes.set_xlabel("recall →")
        axes.set_ylabel("precision →")
        _add_legend(axes)
        return _to_svg(figure)


def sparkline(recalls: np.ndarray, values: np.ndarray) -> str:
    """Return the points of an SVG polyline of a curve in a square of 100 by 100, with y
    downwards."""
    return " ".join(
        f"{100 * x:.3g},{100 * (1 - y):.3g}" for x, y in zip(recalls, values, strict=True)
    )


def _new_figure() -> tuple[Figure, Axes]:
    figure = Figure(figsize=_SIZE, layout="constrained")
    return figure, figure.subplots()


def _line_styles(count: int) -> list[tuple[str, str]]:
    return [
        (_SERIES[k % len(_SERIES)], _DASHES[k // len(_SERIES) % len(_DASHES)]) for k in range(count)
    ]


def _add_legend(axes: Axes) -> None:
    """Put the legend below the axes, where it hides no curve."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    longest = max(len(str(line.get_label())) for line in axes.get_lines())
    columns = max(1, min(3, _CHARACTERS // (longest + 6)))
    figure.legend(loc="outside lower center", ncols=columns, columnspacing=1.2, handlelength=1.8)


def _to_svg(figure: Figure) -> Markup:
    file = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'<g id="[^"]*">', "<g>", svg)  # all figures have the same ids
    svg = re.sub(r"font-family: [^;\"]*(; )?", "", svg)
    for color, variable in _VARIABLES.items():
        svg = svg.replace(f": {color}", f": {variable}")
    return Markup(svg)
