#!/usr/bin/env python
# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""A Mask R-CNN on the digits, from scratch and from a backbone that was first trained to classify
them, at equal iterations and with several seeds.

    python benchmarks/pretraining_on_digits.py --work output/pretraining_on_digits

Run from the repository's root, on a machine that does nothing else. What is finished in the folder
of --work is not run again.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from seeded_runs import Run, describe, experiment_parser, mean_and_spread, read_run, run_once
from tabulate import tabulate

from vovnet_d2.atomic import atomic_write, write_text
from vovnet_d2.drawing.curves import read_metrics
from vovnet_d2.timing import write_csv

CLASSIFIER = "configs/Classification/V_19_slim_eSE_digits.yaml"
DETECTOR = "configs/Digits/mask_rcnn_V_19_slim_eSE_FPN.yaml"
STARTS = {"from scratch": "tab:blue", "pretrained": "tab:orange"}
METRICS = {"bbox/AP": "box AP", "segm/AP": "mask AP"}

Row = dict[str, Any]


def main() -> None:
    parser = experiment_parser(__file__, __doc__, "curves.csv, curves.png and README.md")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--iterations", type=int, default=150)
    parser.add_argument("--period", type=int, default=50, help="iterations from test to test")
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
    classifier = args.work / "classifier"
    run_once(Run("pretrain_net", CLASSIFIER, classifier, {}))
    weights = {"from scratch": "", "pretrained": classifier / "model_final.pth"}
    rows = []
    for seed in args.seeds:
        for start in STARTS:
            folder = args.work / f"{start.replace(' ', '_')}_{seed}"
            options = {
                "SEED": seed,
                "MODEL.WEIGHTS": weights[start],
                "SOLVER.MAX_ITER": args.iterations,
                "SOLVER.WARMUP_ITERS": args.iterations // 3,
                "TEST.EVAL_PERIOD": args.period,
            }
            run_once(Run("train_net", DETECTOR, folder, options))
            rows += read_run(folder, {"start": start, "seed": seed}, args.iterations, METRICS)
    return rows


def values(rows: list[Row], start: str, metric: str) -> dict[int, list[float]]:
    """Return for each iteration the values of all seeds."""
    found: dict[int, list[float]] = {}
    for row in rows:
        if row["start"] == start:
            found.setdefault(row["iteration"], []).append(row[metric])
    return found


def draw(rows: list[Row]) -> Figure:
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    for panel, metric in zip(figure.subplots(1, 2, sharey=True), METRICS.values(), strict=True):
        for start, colour in STARTS.items():
            curves = values(rows, start, metric)
            runs = np.array(list(curves.values()))
            x = list(curves)
            panel.plot(x, runs.mean(axis=1), "o-", color=colour, label=f"{start}, mean")
            panel.fill_between(
                x, runs.min(axis=1), runs.max(axis=1), color=colour, alpha=0.2, linewidth=0
            )
        panel.set_title(f"{metric} on digits_val; band: least to greatest of the seeds")
        panel.title.set_fontsize(10)
        panel.set_xlabel("iteration")
        panel.set_xticks(x)
        panel.grid(alpha=0.3)
    panel.legend(loc="upper left")
    figure.axes[0].set_ylabel("AP (%) →")
    figure.axes[0].set_ylim(bottom=0)
    return figure


def write_report(args: argparse.Namespace, rows: list[Row]) -> str:
    table = []
    for metric in METRICS.values():
        scratch, pretrained = (values(rows, start, metric) for start in STARTS)
        for iteration in scratch:
            a, b = scratch[iteration], pretrained[iteration]
            gains = [y - x for x, y in zip(a, b, strict=True)]
            cells = [mean_and_spread(numbers) for numbers in (a, b, gains)]
            table.append([metric, iteration, *cells, f"{min(gains):.1f}"])
    headers = ["metric", "iteration", *STARTS, "gain", "least gain"]
    top1 = read_metrics(str(args.work / "classifier" / "metrics.json"))["classification/top1"]
    protocol = {
        "classifier": f"{CLASSIFIER}, top-1 {top1[-1][1]:.2f} % on the validation digits",
        "detector": f"{DETECTOR}, {args.iterations} iterations including "
        f"{args.iterations // 3} of warm-up; everything else as in the file, for both",
        "seeds": f"{', '.join(map(str, args.seeds))} of the detectors; the classifier is one",
        "numbers": "mean ± sample standard deviation over the seeds; gain: with the same seed",
    }
    return "\n\n".join(
        [
            "# A detector from scratch and from a pretrained backbone, on the digits",
            tabulate(table, headers, tablefmt="pipe", disable_numparse=True),
            "![](curves.png)",
            describe(protocol) + "\n",
        ]
    )


if __name__ == "__main__":
    main()
