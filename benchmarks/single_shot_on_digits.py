#!/usr/bin/env python
# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""RefineDet and DSOD on the digits, each with VoVNet and with a peer under the same recipe.

    python benchmarks/single_shot_on_digits.py --work output/single_shot_on_digits

Run from the repository's root, on a machine that does nothing else. What is finished in the folder
of --work is not run again.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from detectron2.modeling import build_model
from matplotlib.figure import Figure
from seeded_runs import Run, describe, experiment_parser, read_run, run_all_once
from tabulate import tabulate

from vovnet_d2.analysis.complexity import analyze
from vovnet_d2.atomic import atomic_write, write_text
from vovnet_d2.engine import load_config
from vovnet_d2.timing import write_csv

# Detector to its networks and their configs.
RUNS = {
    "RefineDet": {
        "VoVNet-27-slim": "configs/Digits/refinedet128_V_27_slim_2000.yaml",
        "ResNet-18": "configs/Digits/refinedet128_R_18_2000.yaml",
    },
    "DSOD": {
        "VoVNet-27-slim": "configs/Digits/dsod192_V_27_slim_600.yaml",
        "DenseNet-67": "configs/Digits/dsod192_DenseNet_67_600.yaml",
    },
}
METRICS = {"bbox/AP": "AP", "bbox/AP50": "AP50", "bbox/AP75": "AP75"}

Row = dict[str, Any]


def main() -> None:
    parser = experiment_parser(__file__, __doc__, "curves.csv, curves.png and README.md")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time")
    args = parser.parse_args()
    rows = run_all(args)
    args.output.mkdir(parents=True, exist_ok=True)
    with atomic_write(args.output / "curves.csv") as partial:
        write_csv(partial, rows)
    with atomic_write(args.output / "curves.png") as partial:
        draw(rows).savefig(partial, dpi=120, format="png")
    report = write_report(args, rows)
    write_text(args.output / "README.md", report)
    print(report)


def run_all(args: argparse.Namespace) -> list[Row]:
    options = {"SEED": args.seed}
    runs = {
        (detector, network): Run("train_net", config, args.work / f"{detector}_{network}", options)
        for detector, networks in RUNS.items()
        for network, config in networks.items()
    }
    run_all_once(list(runs.values()), args.jobs)
    rows = []
    for (detector, network), run in runs.items():
        labels = {"detector": detector, "network": network}
        iterations = load_config(run.config).SOLVER.MAX_ITER
        rows += read_run(run.output_dir, labels, iterations, METRICS)
    return rows


def draw(rows: list[Row]) -> Figure:
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    for panel, (detector, networks) in zip(
        figure.subplots(1, 2, sharey=True), RUNS.items(), strict=True
    ):
        for network in networks:
            own = [r for r in rows if (r["detector"], r["network"]) == (detector, network)]
            panel.plot([r["iteration"] for r in own], [r["AP50"] for r in own], "o-", label=network)
        panel.set_title(f"{detector}: box AP50 on digits_val", fontsize=10)
        panel.set_xlabel("iteration")
        panel.grid(alpha=0.3)
        panel.legend(loc="lower right")
    figure.axes[0].set_ylabel("AP50 (%) →")
    figure.axes[0].set_ylim(0, 100)
    return figure


def write_report(args: argparse.Namespace, rows: list[Row]) -> str:
    last = {(r["detector"], r["network"]): r for r in rows}
    table = [
        [
            detector,
            network,
            *describe_config(RUNS[detector][network]),
            *(f"{row[m]:.1f}" for m in METRICS.values()),
        ]
        for (detector, network), row in last.items()
    ]
    headers = ["detector", "network", "image", "iterations", "parameters (M)", "multiply-adds (G)"]
    headers += METRICS.values()
    protocol = {
        "data": "200 images of digits_val, whose digits are not in the training set; box AP",
        "recipe": "configs/Digits/Base-RefineDet.yaml and Base-DSOD.yaml, from scratch, with the "
        "stem of published weights. They differ in image size, heads and iterations, so that "
        "networks can be compared under a detector, and not the detectors",
        "trainings": f"{args.jobs} at a time; with one core each they took about 70 minutes in all",
        "seed": f"{args.seed}, one run each: with three seeds, box AP of the Mask R-CNNs in "
        "../backbones_on_digits had a standard deviation of 1.5 to 3.3, so that a difference of "
        "few points says little",
    }
    return "\n\n".join(
        [
            "# RefineDet and DSOD on the digits",
            tabulate(table, headers, tablefmt="pipe", disable_numparse=True),
            "![](curves.png)",
            describe(protocol) + "\n",
        ]
    )


def describe_config(config: str) -> list[str]:
    """Say the image size, the iterations and the cost of the detector."""
    cfg = load_config(config, ["MODEL.DEVICE", "meta"])
    with torch.device("meta"):
        model = build_model(cfg)
    side = cfg.INPUT.FIXED_SIZE
    total = analyze(model, (side, side)).total
    shape = [f"{side}x{side}", str(cfg.SOLVER.MAX_ITER)]
    return [*shape, f"{total.parameters / 1e6:.2f}", f"{total.multiply_adds / 1e9:.2f}"]


if __name__ == "__main__":
    main()
