#!/usr/bin/env python
# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Plot how strongly each layer uses the features of those before it, from the weights of a network
with one-shot aggregation or dense blocks: a figure like Figure 2 of the VoVNet paper, and its
numbers.

    python tools/plot_connectivity.py output/DenseNet-40/model_final.pth --output output/DenseNet-40
    python tools/plot_connectivity.py timm://ese_vovnet39b.ra_in1k --output output/vovnet39
    python tools/plot_connectivity.py DenseNet-40 --output output/untrained

With the name of a network for the weights it shows what initialisation alone gives: what to hold
trained weights against.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from tabulate import tabulate

from vovnet_d2 import VOVNET_SPECS, VoVNet
from vovnet_d2.analysis.connectivity import measure_connectivity, plot_connectivity
from vovnet_d2.atomic import atomic_write, write_text
from vovnet_d2.checkpoint.sources import read_weights
from vovnet_d2.engine.launch import run_or_exit
from vovnet_d2.made import refuse_foreign
from vovnet_d2.modeling.baselines.cifar import CIFAR_SPECS, CifarClassifier
from vovnet_d2.timing import describe_environment, write_csv


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "weights",
        help="what MODEL.WEIGHTS takes, a file, a URL or timm://...; or, for untrained weights, "
        f"one of {', '.join([*VOVNET_SPECS, *CIFAR_SPECS])}",
    )
    parser.add_argument(
        "--output", type=Path, required=True, help="folder for connectivity.csv, .json and .png"
    )
    parser.add_argument("--title", help="title of the figure; by default the name of the weights")
    parser.add_argument(
        "--allow-pickle", action="store_true", help="read a .pkl of Detectron2's model zoo"
    )
    return parser


def run(args: argparse.Namespace) -> None:
    csv, json_path, png = paths = [
        args.output / f"connectivity.{kind}" for kind in ("csv", "json", "png")
    ]
    refuse_foreign(paths)
    blocks = measure_connectivity(read_state_dict(args))
    print("Mean strength of the connections (the strongest of each block is 1)\n")
    summaries = [block.summary() for block in blocks]
    print(tabulate(summaries, headers="keys", tablefmt="github", floatfmt=".3f"))

    args.output.mkdir(parents=True, exist_ok=True)
    weights = f"{args.weights}, untrained" if is_network(args.weights) else args.weights
    header = {"weights": weights, "command": describe_environment("cpu")["command"]}
    with atomic_write(csv) as partial:
        write_csv(partial, [row for block in blocks for row in block.rows()], header)
    content = {**header, "blocks": [block.as_dict() for block in blocks]}
    write_text(json_path, json.dumps(content, indent=2) + "\n")
    figure = plot_connectivity(blocks, args.title or weights)
    with atomic_write(png) as partial:
        figure.savefig(partial, format="png")
    plt.close(figure)
    print(f"\nWrote {csv}, {json_path} and {png}.")


def is_network(weights: str) -> bool:
    return weights in VOVNET_SPECS or weights in CIFAR_SPECS


def read_state_dict(args: argparse.Namespace) -> dict[str, torch.Tensor]:
    if is_network(args.weights):
        torch.manual_seed(0)
        network = CifarClassifier if args.weights in CIFAR_SPECS else VoVNet
        return network(args.weights).state_dict()
    checkpoint, _ = read_weights(args.weights, allow_pickle=args.allow_pickle)
    return checkpoint["model"]


def main(argv: Sequence[str] | None = None) -> None:
    run_or_exit(run, argument_parser().parse_args(argv))


if __name__ == "__main__":
    main()
