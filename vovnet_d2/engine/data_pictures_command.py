# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""The command line of ``tools/visualize_data.py``."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from detectron2.utils.logger import setup_logger

from ..errors import UserImportError, UserValueError
from .arguments import add_options_argument, parse_options_last
from .config import load_config
from .data_checks import check_data, check_data_sets
from .launch import run_or_exit
from .own_data import add_own_data_arguments
from .registered_data import register_data

_SHEETS = (".png", ".jpg", ".jpeg", ".pdf")

_DESCRIPTION = """\
Draw a data set without a screen: its annotations, or samples as training sees them, or results
next to the annotations. Images that cannot be read are named and skipped.

    python tools/visualize_data.py annotations drawn/ --config-file output/config.yaml
    python tools/visualize_data.py training samples.png --config-file Digits/mask_rcnn_R_50_FPN.yaml
    python tools/visualize_data.py results drawn/ --config-file output/config.yaml \\
        --results output/inference/coco_instances_results.json
"""


def _argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("annotations", "training", "results"))
    parser.add_argument(
        "output",
        type=Path,
        help=f"folder for the pictures, or a file ({', '.join(_SHEETS)}) for one sheet of all",
    )
    parser.add_argument(
        "--config-file", default="", help="YAML file, or a name of this package's configs"
    )
    parser.add_argument(
        "--dataset",
        default="",
        metavar="NAME",
        help="registered data set (default: the first of DATASETS.TRAIN, or of DATASETS.TEST for "
        "results)",
    )
    parser.add_argument("--results", type=Path, metavar="FILE", help="results in COCO's format")
    parser.add_argument(
        "--score-threshold",
        type=float,
        default=0.5,
        help="least score of results (default: %(default)s)",
    )
    parser.add_argument(
        "--number",
        type=int,
        default=16,
        metavar="N",
        help="number of pictures (default: %(default)s)",
    )
    add_options_argument(parser)
    add_own_data_arguments(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line of ``tools/visualize_data.py``, and exit with status 2 for wrong
    arguments."""
    run_or_exit(_run, parse_options_last(_argument_parser(), argv))


def _run(args: argparse.Namespace) -> None:
    with TemporaryDirectory() as folder:
        _draw(args, folder)


def _draw(args: argparse.Namespace, folder: str) -> None:
    """Draw what is asked for. Converted annotations go to ``folder``."""
    try:
        from . import data_pictures
    except ImportError as error:
        raise UserImportError(
            f"Drawing needs OpenCV and matplotlib ({error}): pip install 'vovnet_d2[demo]'."
        ) from error

    if args.number < 1:
        raise UserValueError(f"--number is {args.number}: it must be at least 1.")
    if (args.what == "results") != (args.results is not None):
        raise UserValueError("--results and results go together: give both.")
    setup_logger(name="vovnet_d2")
    cfg = load_config(args.config_file, args.opts)
    key = "TEST" if args.what == "results" else "TRAIN"
    if args.dataset:
        cfg.DATASETS[key] = (args.dataset,)
    register_data(cfg, args, training=args.what == "training", folder=folder)
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
    if args.output.suffix.lower() in _SHEETS:
        count = data_pictures.write_contact_sheet(args.output, drawn)
    else:
        count = data_pictures.write_pictures(args.output, drawn)
    if not count:
        reason = "there are no results" if args.results else "none of its images can be read"
        raise UserValueError(f"Nothing is drawn of {name}: {reason}.")
    print(f"Drew {count} pictures of {name} to {args.output}.")
