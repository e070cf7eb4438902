#!/usr/bin/env python
# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""The VoVNet paper's CIFAR-10 experiment (section 3.2) on the embedded digits: DenseNet-40 against
one-shot aggregation, with several seeds; and how strongly their layers are connected (Figure 2).

    python benchmarks/cifar_networks_on_digits.py --work output/cifar_networks_on_digits

Run from the repository's root, on a machine that does nothing else: times are among the results.
What is finished in the folder of --work is not run again.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

import torch
from seeded_runs import Run, describe, experiment_parser, mean_and_spread, run_once
from tabulate import tabulate

from vovnet_d2.analysis import analyze
from vovnet_d2.benchmark.protocol import write_csv
from vovnet_d2.checkpoint.atomic import atomic_write
from vovnet_d2.engine.pictures import read_metrics
from vovnet_d2.modeling.baselines.cifar import CIFAR_SPECS, CifarClassifier

CONFIG = "configs/Classification/CIFAR_networks_digits.yaml"

Row = dict[str, Any]


def main() -> None:
    parser = experiment_parser(
        __file__, __doc__, "runs.csv, README.md and a folder of connectivity for each network"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--iterations", type=int, default=450)
    args = parser.parse_args()
    rows = run_all(args)
    args.output.mkdir(parents=True, exist_ok=True)
    with atomic_write(args.output / "runs.csv") as partial:
        write_csv(partial, rows)
    for network in CIFAR_SPECS:
        plot_connectivity(args, network)
    report = write_report(args, rows)
    with atomic_write(args.output / "README.md") as partial:
        Path(partial).write_text(report, encoding="utf-8")
    print(report)


def run_all(args: argparse.Namespace) -> list[Row]:
    """Networks in turn for each seed, so that a machine that slows down meets them alike."""
    rows = []
    for seed in args.seeds:
        for network in CIFAR_SPECS:
            options = {
                "SEED": seed,
                "PRETRAIN.NETWORK": network,
                "SOLVER.MAX_ITER": args.iterations,
            }
            folder = args.work / f"{network}_{seed}"
            run_once(Run("pretrain_net", CONFIG, folder, options))
            series = read_metrics(str(folder / "metrics.json"))
            rows.append(
                {
                    "network": network,
                    "seed": seed,
                    "error": 100 - series["classification/top1"][-1][1],
                    "training loss": series["total_loss"][-1][1],
                    "ms per iteration": 1000 * median(value for _, value in series["time"]),
                }
            )
    return rows


def plot_connectivity(args: argparse.Namespace, network: str) -> None:
    seed = args.seeds[0]
    command = ["tools/plot_connectivity.py", args.work / f"{network}_{seed}" / "model_final.pth"]
    command += ["--output", args.output / network]
    command += ["--title", f"{network}, trained on the digits (seed {seed})"]
    subprocess.run([sys.executable, *map(str, command)], check=True)


def costs(network: str) -> Row:
    """Of the network as it is here, and the paper's count of it for CIFAR-10."""
    with torch.device("meta"):
        model = CifarClassifier(network)
        here, cifar = (analyze(model, (size, size)) for size in (16, 32))
    blocks = [part for part in cifar.parts if part.part not in ("stem", "linear")]
    return {
        "parameters": f"{here.total.parameters / 1e6:.2f} M",
        "multiply-adds": f"{here.total.multiply_adds / 1e6:.1f} M",
        "MAC": f"{here.total.memory_access / 1e6:.2f} M",
        "MAC of the blocks and transitions at 32×32": (
            f"{sum(part.memory_access for part in blocks) / 1e6:.2f} M"
        ),
    }


def write_report(args: argparse.Namespace, rows: list[Row]) -> str:
    table = []
    for network in CIFAR_SPECS:
        runs = [row for row in rows if row["network"] == network]
        table.append(
            {
                "network": network,
                "error (%)": mean_and_spread([row["error"] for row in runs], 2),
                "errors of the seeds": ", ".join(f"{row['error']:.2f}" for row in runs),
                "ms per training iteration": mean_and_spread(
                    [row["ms per iteration"] for row in runs], 0
                ),
                **costs(network),
            }
        )
    protocol = {
        "training": f"{CONFIG}, {args.iterations} iterations of 64 images of 16×16",
        "error": "top-1, on the 360 validation digits: one digit is 0.28 %",
        "seeds": ", ".join(map(str, args.seeds)),
        "numbers": "mean ± sample standard deviation over the seeds; time: of the median iteration "
        "of a run, data loading included",
        "connectivity": f"of the networks of seed {args.seeds[0]}",
    }
    figures = [f"![{network}]({network}/connectivity.png)" for network in CIFAR_SPECS]
    return "\n\n".join(
        [
            "# DenseNet-40 and one-shot aggregation on the digits",
            tabulate(table, headers="keys", tablefmt="pipe", disable_numparse=True),
            *figures,
            describe(protocol) + "\n",
        ]
    )


if __name__ == "__main__":
    main()
