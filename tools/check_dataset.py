#!/usr/bin/env python
# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Read data sets as a training does, and list what is wrong with them. The data sets are registered
ones, or annotation files of any known format.

    python tools/check_dataset.py digits_train digits_val
    python tools/check_dataset.py --train-annotations train.json --train-images images/ \\
        --fix fixed.json
    python tools/check_dataset.py --train-annotations data.yaml --val-annotations data.yaml

Exit status: 0 if there is no problem (notes are no problems); 1 if there is a problem, or if a file
could not be written; 2 for a mistake in the arguments. The first two describe the original files,
also with --fix.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from vovnet_d2.atomic import write_text
from vovnet_d2.data import register_digits
from vovnet_d2.data.check import (
    Source,
    check_data_sets,
    check_label_set,
    find_registered,
    format_report,
    is_label_set,
    report_to_json,
    require_free,
    write_fixed,
)
from vovnet_d2.data.formats import describe_formats, read_annotations, recognise
from vovnet_d2.data.voc import check_voc_set, is_voc_set, register_voc
from vovnet_d2.engine.launch import run_or_exit
from vovnet_d2.engine.own_data import add_annotation_arguments, find_annotations
from vovnet_d2.errors import UserFileNotFoundError, UserValueError
from vovnet_d2.made import refuse_foreign
from vovnet_d2.words import counted


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "names", nargs="*", help="data sets that are registered, the training set first"
    )
    files = parser.add_argument_group("annotation files", describe_formats("\n"))
    for split in ("train", "val"):
        add_annotation_arguments(files, split)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report as JSON, too")
    parser.add_argument(
        "--fix",
        type=Path,
        nargs="+",
        metavar="OUT",
        help="write corrected copies of the annotations, in COCO's format: one for each data set, "
        "in their order. The report says what they drop and change",
    )
    parser.add_argument(
        "--masks",
        action="store_true",
        help="check for a network that learns masks: objects without one are problems, and --fix "
        "drops them. By default they are kept for their boxes",
    )
    parser.add_argument(
        "--min-size",
        type=int,
        default=800,
        metavar="PIXELS",
        help="shorter side of the images in the training (INPUT.MIN_SIZE_TRAIN, default "
        "%(default)s): the report notes boxes that are tiny at this size",
    )
    parser.add_argument(
        "--max-size",
        type=int,
        default=1333,
        metavar="PIXELS",
        help="limit of their longer side (INPUT.MAX_SIZE_TRAIN, default %(default)s)",
    )
    return parser


def find_sources(args: argparse.Namespace) -> list[Source]:
    sources = []
    for split in ("train", "val"):
        if given := find_annotations(args, split):
            sources.append(find_source(split, *given))
    register_digits()
    register_voc()
    in_coco = [name for name in args.names if not (is_label_set(name) or is_voc_set(name))]
    sources += [find_registered(name) for name in in_coco]
    if not sources and not args.names:
        raise UserValueError(
            "Nothing to check: give --train-annotations and --train-images, or a name."
        )
    if args.fix and len(args.fix) != len(sources):
        raise UserValueError(
            f"--fix takes a file for each data set: {len(sources)}, in their order."
        )
    return sources


def find_source(split: str, path: Path, images: Path | None) -> Source:
    """Return the annotations to check. Other formats than COCO's are converted, and a line is
    printed for each kind of change."""
    if images and recognise(path) == "coco":
        return Source(split, path, images)
    found = read_annotations(path, images, split)
    print(f"{path}: {found.describe()}")
    for note in found.notes:
        print(f"  {note}")
    return Source(split, path, found.images, found.content)


def check_outputs(args: argparse.Namespace) -> None:
    """Find mistakes in them before images are read, which may take long."""
    for path in args.fix or []:
        require_free(path)
    if args.json and not args.json.parent.is_dir():
        raise UserFileNotFoundError(
            f"There is no folder {args.json.parent} to write {args.json} to."
        )
    refuse_foreign([args.json] if args.json else [])


def run(args: argparse.Namespace) -> int:
    sources = find_sources(args)
    check_outputs(args)
    checked, between = check_data_sets(
        sources, resize=(args.min_size, args.max_size), masks=args.masks
    )
    if sources:
        print(format_report(checked, between, fixing=bool(args.fix)))
    good = True
    for name in filter(is_label_set, args.names):
        text, usable = check_label_set(name)
        print(text)
        good &= usable
    for name in filter(is_voc_set, args.names):
        try:
            print(f"{name}: {counted(check_voc_set(name), 'images')}\n  no problem was found")
        except ValueError as error:
            print(error)
            good = False
    report = report_to_json(checked, between)
    if args.json:
        write_text(args.json, json.dumps(report, indent=2) + "\n")
    for one, path in zip(checked, args.fix or [], strict=bool(args.fix)):
        print(write_fixed(one, path))
    return 1 if report["problems"] or not good else 0


def main(argv: Sequence[str] | None = None) -> int:
    return run_or_exit(run, argument_parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
