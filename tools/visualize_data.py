#!/usr/bin/env python
# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Draw a data set without a screen: its annotations, or samples as training sees them, or results
beside the annotations.

    python tools/visualize_data.py annotations drawn/ --config-file output/config.yaml
    python tools/visualize_data.py training samples.png --config-file Digits/mask_rcnn_R_50_FPN.yaml
    python tools/visualize_data.py results drawn/ --config-file output/config.yaml \\
        --results output/inference/coco_instances_results.json
"""

from __future__ import annotations

import argparse
from pathlib import Path

from detectron2.utils.logger import setup_logger

from vovnet_d2.engine import load_config
from vovnet_d2.engine.checks import check_data, check_data_sets
from vovnet_d2.engine.detection import register_data
from vovnet_d2.engine.launch import run_or_exit
from vovnet_d2.engine.own_data import add_own_data_arguments

SHEETS = (".png", ".jpg", ".jpeg", ".pdf")


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("annotations", "training", "results"))
    parser.add_argument(
        "output", type=Path, help=f"folder; or, with {', '.join(SHEETS)}, one sheet of all pictures"
    )
    parser.add_argument("--config-file", default="", help="YAML file, or its name among ours")
    parser.add_argument(
        "--dataset",
        default="",
        metavar="NAME",
        help="registered data set (default: the first that the config trains on; for results, "
        "evaluates on)",
    )
    parser.add_argument("--results", type=Path, metavar="FILE", help="in COCO's results format")
    parser.add_argument(
        "--score-threshold", type=float, default=0.5, help="of results (default: %(default)s)"
    )
    parser.add_argument(
        "--number", type=int, default=16, metavar="N", help="of pictures (default: %(default)s)"
    )
    parser.add_argument(
        "--opts", nargs=argparse.REMAINDER, default=[], help="config options; last of all"
    )
    add_own_data_arguments(parser)
    return parser


def main(args: argparse.Namespace) -> None:
    # Here, so that a missing package is told as other errors are.
    from vovnet_d2.engine import data_pictures

    if args.number < 1:
        raise ValueError(f"--number is {args.number}: it must be at least 1.")
    if (args.what == "results") != (args.results is not None):
        raise ValueError("--results and results go together: give both.")
    setup_logger(name="vovnet_d2")
    cfg = load_config(args.config_file, args.opts)
    key = "TEST" if args.what == "results" else "TRAIN"
    if args.dataset:
        cfg.DATASETS[key] = (args.dataset,)
    register_data(cfg, args, training=args.what == "training")
    if args.what == "training":
        check_data(cfg, training=True)
    else:
        check_data_sets(cfg, key)
    name = cfg.DATASETS[key][0]
    if args.what == "annotations":
        drawn = data_pictures.draw_annotations(name, number=args.number)
    elif args.what == "training":
        drawn = data_pictures.draw_training_samples(cfg, number=args.number)
    else:
        drawn = data_pictures.draw_results(
            name, args.results, number=args.number, min_score=args.score_threshold
        )
    write = data_pictures.write_contact_sheet
    if args.output.suffix.lower() not in SHEETS:
        write = data_pictures.write_pictures
    print(f"Drew {write(args.output, drawn)} pictures of {name} to {args.output}.")


if __name__ == "__main__":
    run_or_exit(main, argument_parser().parse_args())
