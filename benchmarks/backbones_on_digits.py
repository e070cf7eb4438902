#!/usr/bin/env python
# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""ResNet-50, V-39-eSE and V-19-slim-eSE under a Mask R-CNN on the digits, with the same recipe and
several seeds: AP, AP by size, and the time of a training step.

    python benchmarks/backbones_on_digits.py --work output/backbones_on_digits

Run from the repository's root, on a machine that does nothing else. What is finished in the folder
of --work is not run again.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from statistics import median
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from seeded_runs import Run, describe, experiment_parser, mean_and_spread, read_run, run_all_once
from tabulate import tabulate

from vovnet_d2.atomic import atomic_write, write_text
from vovnet_d2.benchmark.networks import detector
from vovnet_d2.benchmark.study import Plan, Study
from vovnet_d2.engine.devices import parse_device
from vovnet_d2.timing import write_csv

CONFIGS = {
    "ResNet-50": "configs/Digits/mask_rcnn_R_50_FPN.yaml",
    "V-39-eSE": "configs/Digits/mask_rcnn_V_39_eSE_FPN.yaml",
    "V-19-slim-eSE": "configs/Digits/mask_rcnn_V_19_slim_eSE_FPN.yaml",
}
SIZES = {"APs": "small", "APm": "medium", "APl": "large"}
METRICS = {
    f"{task}/{name}": f"{kind} {name}"
    for task, kind in (("bbox", "box"), ("segm", "mask"))
    for name in ("AP", *SIZES)
}

Row = dict[str, Any]


def main() -> None:
    parser = experiment_parser(__file__, __doc__, "curves.csv, sizes.png and README.md")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--iterations", type=int, default=300)
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time")
    parser.add_argument("--device", type=parse_device, default="cpu", help="cpu or cuda")
    args = parser.parse_args()
    rows = run_all(args)
    steps = time_steps(args.device)
    args.output.mkdir(parents=True, exist_ok=True)
    with atomic_write(args.output / "curves.csv") as partial:
        write_csv(partial, rows)
    last = [row for row in rows if row["iteration"] == args.iterations]
    with atomic_write(args.output / "sizes.png") as partial:
        draw_sizes(last, "digits_val").savefig(partial, dpi=120, format="png")
    report = write_report(args, last, steps)
    write_text(args.output / "README.md", report)
    print(report)


def run_all(args: argparse.Namespace) -> list[Row]:
    runs = {}
    for seed in args.seeds:
        for network, config in CONFIGS.items():
            folder = args.work / f"{network}_{seed}"
            options = {
                "SEED": seed,
                "SOLVER.MAX_ITER": args.iterations,
                "TEST.EVAL_PERIOD": args.iterations // 3,
                "MODEL.DEVICE": args.device,
            }
            runs[network, seed] = Run("train_net", config, folder, options)
    run_all_once(list(runs.values()), args.jobs)
    rows = []
    for (network, seed), run in runs.items():
        labels = {"network": network, "seed": seed}
        rows += read_run(run.output_dir, labels, args.iterations, METRICS)
    return rows


def time_steps(
    device: torch.device, configs: dict[str, str] = CONFIGS, batch: int = 8
) -> list[Row]:
    """Time training steps of the networks in turn, with images of 192x192.

    Returns:
        a row of the benchmark for each network, in the order of ``configs``.
    """
    plan = Plan(
        networks=[detector(config) for config in configs.values()],
        treatments=["optimized"],
        modes=["training"],
        batches=[batch],
        sizes=[(192, 192)],
        device=device,
    )
    study = Study(plan)
    study.run()
    if study.interruption is not None:
        raise study.interruption
    if reasons := [row["error"] for row in study.rows if row["error"]]:
        raise RuntimeError("; ".join(reasons))
    return study.rows


def of_network(rows: list[Row], network: str, metric: str) -> list[float]:
    """Return the value of each seed."""
    return [row[metric] for row in rows if row["network"] == network]


def draw_sizes(last: list[Row], data: str) -> Figure:
    """Draw AP by size of the objects, a bar for each network."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    for panel, kind in zip(figure.subplots(1, 2, sharey=True), ("box", "mask"), strict=True):
        x = np.arange(1 + len(SIZES))
        for i, network in enumerate(CONFIGS):
            runs = [of_network(last, network, f"{kind} {name}") for name in ("AP", *SIZES)]
            places = x + (i - 1) * 0.27
            panel.bar(places, [np.mean(values) for values in runs], 0.25, label=network)
            for place, values in zip(places, runs, strict=True):
                panel.plot([place] * len(values), values, "k.", markersize=4)
        panel.set_xticks(x, ["all", *SIZES.values()])
        panel.set_title(f"{kind} AP by size; bars: mean, dots: the seeds", fontsize=10)
        panel.grid(axis="y", alpha=0.3)
    panel.legend()
    figure.axes[0].set_ylabel(f"AP on {data} (%) →")
    return figure


def write_table(last: list[Row], steps: list[Row], metrics: Iterable[str]) -> str:
    """Return a table in Markdown with AP and the time of a step, a row for each network."""
    metrics = list(metrics)
    table = []
    for network, step in zip(CONFIGS, steps, strict=True):
        cells = [mean_and_spread(of_network(last, network, name)) for name in metrics]
        time = f"{step['latency_ms']:.0f}"
        table.append([network, *cells, time, f"{step['time_of_network']:.2f}"])
    headers = ["network", *metrics, "step (ms)", "step / ResNet-50's"]
    return tabulate(table, headers, tablefmt="pipe", disable_numparse=True)


def write_report(args: argparse.Namespace, last: list[Row], steps: list[Row]) -> str:
    protocol = {
        "recipe": f"configs/Digits/Base-Mask-RCNN-FPN.yaml, from scratch, for all, "
        f"{args.iterations} iterations",
        "data": "200 images of digits_val, whose digits are not in the training set",
        "sizes": "COCO's: small is less than 32x32 pixels, large more than 96x96, as only 16 "
        "of the 711 objects are",
        "trainings": f"{args.jobs} at a time",
        "seeds": f"{', '.join(map(str, args.seeds))}; mean ± sample standard deviation",
        "step": "forward, backward and SGD with eight images of 192x192, as tools/benchmark.py "
        f"times them: median of {steps[0]['rounds']} rounds of all networks in turn, and median "
        "of the ratios within each round",
    }
    return "\n\n".join(
        [
            "# Backbones under a Mask R-CNN on the digits",
            write_table(last, steps, METRICS.values()),
            "![](sizes.png)",
            what_is_seen(last),
            describe(protocol, args.device) + "\n",
        ]
    )


def what_is_seen(last: list[Row]) -> str:
    """Say by how much V-39-eSE is better than ResNet-50, by size and for each seed."""
    sentences = []
    for kind in ("box", "mask"):
        gains = []
        for name, size in SIZES.items():
            ours, peer = (
                of_network(last, network, f"{kind} {name}") for network in ("V-39-eSE", "ResNet-50")
            )
            differences = [a - b for a, b in zip(ours, peer, strict=True)]
            gains.append(
                f"{size} {median(differences):+.1f} ({min(differences):+.1f} to "
                f"{max(differences):+.1f})"
            )
        sentences.append(f"{kind} AP: {', '.join(gains)}")
    return (
        "V-39-eSE less ResNet-50 with the same seed, median (least to greatest): "
        f"{'; '.join(sentences)}."
    )


if __name__ == "__main__":
    main()
