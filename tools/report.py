#!/usr/bin/env python
# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Write an HTML page about a run of train_net.py, finished or not: results, curves, AP by class and
size, confusion matrix, best and worst images, config and environment. The page needs no other file.

    python tools/report.py output
    python tools/report.py output --annotations mine/val.json --images mine/images

The second is for data sets that only a script of yours registers.
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

# torch reads this when it is imported: threads that wait leave the processor to other programs.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from detectron2.utils.logger import setup_logger

from vovnet_d2.engine.launch import run_or_exit


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="OUTPUT_DIR of the run")
    parser.add_argument("--output", type=Path, help="the page (default: FOLDER/report.html)")
    parser.add_argument(
        "--score-threshold",
        type=float,
        default=0.5,
        metavar="SCORE",
        help="least score in the confusion matrix and on the images (default: 0.5)",
    )
    parser.add_argument(
        "--annotations",
        type=Path,
        metavar="FILE",
        help="annotations of the run's DATASETS.TEST in COCO's format, if it is not registered",
    )
    parser.add_argument("--images", type=Path, metavar="FOLDER", help="images of that data set")
    return parser


def run(args: argparse.Namespace) -> None:
    # Here, so that a missing package is told as other errors are.
    from vovnet_d2.report import register_files, write_page

    if args.annotations or args.images:
        register_files(args.folder, args.annotations, args.images)
    setup_logger(name="vovnet_d2")
    print(write_page(args.folder, args.output, score_threshold=args.score_threshold))


def main(argv: Sequence[str] | None = None) -> None:
    run_or_exit(run, argument_parser().parse_args(argv))


if __name__ == "__main__":
    main()
