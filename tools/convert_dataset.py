#!/usr/bin/env python
# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Convert annotations of any format to COCO's, and split them.

    python tools/convert_dataset.py Annotations/ converted/ --images JPEGImages/
    python tools/convert_dataset.py data.yaml converted/ --part train
    python tools/convert_dataset.py all.json converted/ --images images/ --split 0.8 0.2

The images stay where they are. What a format cannot hold is listed.

Exit status: 0 if all is written; 1 if a file could not be written; 2 for a mistake in what was
asked for, or in the annotations.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from vovnet_d2.data.formats import (
    describe_formats,
    read_annotations,
    split_content,
    write_coco,
)
from vovnet_d2.engine.launch import run_or_exit
from vovnet_d2.errors import UserValueError
from vovnet_d2.words import counted

PARTS = ("train", "val", "test")


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("annotations", type=Path, help=f"file or folder ({describe_formats()})")
    parser.add_argument("output", type=Path, help="folder to write to, which must be empty or new")
    parser.add_argument("--images", type=Path, metavar="FOLDER", help="the folder of images")
    parser.add_argument(
        "--part",
        metavar="NAME",
        help="the part of a data.yaml or of VOC's ImageSets (default: all)",
    )
    parser.add_argument(
        "--split",
        type=float,
        nargs="+",
        metavar="SHARE",
        help="split into train and val, or train, val and test, by shares that add up to 1. "
        "Classes are balanced, and images that look alike stay on one side",
    )
    parser.add_argument("--seed", type=int, default=1, help="seed of the split (default: 1)")
    return parser


def run(args: argparse.Namespace) -> None:
    if args.output.exists() and (not args.output.is_dir() or any(args.output.iterdir())):
        raise UserValueError(f"{args.output} exists and is not empty: choose another folder.")
    shares = find_shares(args.split)
    found = read_annotations(args.annotations, args.images, args.part)
    print(f"{args.annotations}: {found.describe()}")
    for note in found.notes:
        print(f"warning: {note}", file=sys.stderr)
    parts = {args.part or "all": found.content}
    if shares:
        parts = split_content(found.content, found.images, shares, seed=args.seed)
    args.output.mkdir(parents=True, exist_ok=True)
    for name, part in parts.items():
        write_coco(part, args.output / f"{name}.json")
    counts = ", ".join(
        f"{name} with {counted(len(part['images']), 'images')}" for name, part in parts.items()
    )
    print(f"Wrote COCO JSON to {args.output}: {counts}. Images: {found.images}.")


def find_shares(given: list[float] | None) -> dict[str, float]:
    if given is None:
        return {}
    if len(given) not in (2, 3) or min(given) <= 0 or not math.isclose(sum(given), 1):
        raise UserValueError(
            f"--split is {' '.join(map(str, given))}: give two or three shares above 0 that add up "
            "to 1, such as 0.8 0.2."
        )
    return dict(zip(PARTS, given, strict=False))


def main(argv: Sequence[str] | None = None) -> None:
    run_or_exit(run, argument_parser().parse_args(argv))


if __name__ == "__main__":
    main()
