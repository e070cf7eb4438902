# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""The complexity of a network as a table, CSV, JSON and figure."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from tabulate import tabulate

from ..atomic import atomic_write, write_text
from ..made import refuse_foreign
from ..timing import write_csv
from .complexity import CONVENTIONS, Complexity

# Quantities and their names.
_QUANTITIES = {
    "parameters": "parameters",
    "multiply_adds": "multiply-adds",
    "activations": "activations",
    "memory_access": "memory access",
    "lower_bound": "its lower bound",
    "intensity": "intensity",
    "peak_memory": "peak memory",
}
_SCALES = {1e9: "G", 1e6: "M", 1e3: "k", 1: ""}


def _scale(complexity: Complexity, quantity: str) -> tuple[str, float]:
    """Return the heading of a quantity with its unit, and the number to divide it by."""
    name = _QUANTITIES[quantity]
    if quantity == "intensity":
        return name, 1
    # The lower bound has the unit of the memory access, so that the two can be compared.
    total = getattr(complexity.total, "memory_access" if quantity == "lower_bound" else quantity)
    divisor = next(divisor for divisor in _SCALES if total >= divisor or divisor == 1)
    return f"{name} ({_SCALES[divisor]}{'B' * (quantity == 'peak_memory')})", divisor


def format_table(complexity: Complexity) -> str:
    """Write the parts and their total as a table, rounded, with notes."""
    scales = {quantity: _scale(complexity, quantity) for quantity in _QUANTITIES}
    rows = []
    for part in (*complexity.parts, complexity.total):
        exact = part.as_dict()
        numbers = {
            heading: f"{exact[quantity] / divisor:,.{1 if quantity == 'intensity' else 3}f}"
            for quantity, (heading, divisor) in scales.items()
        }
        rows.append({"part": part.part, "output": exact["output_shape"] or ""} | numbers)
    table = tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True)
    return "\n".join([table, *(f"- {note}" for note in complexity.notes)])


def write_report(complexity: Complexity, folder: Path, header: Mapping[str, Any]) -> list[Path]:
    """Write ``complexity.csv``, ``.json`` and ``.png`` into ``folder``, with exact numbers, and
    return the paths. Raise ValueError if one of the files exists and this package did not make it.

    Args:
        header: lines for the top of each file: "network", "command", ...
    """
    folder.mkdir(parents=True, exist_ok=True)
    csv, json_path, png = paths = [folder / f"complexity.{kind}" for kind in ("csv", "json", "png")]
    refuse_foreign(paths)
    parts = [part.as_dict() for part in (*complexity.parts, complexity.total)]
    size = "x".join(map(str, complexity.image_size))
    header = {**header, "image_size": size, "notes": " ".join(complexity.notes)}
    with atomic_write(csv) as partial:
        write_csv(partial, parts, header)
    content = {**header, "conventions": CONVENTIONS, "parts": parts[:-1], "total": parts[-1]}
    write_text(json_path, json.dumps(content, indent=2) + "\n")
    figure = plot_complexity(complexity, f"{header['network']}, {size.replace('x', ' × ')}")
    with atomic_write(png) as partial:
        figure.savefig(partial, format="png")
    plt.close(figure)
    return [csv, json_path, png]


def plot_complexity(complexity: Complexity, title: str) -> Figure:
    """Draw a panel for each quantity, with a bar for each part.

    An arrow in the title of a panel points to the better end. A mark shows the lower bound of
    memory access.
    """
    parts = complexity.parts
    quantities = [quantity for quantity in _QUANTITIES if quantity != "lower_bound"]
    figure, axes = plt.subplots(
        2, 3, figsize=(11, 2.2 + 0.55 * len(parts)), layout="constrained", sharey=True
    )
    positions = range(len(parts))
    for axis, quantity in zip(axes.flat, quantities, strict=True):
        heading, divisor = _scale(complexity, quantity)
        bars = axis.barh(
            positions, [getattr(p, quantity) / divisor for p in parts], color="#4c72b0"
        )
        axis.bar_label(bars, fmt="{:,.3g}", padding=3, fontsize=8)
        axis.margins(x=0.22)
        title_of = "{} →" if quantity == "intensity" else "← {}"
        axis.set_title(title_of.format(heading), fontsize=10)
        if quantity == "memory_access":
            bounds = [p.lower_bound / divisor for p in parts]
            axis.scatter(
                bounds, positions, marker="|", s=180, color="#c44e52", label="lower bound", zorder=3
            )
            axis.legend(fontsize=8, loc="lower right")
    axes[0, 0].set_yticks(positions, [p.part for p in parts])
    axes[0, 0].invert_yaxis()
    figure.suptitle(title, parse_math=False)  # the name of a file may have dollar signs
    return figure
