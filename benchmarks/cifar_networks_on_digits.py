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

from cifar_networks import Experiment, carry_out
from seeded_runs import experiment_parser

from vovnet_d2.data.classification import build_classification_dataset
from vovnet_d2.engine import load_config
from vovnet_d2.engine.pretrain import add_pretraining_config

CONFIG = "configs/Classification/CIFAR_networks_digits.yaml"


def main() -> None:
    parser = experiment_parser(
        __file__, __doc__, "runs.csv, README.md and a folder of connectivity for each network"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--iterations", type=int, default=450)
    args = parser.parse_args()
    cfg = load_config(CONFIG, add_config=add_pretraining_config)
    size, batch = cfg.PRETRAIN.IMAGE_SIZE, cfg.SOLVER.IMS_PER_BATCH
    images = len(build_classification_dataset("digits", "train"))
    experiment = Experiment(
        title="DenseNet-40 and one-shot aggregation on the digits",
        data="the digits",
        config=CONFIG,
        options={"SOLVER.MAX_ITER": args.iterations},
        image_size=size,
        iterations=images / batch,
        protocol={
            "training": f"{CONFIG}, {args.iterations} iterations of {batch} images of "
            f"{size}×{size}",
            "error": "top-1, on the 360 validation digits: one digit is 0.28 %",
        },
    )
    carry_out(args, experiment)


if __name__ == "__main__":
    main()
