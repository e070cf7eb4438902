#!/usr/bin/env python
# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""ResNet-50, V-39-eSE and V-19-slim-eSE under a Mask R-CNN on real images: the nuclei of the 2018
Data Science Bowl (CC0), each network from scratch with the same recipe.

    python benchmarks/backbones_on_nuclei.py --data DSB2018 --work output/backbones_on_nuclei

DSB2018 holds train.json, val_le100.json and images/. Run from the repository's root. The script
does not repeat the trainings that it finds finished in the folder of --work.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from backbones_on_digits import METRICS, draw_sizes, time_steps, write_table
from matplotlib.figure import Figure
from seeded_runs import Run, describe, experiment_parser, read_run, run_all_once

from vovnet_d2.atomic import atomic_write, write_text
from vovnet_d2.engine import load_config
from vovnet_d2.timing import write_csv

FOLDER = "benchmarks/backbones_on_nuclei"
CONFIGS = {
    "ResNet-50": f"{FOLDER}/mask_rcnn_R_50_FPN.yaml",
    "V-39-eSE": f"{FOLDER}/mask_rcnn_V_39_eSE_FPN.yaml",
    "V-19-slim-eSE": f"{FOLDER}/mask_rcnn_V_19_slim_eSE_FPN.yaml",
}
SMALL = "V-19-slim-eSE"
"""The network that is trained with several seeds, because it takes the least time."""

REPORTED = {key: name for key, name in METRICS.items() if not key.endswith("l")}

Row = dict[str, Any]


def main() -> None:
    parser = experiment_parser(__file__, __doc__, "curves.csv, curves.png, sizes.png, README.md")
    parser.add_argument("--data", type=Path, required=True, help="folder of the data set")
    parser.add_argument(
        "--seeds",
        type=int,
        nargs="+",
        default=[1, 2],
        help=f"of {SMALL}; the first is that of the others",
    )
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time")
    args = parser.parse_args()
    rows = run_all(args)
    steps = time_steps(
        torch.device("cpu"), CONFIGS, load_config(CONFIGS["V-39-eSE"]).SOLVER.IMS_PER_BATCH
    )
    args.output.mkdir(parents=True, exist_ok=True)
    with atomic_write(args.output / "curves.csv") as partial:
        write_csv(partial, rows)
    final = max(row["iteration"] for row in rows)
    last = [row for row in rows if row["iteration"] == final]
    with atomic_write(args.output / "curves.png") as partial:
        draw_curves(rows).savefig(partial, dpi=120, format="png")
    with atomic_write(args.output / "sizes.png") as partial:
        draw_sizes(last, "val_le100.json").savefig(partial, dpi=120, format="png")
    report = write_report(args, last, steps)
    write_text(args.output / "README.md", report)
    print(report)


def run_all(args: argparse.Namespace) -> list[Row]:
    """Train what is not finished, and return a row for each evaluation."""
    images = str(args.data / "images")
    data = ["--train-annotations", str(args.data / "train.json"), "--train-images", images]
    data += ["--val-annotations", str(args.data / "val_le100.json"), "--val-images", images]
    runs = {
        (network, seed): Run(
            "train_net", config, args.work / f"{network}_{seed}", {"SEED": seed}, data
        )
        for network, config in CONFIGS.items()
        for seed in (args.seeds if network == SMALL else args.seeds[:1])
    }
    run_all_once(list(runs.values()), args.jobs)
    rows = []
    for (network, seed), run in runs.items():
        labels = {"network": network, "seed": seed}
        iterations = load_config(run.config).SOLVER.MAX_ITER
        rows += read_run(run.output_dir, labels, iterations, METRICS)
    return rows


def draw_curves(rows: list[Row]) -> Figure:
    """Draw AP over the iterations: a line for the mean of the seeds, a dot for each."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    for panel, kind in zip(figure.subplots(1, 2, sharey=True), ("box", "mask"), strict=True):
        for network in CONFIGS:
            points: dict[int, list[float]] = {}
            for row in rows:
                if row["network"] == network:
                    points.setdefault(row["iteration"], []).append(row[f"{kind} AP"])
            means = [mean(values) for values in points.values()]
            (line,) = panel.plot(list(points), means, label=network)
            for iteration, values in points.items():
                panel.plot([iteration] * len(values), values, ".", color=line.get_color())
        panel.set_title(f"{kind} AP on val_le100.json", fontsize=10)
        panel.set_xlabel("iteration")
        panel.grid(alpha=0.3)
    panel.legend(loc="lower right")
    figure.axes[0].set_ylabel("AP (%) →")
    figure.axes[0].set_ylim(bottom=0)
    return figure


def write_report(args: argparse.Namespace, last: list[Row], steps: list[Row]) -> str:
    cfg = load_config(CONFIGS["V-39-eSE"])
    protocol = {
        "recipe": f"{FOLDER}/Base-Mask-RCNN-FPN.yaml, from scratch, {cfg.SOLVER.MAX_ITER} "
        f"iterations of {cfg.SOLVER.IMS_PER_BATCH} crops of 192x192, for all: "
        f"{cfg.SOLVER.MAX_ITER * cfg.SOLVER.IMS_PER_BATCH / 531:.1f} times the 531 images",
        "data": "the 2018 Data Science Bowl's stage 1 with corrected masks, split by kind of "
        "picture; AP on the 120 images with at most 100 nuclei. Published results are of the "
        "competition's own test set and metric, or of other splits, so that none can be compared",
        "sizes": "COCO's: small is less than 32x32 pixels; large nuclei are too few for a number",
        "seeds": f"{SMALL}: {', '.join(map(str, args.seeds))}, with mean ± sample standard "
        f"deviation; the others: {args.seeds[0]}",
        "step": f"forward, backward and AdamW with {cfg.SOLVER.IMS_PER_BATCH} images of 192x192, "
        f"as tools/benchmark.py times them: median of {steps[0]['rounds']} rounds of all networks "
        "in turn, and median of the ratios within each round",
    }
    return "\n\n".join(
        [
            "# Backbones under a Mask R-CNN on nuclei",
            write_table(last, steps, REPORTED.values()),
            "![](curves.png)",
            "![](sizes.png)",
            describe(protocol) + "\n",
        ]
    )


if __name__ == "__main__":
    main()
