# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Draw the four plots of the VoVNet paper's Figure 3."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

_AXES = {
    "fps": "images per second →",
    "accuracy": "accuracy →",
    "gflops": "← GFLOPs (multiply-adds)",
    "gflops_per_second": "computation efficiency (GFLOP/s) →",
    "joules_per_image": "← energy per image (J)",
}
"""The labels of the axes; an arrow points to the better end."""

_PLOTS = (
    ("fps", "accuracy"),
    ("gflops_per_second", "accuracy"),
    ("joules_per_image", "accuracy"),
    ("gflops_per_second", "joules_per_image"),
)
_MARKERS = "osD^vP*Xph"
_MISSING = {
    "accuracy": "the accuracy of no network was given (--accuracy)",
    "joules_per_image": "energy could not be measured",
}


def plot_cell(rows: Sequence[Mapping[str, Any]], title: str) -> tuple[Figure, list[str]]:
    """Plot speed, accuracy, energy and computation efficiency against each other.

    Backbones and detectors have separate plots. The first point of each network has its name. Each
    treatment has a marker.

    Args:
        rows: the rows of one mode, size and batch, without those that could not run.

    Returns:
        the figure, and a sentence for each plot that is left out or lacks networks.
    """
    missing = {axis for axis in _MISSING if all(row[axis] is None for row in rows)}
    chosen = [plot for plot in _PLOTS if not missing & set(plot)] or [("fps", "gflops")]
    sentences = [f"Some plots are left out, as {_MISSING[axis]}." for axis in sorted(missing)]
    unknown = sorted({row["network"] for row in rows if row["accuracy"] is None})
    if unknown and "accuracy" not in missing:
        sentences.append(f"No accuracy was given (--accuracy) of {', '.join(unknown)}.")
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    size = (6 * len(chosen), 0.7 + 4.3 * len(kinds))
    figure, axes = plt.subplots(
        len(kinds), len(chosen), figsize=size, layout="constrained", squeeze=False
    )
    treatments = dict(zip(dict.fromkeys(row["treatment"] for row in rows), _MARKERS, strict=False))
    for line, kind in zip(axes, kinds, strict=True):
        members = [row for row in rows if row["kind"] == kind]
        for axis, (x, y) in zip(line, chosen, strict=True):
            _plot(axis, members, x, y, treatments)
            axis.set_title(f"{kind}s", fontsize=9)
    lines = [
        Line2D([], [], color="0.3", linestyle="", marker=marker, label=name)
        for name, marker in treatments.items()
    ]
    figure.legend(handles=lines, loc="outside lower center", ncols=5, fontsize=8)
    figure.suptitle(title, fontsize=9, parse_math=False)
    return figure, sentences


def _plot(
    axis: Axes, rows: Sequence[Mapping[str, Any]], x: str, y: str, treatments: Mapping[str, str]
) -> None:
    networks = list(dict.fromkeys(row["network"] for row in rows))
    named: set[str] = set()
    for row in rows:
        if row[x] is not None and row[y] is not None:
            color = f"C{networks.index(row['network']) % 10}"
            # Points of one network lie close together, and several names would overlap.
            name = "" if row["network"] in named else row["network"]
            named.add(row["network"])
            _mark(axis, (row[x], row[y]), name, treatments[row["treatment"]], color)
    axis.set_xlabel(_AXES[x])
    axis.set_ylabel(_AXES[y])
    axis.margins(0.12)  # room for the names
    axis.grid(alpha=0.3)


def _mark(axis: Axes, place: tuple[float, float], name: str, marker: str, color: str) -> None:
    axis.scatter(*place, color=color, marker=marker, s=45)
    # Names of config files may have dollar signs, which start no formula.
    options: dict[str, Any] = {"textcoords": "offset points", "fontsize": 7, "parse_math": False}
    axis.annotate(name, place, xytext=(-3, 8), color=color, **options)
