# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""The comparison of the VoVNet paper's section 3.2, DenseNet-40 against one-shot aggregation, on
the data of the experiment that calls it."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from seeded_runs import Run, describe, mean_and_spread, run_once
from tabulate import tabulate

from vovnet_d2.analysis import analyze
from vovnet_d2.atomic import atomic_write, write_text
from vovnet_d2.drawing.curves import read_metrics
from vovnet_d2.modeling.baselines.cifar import CIFAR_SPECS, CifarClassifier
from vovnet_d2.timing import write_csv

__all__ = ["Experiment", "carry_out"]

Row = dict[str, Any]


@dataclass(frozen=True)
class Experiment:
    """Describes an experiment: its data, its trainings and its report.

    Attributes:
        title: heading of the report.
        data: what the networks are trained on, for the titles of the figures.
        config: config file of the trainings.
        options: config options of all trainings.
        image_size: side of the square images in pixels.
        iterations: of an epoch.
        protocol: lines of the report that say what was trained and evaluated, by name.
    """

    title: str
    data: str
    config: str
    options: Mapping[str, object]
    image_size: int
    iterations: float
    protocol: Mapping[str, str]


def carry_out(args: argparse.Namespace, experiment: Experiment) -> None:
    """Train what is not finished in ``args.work``, and write the report to ``args.output``."""
    rows = _run_all(args, experiment)
    args.output.mkdir(parents=True, exist_ok=True)
    with atomic_write(args.output / "runs.csv") as partial:
        write_csv(partial, rows)
    for network in CIFAR_SPECS:
        _plot_connectivity(args, experiment, network)
    report = _write_report(args, experiment, rows)
    write_text(args.output / "README.md", report)
    print(report)


def _run_all(args: argparse.Namespace, experiment: Experiment) -> list[Row]:
    """Train the networks in turn for each seed: a slow hour of the machine then meets them all."""
    rows = []
    for seed in args.seeds:
        for network in CIFAR_SPECS:
            options = {"SEED": seed, "PRETRAIN.NETWORK": network, **experiment.options}
            folder = args.work / f"{network}_{seed}"
            run_once(Run("pretrain_net", experiment.config, folder, options))
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


def _plot_connectivity(args: argparse.Namespace, experiment: Experiment, network: str) -> None:
    seed = args.seeds[0]
    command = ["tools/plot_connectivity.py", args.work / f"{network}_{seed}" / "model_final.pth"]
    command += ["--output", args.output / network]
    command += ["--title", f"{network}, trained on {experiment.data} (seed {seed})"]
    subprocess.run([sys.executable, *map(str, command)], check=True)


def _costs(network: str, image_size: int) -> Row:
    """Return the cost of the network as it is here, and the paper's count of it for CIFAR-10."""
    with torch.device("meta"):
        model = CifarClassifier(network)
        here, cifar = (analyze(model, (size, size)) for size in (image_size, 32))
    blocks = [part for part in cifar.parts if part.part not in ("stem", "linear")]
    return {
        "parameters": f"{here.total.parameters / 1e6:.2f} M",
        "multiply-adds": f"{here.total.multiply_adds / 1e6:.1f} M",
        "MAC": f"{here.total.memory_access / 1e6:.2f} M",
        "MAC of the blocks and transitions at 32×32": (
            f"{sum(part.memory_access for part in blocks) / 1e6:.2f} M"
        ),
    }


def _write_report(args: argparse.Namespace, experiment: Experiment, rows: list[Row]) -> str:
    table = []
    for network in CIFAR_SPECS:
        runs = [row for row in rows if row["network"] == network]
        times = [row["ms per iteration"] for row in runs]
        epochs = [time / 1000 * experiment.iterations for time in times]
        table.append(
            {
                "network": network,
                "error (%)": mean_and_spread([row["error"] for row in runs], 2),
                "errors of the seeds": ", ".join(f"{row['error']:.2f}" for row in runs),
                "ms per training iteration": mean_and_spread(times, 0),
                "s per epoch": mean_and_spread(epochs, 0),
                **_costs(network, experiment.image_size),
            }
        )
    spread = "mean ± sample standard deviation over the seeds; " if len(args.seeds) > 1 else ""
    protocol = {
        **experiment.protocol,
        "seeds": ", ".join(map(str, args.seeds)),
        "numbers": f"{spread}time: of the median iteration of a run, data loading included",
        "connectivity": f"of the networks of seed {args.seeds[0]}",
    }
    figures = [f"![{network}]({network}/connectivity.png)" for network in CIFAR_SPECS]
    parts = [
        f"# {experiment.title}",
        tabulate(table, headers="keys", tablefmt="pipe", disable_numparse=True),
        *figures,
        describe(protocol) + "\n",
    ]
    return "\n\n".join(parts)
