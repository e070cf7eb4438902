# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Write the results of a study as a table for the terminal, and as JSON, CSV, Markdown and plots.

Every file says how and where its numbers were measured. In JSON and CSV every record says it.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from tabulate import tabulate

from ..atomic import atomic_write, write_text
from ..made import is_made_here
from ..timing import write_csv
from . import deployment
from .memory import SOURCES
from .plots import plot_cell
from .published import PaperTable, format_paper_table
from .study import MODES, Study

CONVENTIONS = {
    "GFLOPs": "multiply-adds of convolutions, fully-connected layers and attention for one image, "
    "in units of 10^9, as the VoVNet paper counts; in training with the backward pass. Of a "
    "detector's heads for the number of regions that its config allows, or that training samples, "
    "which may be fewer",
    "time": "of one call: median and 95th percentile of the rounds; FPS is the batch over the "
    "median. Images lie in the treatment's memory format beforehand. Of detectors without trained "
    "weights nothing is dropped for its score or its overlap, but of single-shot ones everything",
    "J/image": "energy of one call over the batch",
    "compared_at": "the size of image that networks are compared at, or each one's own",
    "GFLOP/s": "GFLOPs of the batch over the median time (the paper's computation efficiency)",
    "× network, × treatment": "time over that of the reference network under the same treatment, "
    "and over that of the same network under the reference treatment: median [quartiles] of the "
    "ratios within each round",
}
"""The rule for each column."""

FILES = ("benchmark.json", "benchmark.csv", "README.md")
"""The names of the files of a study, apart from its plots."""

# Each column has a heading and a format for its numbers.
_HEADINGS = {
    "network": ("network", "{}"),
    "treatment": ("treatment", "{}"),
    "image_size": ("image", "{}"),
    "gflops": ("GFLOPs", "{:.2f}"),
    "parameters_m": ("params (M)", "{:.2f}"),
    "latency_ms": ("ms", "{:.2f}"),
    "latency_p95_ms": ("p95 (ms)", "{:.2f}"),
    "fps": ("FPS", "{:.2f}"),
    "peak_memory_mb": ("memory (MB)", "{:.0f}"),
    "joules_per_image": ("J/image", "{:.3g}"),
    "file_mb": ("file (MB)", "{:.1f}"),
    "process_mb": ("process (MB)", "{:.0f}"),
    "images_per_second": ("img/s, all cores", "{:.2f}"),
    "gflops_per_second": ("GFLOP/s", "{:.1f}"),
    "time_of_network": ("× network", "{:.3f}"),
    "time_of_treatment": ("× treatment", "{:.3f}"),
    "accuracy": ("accuracy", "{:g}"),
    "box_ap": ("box AP", "{:.2f}"),
    "mask_ap": ("mask AP", "{:.2f}"),
    "not_counted": ("not counted", "{}"),
    "error": ("could not run", "{}"),
}


def format_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Write a table for each mode, image size and batch, without empty columns."""
    cells: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        cells.setdefault((row["mode"], row["compared_at"], row["batch"]), []).append(row)
    parts = []
    for (mode, size, batch), members in cells.items():
        columns = [c for c in _HEADINGS if any(row.get(c) not in (None, "") for row in members)]
        if all(row["image_size"] == size for row in members):
            columns.remove("image_size")
        lines = [[_format(row, column) for column in columns] for row in members]
        headings = [_HEADINGS[column][0] for column in columns]
        table = tabulate(lines, headings, tablefmt="github", disable_numparse=True)
        parts.append(f"### {mode}, {size.replace('x', ' × ')}, batch {batch}\n\n{table}")
    return "\n\n".join(parts)


def _format(row: Mapping[str, Any], column: str) -> str:
    value = row[column]
    if value is None:
        return ""
    text = _HEADINGS[column][1].format(value)
    if column.startswith("time_of"):
        text += f" [{row[column + '_q1']:.3f}, {row[column + '_q3']:.3f}]"
        text += f" of {row[column.replace('time_of', 'reference')]}"
    return text


def write_study(study: Study, folder: Path, paper_table: PaperTable | None = None) -> list[Path]:
    """Write ``benchmark.json``, ``benchmark.csv``, ``README.md`` and a PNG of plots for each mode,
    size and batch into ``folder``, and return the paths. ``paper_table`` is a table of the paper,
    which is filled in and put into ``README.md``."""
    folder.mkdir(parents=True, exist_ok=True)
    protocol = {**study.protocol, "memory": SOURCES[study.plan.device.type]}
    records = [{**row, **protocol} for row in study.rows]
    json_path, csv, markdown = (folder / name for name in FILES)
    conventions = CONVENTIONS | (deployment.CONVENTIONS if study.plan.deployment else {})
    content = {"conventions": conventions, "records": records}
    write_text(json_path, json.dumps(content, indent=2) + "\n")
    with atomic_write(csv) as partial:
        write_csv(partial, records)
    plots, sentences = _write_plots(study, folder)
    for mode in MODES:
        for earlier in {*folder.glob(f"{mode}_*_batch*.png")}.difference(plots):
            if is_made_here(earlier):
                earlier.unlink()
    lines = [
        "# Networks side by side",
        "",
        format_table(study.rows),
        "",
        *([format_paper_table(paper_table, study.rows), ""] if paper_table else []),
        *(f"![{path.stem.replace('_', ', ')}]({path.name})" for path in plots),
        "",
        *(f"- {name}: {value}" for name, value in (protocol | conventions).items()),
        *(f"- treatment {t.name}: {t.description}" for t in study.treatments()),
        *(f"- {sentence}" for sentence in sentences),
    ]
    write_text(markdown, "\n".join(lines) + "\n")
    return [json_path, csv, markdown, *plots]


def _write_plots(study: Study, folder: Path) -> tuple[list[Path], list[str]]:
    """Return the paths of the plots, and a sentence for each kind of plot that is left out."""
    measured = [row for row in study.rows if not row["error"]]
    cells = dict.fromkeys((row["mode"], row["compared_at"], row["batch"]) for row in measured)
    paths: list[Path] = []
    sentences: dict[str, None] = {}
    for cell in cells:
        members = [r for r in measured if (r["mode"], r["compared_at"], r["batch"]) == cell]
        mode, size, batch = cell
        protocol = study.protocol
        title = f"{mode}, {size}, batch {batch}; {protocol['device']}, torch {protocol['torch']}"
        figure, left_out = plot_cell(members, title)
        path = folder / f"{mode}_{size.replace(' ', '_')}_batch{batch}.png"
        with atomic_write(path) as partial:
            figure.savefig(partial, format="png")
        plt.close(figure)
        paths.append(path)
        sentences |= dict.fromkeys(left_out)
    return paths, list(sentences)
