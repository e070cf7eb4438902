#!/usr/bin/env python
# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""The example of a custom data set in README: a small Faster R-CNN, from scratch, on the blood
cells of BCCD, whose annotations are PASCAL VOC XML.

    git clone https://github.com/Shenggan/BCCD_Dataset
    python benchmarks/own_data_bccd.py --data BCCD_Dataset/BCCD --work output/own_data_bccd

Run from the repository's root. A training that was stopped goes on, and a finished one is not
repeated.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import median

from seeded_runs import describe, experiment_parser, read_run
from tabulate import tabulate

from vovnet_d2.atomic import atomic_write, write_text
from vovnet_d2.drawing.curves import Series, read_metrics
from vovnet_d2.engine import load_config
from vovnet_d2.timing import write_csv

CONFIG = "benchmarks/own_data_bccd/faster_rcnn_V_19_slim_eSE_half_FPN.yaml"
CLASSES = ["Platelets", "RBC", "WBC"]
METRICS = ["AP", "AP50", "AP75"]
FAULTS = (
    "Many red cells have no box, above all at the edges of the pictures. A detection of such a "
    "cell counts as wrong, so even a perfect detector would stay below 100. Two boxes of the "
    "training images are of one pixel; `tools/check_dataset.py` names them. All pictures are of "
    "one laboratory and one magnification."
)


def main() -> None:
    parser = experiment_parser(__file__, __doc__, "curves.csv, loss_curve.png and README.md")
    parser.add_argument("--data", type=Path, required=True, help="the folder BCCD of the clone")
    args = parser.parse_args()
    command = train(args)
    iterations = load_config(str(args.work / "config.yaml")).SOLVER.MAX_ITER
    rows = read_run(args.work, {}, iterations, {f"bbox/{name}": name for name in METRICS})
    series = read_metrics(str(args.work / "metrics.json"))
    args.output.mkdir(parents=True, exist_ok=True)
    with atomic_write(args.output / "curves.csv") as partial:
        write_csv(partial, rows)
    shutil.copy(args.work / "loss_curve.png", args.output)
    report = write_report(command, series)
    write_text(args.output / "README.md", report)
    print(report)


def train(args: argparse.Namespace) -> str:
    """Train with the command of README, if that is not done, and return the command."""
    lists = args.data / "ImageSets" / "Main"
    words = ["tools/train_net.py", "--config-file", CONFIG]
    words += ["--train-annotations", str(lists / "trainval.txt")]
    words += ["--val-annotations", str(lists / "test.txt")]
    words += ["--epochs", "15", "--fit-anchors"]
    command = [*words, "OUTPUT_DIR", str(args.work)]
    if not (args.work / "model_final.pth").exists():
        args.work.mkdir(parents=True, exist_ok=True)
        with open(args.work / "stdout.txt", "a") as stdout:
            resuming = [sys.executable, *words, "--resume", "OUTPUT_DIR", str(args.work)]
            subprocess.run(resuming, stdout=stdout, check=True)
    return shlex.join(["python", *command])


def write_report(command: str, series: Series) -> str:
    names = [*METRICS, *(f"AP-{name}" for name in CLASSES)]
    last = [f"{series[f'bbox/{name}'][-1][1]:.1f}" for name in names]
    milliseconds = 1000 * median(value for _, value in series["time"])
    protocol = {
        "training": f"`{command}`",
        "network": "Faster R-CNN, V-19-slim-eSE at half of its width, from scratch, images of "
        "320x240; float32",
        "data": "[BCCD](https://github.com/Shenggan/BCCD_Dataset) (MIT): 292 images of its "
        "trainval to train on, and 72 of its test. No setting was chosen by the test images",
        "step": f"{milliseconds:.0f} ms, the median of the training, data loading included",
    }
    return "\n\n".join(
        [
            "# A custom data set: blood cells",
            tabulate([last], names, tablefmt="pipe", disable_numparse=True),
            FAULTS,
            "![](loss_curve.png)",
            describe(protocol) + "\n",
        ]
    )


if __name__ == "__main__":
    main()
