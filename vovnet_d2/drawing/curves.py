# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Draw the losses of a training, and its scores on the validation data."""

import json
import os
from typing import Any

from ..atomic import atomic_write

Series = dict[str, list[tuple[int, float]]]

SCORES = ("/AP", "/mIoU", "/IoU", "/PQ", "/top1")
"""The ends of the names of metrics that sum an evaluation up."""


def read_metrics(path: str | os.PathLike[str]) -> Series:
    """Read Detectron2's ``metrics.json`` as ``{name: [(iteration, value), ...]}``.

    Runs append to the file. The values of a run that starts anew or resumes replace the values of
    an earlier run for the same iterations. Incomplete lines, which a killed run leaves, and other
    foreign lines are left out.
    """
    series: Series = {}
    last = -1
    with open(path, encoding="utf-8") as file:
        for line in file:
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue
            if not isinstance(row, dict) or "iteration" not in row:
                continue
            iteration = row.pop("iteration")
            if "total_loss" in row:  # rows of evaluations are not in order
                if iteration <= last:
                    series = {
                        name: [point for point in points if point[0] < iteration]
                        for name, points in series.items()
                    }
                last = iteration
            for name, value in row.items():
                series.setdefault(name, []).append((iteration, value))
    return {name: points for name, points in series.items() if points}


def draw_curves(folder: str) -> str | None:
    """Draw the losses in ``folder/metrics.json``, and AP if it was evaluated. Return the path of
    the picture, or None if nothing was trained."""
    metrics = os.path.join(folder, "metrics.json")
    if not os.path.isfile(metrics):
        return None
    series = read_metrics(metrics)
    losses = {name: points for name, points in series.items() if "loss" in name}
    scores = {name: points for name, points in series.items() if name.endswith(SCORES)}
    if not losses:
        return None
    import matplotlib
    from matplotlib.figure import Figure  # draws without a display, unlike pyplot

    figure = Figure(figsize=(10, 8 if scores else 5), layout="constrained")
    panels = figure.subplots(2 if scores else 1, sharex=True, squeeze=False)[:, 0]
    with matplotlib.rc_context({"text.parse_math": False}):  # a dollar sign is a letter
        _draw_panel(panels[0], losses, "← loss (median of 20 iterations)")
        if scores:
            _draw_panel(panels[1], scores, "on the validation data (%) →")
    panels[-1].set_xlabel("iteration")
    panels[-1].xaxis.get_major_locator().set_params(integer=True)
    path = os.path.join(folder, "loss_curve.png")
    with atomic_write(path) as partial:
        figure.savefig(partial, dpi=120, format="png")
    return path


def _draw_panel(panel: Any, series: Series, label: str) -> None:
    for name, points in sorted(series.items(), key=lambda item: item[0] != "total_loss"):
        panel.plot(
            *zip(*points, strict=True),
            label=name,
            linewidth=2.5 if name == "total_loss" else 1.2,
            color="black" if name == "total_loss" else None,
            marker="o" if len(points) < 20 else None,
            markersize=4,
        )
    panel.set_ylabel(label)
    panel.set_ylim(0, 1.04 * panel.get_ylim()[1])  # room for the markers of few points
    panel.grid(alpha=0.3)
    panel.legend(fontsize=9, loc="upper left", bbox_to_anchor=(1, 1))  # to the right of the curves
