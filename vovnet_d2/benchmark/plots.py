# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""The four plots of the VoVNet paper's Figure 3."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter

__all__ = ["plot_cell"]

_AXES = {
    "fps": "images per second",
    "accuracy": "accuracy",
    "gflops": "GFLOPs (multiply-adds)",
    "gflops_per_second": "computation efficiency (GFLOP/s)",
    "joules_per_image": "energy per image (J)",
}
# (x, y) of each plot, and what stands in for accuracy where that is not known.
_PLOTS = (
    ("fps", "accuracy", "gflops"),
    ("gflops_per_second", "accuracy", None),
    ("joules_per_image", "accuracy", None),
    ("gflops_per_second", "joules_per_image", None),
)
_WIDE = 8
_MARKERS = "osD^vP*Xph"
_MISSING = {
    "accuracy": "the accuracy of no network was given (--accuracy)",
    "joules_per_image": "energy could not be measured",
}


def plot_cell(rows: Sequence[Mapping[str, Any]], title: str) -> tuple[Figure, list[str]]:
    """Speed, accuracy, energy and computation efficiency against each other, a colour for each
    network and a marker for each treatment.

    Args:
        rows: of one mode, size and batch, without those that could not run.

    Returns:
        the figure, and a sentence for each plot that is left out, has FLOPs for accuracy, or lacks
        networks.
    """
    chosen, sentences = [], []
    for x, y, substitute in _PLOTS:
        missing = [axis for axis in (x, y) if all(row[axis] is None for row in rows)]
        reason = " and ".join(_MISSING[axis] for axis in missing)
        if missing == ["accuracy"] and substitute:
            sentences.append(f"{_AXES[x]} are plotted against {_AXES[substitute]}, as {reason}.")
            chosen.append((x, substitute))
        elif missing:
            sentences.append(f"No plot of {_AXES[y]} against {_AXES[x]}, as {reason}.")
        else:
            chosen.append((x, y))
    known = {row["network"] for row in rows if row["accuracy"] is not None}
    unknown = sorted({row["network"] for row in rows} - known)
    if known and unknown:
        names = ", ".join(unknown)
        sentences.append(f"No accuracy was given (--accuracy) of {names}, which some plots lack.")
    figure, axes = plt.subplots(
        1,
        len(chosen),
        figsize=(6 * len(chosen), 5 + 0.08 * len(rows)),
        layout="constrained",
        squeeze=False,
    )
    for axis, (x, y) in zip(axes[0], chosen, strict=True):
        _scatter(axis, rows, x, y)
    # A network may be in some of the plots only.
    points = {
        label: handle
        for axis in axes[0]
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    columns = 2 * len(chosen)
    legend = figure.legend(
        points.values(), points.keys(), loc="outside lower center", ncols=columns, fontsize=7
    )
    for text in legend.get_texts():  # names of config files: a dollar sign is a letter
        text.set_parse_math(False)
    figure.suptitle(title, fontsize=9, parse_math=False)
    return figure, sentences


def _scatter(axis: Axes, rows: Sequence[Mapping[str, Any]], x: str, y: str) -> None:
    networks = list(dict.fromkeys(row["network"] for row in rows))
    treatments = list(dict.fromkeys(row["treatment"] for row in rows))
    for row in rows:
        if row[x] is None or row[y] is None:
            continue
        axis.scatter(
            row[x],
            row[y],
            color=f"C{networks.index(row['network']) % 10}",
            marker=_MARKERS[treatments.index(row["treatment"]) % len(_MARKERS)],
            s=45,
            label=f"{row['network']}, {row['treatment']}",
        )
    axis.set_xlabel(_AXES[x])
    axis.set_ylabel(_AXES[y])
    values = [row[x] for row in rows if row[x]]
    if values and max(values) > _WIDE * min(values):  # else the slow ones would be one blot
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter(ScalarFormatter())
    axis.grid(alpha=0.3, which="both")
