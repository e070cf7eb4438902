#!/usr/bin/env python
# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Measure time against memory access at equal multiply-adds: convolutions of different shapes, and
one convolution against the same work in several. Writes convolutions_DEVICE.csv and .png.

    python tools/measure_convolutions.py --output output/convolutions
    python tools/measure_convolutions.py --device cuda --dtype float16 --batch 16 --output output/x
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from tabulate import tabulate

from vovnet_d2.analysis.convolution_study import make_cases, measure, plot
from vovnet_d2.atomic import atomic_write
from vovnet_d2.engine.devices import parse_device
from vovnet_d2.engine.launch import run_or_exit
from vovnet_d2.made import refuse_foreign
from vovnet_d2.timing import describe_environment, write_csv


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for the results")
    parser.add_argument("--device", type=parse_device, default="cpu", help="cpu or cuda")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    parser.add_argument("--batch", type=int, default=1, help="number of images")
    parser.add_argument("--size", type=int, default=56, help="height and width of the feature maps")
    parser.add_argument("--channels", type=int, default=448, help="channels of the references")
    parser.add_argument("--warmup", type=int, default=2, help="rounds that are not timed")
    parser.add_argument("--repeats", type=int, default=31, help="rounds that are timed")
    return parser


def run(args: argparse.Namespace) -> None:
    csv, png = (args.output / f"convolutions_{args.device.type}.{kind}" for kind in ("csv", "png"))
    refuse_foreign([csv, png])
    protocol = describe_environment(args.device) | {
        "dtype": args.dtype,
        "batch": args.batch,
        "maps": f"{args.size}x{args.size}",
        "warm-up": f"{args.warmup} rounds",
        "repeats": f"{args.repeats} rounds of all cases, in random order; medians",
    }
    rows = measure(
        make_cases(args.channels),
        size=args.size,
        batch=args.batch,
        device=args.device,
        dtype=getattr(torch, args.dtype),
        warmup=args.warmup,
        repeats=args.repeats,
    )
    print(*(f"{name}: {value}" for name, value in protocol.items()), "", sep="\n")
    print(tabulate(rows, headers="keys", tablefmt="github"))
    args.output.mkdir(parents=True, exist_ok=True)
    with atomic_write(csv) as partial:
        write_csv(partial, rows, protocol)
    described = ("device", "threads", "torch", "dtype", "batch", "maps", "repeats", "date")
    figure = plot(
        rows, "\n".join(_lines([f"{k} {protocol[k]}" for k in described if k in protocol]))
    )
    with atomic_write(png) as partial:
        figure.savefig(partial, format="png")
    plt.close(figure)
    print(f"\nWrote {csv} and {png}.")


def _lines(words: list[str]) -> list[str]:
    half = (len(words) + 1) // 2
    return [", ".join(words[:half]), ", ".join(words[half:])]


def main(argv: Sequence[str] | None = None) -> None:
    run_or_exit(run, argument_parser().parse_args(argv))


if __name__ == "__main__":
    main()
