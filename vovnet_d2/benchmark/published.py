# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Write the VoVNet paper's tables of detectors, with measured figures next to the paper's."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from tabulate import tabulate

from .study import OWN_SIZE


class Published(NamedTuple):
    """A row of a table, with the names of the columns of a study. The accuracy is mAP on VOC07 or
    AP on COCO, in percent."""

    gflops: float
    fps: float
    parameters_m: float
    peak_memory_mb: float
    joules_per_image: float
    gflops_per_second: float
    accuracy: float


@dataclass(frozen=True)
class PaperTable:
    """Describes a table of the VoVNet paper that the benchmark can repeat.

    Attributes:
        folder: the folder of the config files.
        detectors: the paper's values for each detector, by the name of its config file.
        reference: the name of the detector that other speeds are divided by.
        accuracy: the name of the last column.
    """

    title: str
    folder: str
    detectors: Mapping[str, Published]
    reference: str
    accuracy: str

    @property
    def config_files(self) -> list[str]:
        return [f"{self.folder}/{name}.yaml" for name in self.detectors]


PAPER_TABLES = {
    "table2": PaperTable(
        title="Table 2 of the VoVNet paper: small detectors, 300 × 300, trained for VOC",
        folder="PascalVOC-Detection",
        detectors={
            "ssd300_MobileNet_120k": Published(1.1, 37, 5.7, 766, 2.3, 42, 68.0),
            "pelee304_PeleeNet_120k": Published(1.2, 35, 5.4, 1104, 2.4, 43, 70.9),
            "dsod300_DenseNet_67_100k": Published(5.3, 35, 5.9, 1294, 3.7, 189, 73.6),
            "dsod300_V_27_slim_100k": Published(5.6, 71, 5.9, 825, 0.9, 400, 74.8),
        },
        reference="dsod300_DenseNet_67_100k",
        accuracy="mAP",
    ),
    "table4": PaperTable(
        title="Table 4 of the VoVNet paper: RefineDet320, trained for COCO",
        folder="COCO-Detection",
        detectors={
            "refinedet320_R_50_400k": Published(25.43, 23.2, 63.46, 2229, 5.3, 591.3, 30.3),
            "refinedet320_DenseNet_201_400k": Published(24.65, 12.0, 56.13, 3498, 9.9, 296.9, 32.5),
            "refinedet320_V_39_400k": Published(32.6, 25.0, 56.28, 2199, 4.8, 815.0, 33.5),
            "refinedet320_R_101_400k": Published(33.02, 17.5, 82.45, 3013, 7.5, 579.2, 32.0),
            "refinedet320_DenseNet_161_400k": Published(
                32.74, 12.8, 66.76, 3628, 10.0, 419.7, 33.5
            ),
            "refinedet320_V_57_400k": Published(36.45, 21.2, 70.32, 2511, 5.9, 775.5, 33.9),
        },
        reference="refinedet320_R_50_400k",
        accuracy="AP",
    ),
}
"""Name of the preset to the table (VoVNet, arXiv 1904.09730, section 4), measured there on a
TITAN X (Pascal), in Caffe."""

_COLUMNS = {
    "gflops": ("FLOPs (G)", "{:.2f}"),
    "fps": ("FPS", "{:.1f}"),
    "relative": ("× FPS", "{:.2f}"),
    "parameters_m": ("#Param (M)", "{:.2f}"),
    "peak_memory_mb": ("Memory (MB)", "{:.0f}"),
    "joules_per_image": ("Energy (J/img)", "{:.1f}"),
    "gflops_per_second": ("Comp. efficiency (GFLOP/s)", "{:.1f}"),
}
_SOURCE = (
    "Measured here, and in brackets the paper's figures: a TITAN X (Pascal), Caffe. × FPS is the "
    "speed over that of {reference}. Here, without trained weights, NMS gets no boxes."
)


def format_paper_table(table: PaperTable, rows: Sequence[Mapping[str, Any]]) -> str:
    """Write a table with the paper's columns for each treatment and batch, from the rows of a
    study. Training, other image sizes than the config's, and networks that are not in the table are
    left out."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        same_work = row["mode"] == "inference" and row["compared_at"] == OWN_SIZE
        if row["network"] in table.detectors and same_work:
            group = f"{row['treatment']}, batch {row['batch']}"
            groups.setdefault(group, []).append(row)
    columns = _COLUMNS | {"accuracy": (table.accuracy, "{:.1f}")}
    headings = ["detector", *(heading for heading, _ in columns.values())]
    parts = [f"## {table.title}", _SOURCE.format(reference=table.reference)]
    for group, members in groups.items():
        speeds = {row["network"]: row["fps"] for row in members}
        lines = []
        for row in members:
            theirs = table.detectors[row["network"]]
            relative = theirs.fps / table.detectors[table.reference].fps
            ours = {**row, "relative": _ratio(row["fps"], speeds.get(table.reference))}
            paper = {**theirs._asdict(), "relative": f"{relative:.2f}"}
            cells = [_both(ours[c], paper[c], form) for c, (_, form) in columns.items()]
            lines.append([row["network"], *cells])
        text = tabulate(lines, headings, tablefmt="github", disable_numparse=True)
        parts.append(f"### {group}\n\n{text}")
    return "\n\n".join(parts)


def _ratio(value: float | None, reference: float | None) -> float | None:
    return value / reference if value and reference else None


def _both(ours: float | None, paper: float | str, form: str) -> str:
    """Write a measured figure and the paper's figure, with as many digits as the paper prints."""
    return f"{'–' if ours is None else form.format(ours)} ({paper})"
