# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""The arguments of the command lines that train, and the word ``--opts`` of the other ones."""

import argparse
import re
from collections.abc import Sequence

from detectron2.engine import default_argument_parser

PICKLE_HELP = (
    "read weights stored as Python pickles (.pkl). Only their arrays are read; a pickle that would "
    "run code is refused"
)

_EXAMPLES = """
Examples:

Eight GPUs of a machine:
    $ python tools/{tool}.py --num-gpus 8 --config-file FILE.yaml

Other values of config options, after all arguments:
    $ python tools/{tool}.py --config-file FILE.yaml MODEL.WEIGHTS FILE.pth SOLVER.BASE_LR 0.001

Two machines, with this command on each, and --machine-rank 1 on the second:
    $ python tools/{tool}.py --num-gpus 8 --num-machines 2 --machine-rank 0 \\
        --dist-url tcp://first.example:29500 --config-file FILE.yaml
"""
_STATUSES = """
Exit status:
    0   done
    1   failed on the way
    2   a mistake in what was asked for
    75  a signal (SIGTERM, SIGUSR1, SIGHUP or Ctrl-C) ended the run; --resume goes on from the last
        checkpoint, or starts if there is none
"""


def base_parser(
    examples: str, *, unsafe_help: str
) -> tuple[argparse.ArgumentParser, argparse._ArgumentGroup]:
    """Return a parser of the arguments of all trainings, Detectron2's and ours, and our group.

    Args:
        examples: the commands that the help ends with, before the exit statuses.
        unsafe_help: the help of ``--allow-unsafe-yaml``.
    """
    parser = default_argument_parser(examples + _STATUSES)
    parser.conflict_handler = "resolve"  # groups copy this value when they are made
    group = parser.add_argument_group("arguments of vovnet_d2")
    parser.conflict_handler = "error"
    # These two replace Detectron2's arguments, only for a better help text.
    group.add_argument(
        "--config-file",
        default="",
        metavar="FILE",
        help="a config file, or the name of a config of this package",
    )
    resume = "go on from the last checkpoint in OUTPUT_DIR, or start if there is none"
    group.add_argument("--resume", action="store_true", help=resume)
    group.conflict_handler = "error"
    for name, effect in (
        (
            "--allow-partial",
            "load the tensors that fit, instead of refusing weights that do not fit the network",
        ),
        ("--allow-pickle", PICKLE_HELP),
        ("--allow-unsafe-yaml", unsafe_help),
        (
            "--progress",
            "show a progress bar with the time left instead of the log, which goes to "
            "OUTPUT_DIR/log.txt",
        ),
    ):
        group.add_argument(name, action="store_true", help=effect)
    return parser, group


def argument_parser(tool: str = "train_net") -> argparse.ArgumentParser:
    """Return the parser of a tool that takes YAML files. Its last words are config options. The
    examples in the help have the name of the tool."""
    parser, group = base_parser(
        _EXAMPLES.format(tool=tool),
        unsafe_help="load config files with Python tags (!!python/...), which can run any code: "
        "only for files that you have read",
    )
    group.add_argument(
        "--auto-scale-lr",
        action="store_true",
        help="fit learning rate, schedule, warm-up and periods to the batch of this run. Those in "
        "the config file are for its own SOLVER.IMS_PER_BATCH. Options on the command line stay "
        "as they are. If SOLVER.MAX_ITER is one of them, steps, warm-up and periods keep their "
        "share of it",
    )
    return parser


def parse_options_last(
    parser: argparse.ArgumentParser, words: Sequence[str] | None
) -> argparse.Namespace:
    """Parse a command line with ``--opts``, and tell a user who left this word out to add it."""
    args, unknown = parser.parse_known_args(words)
    if unknown:
        is_option = any(re.fullmatch(r"[A-Z][A-Z0-9_.]*|\+{0,2}[\w.]+=.*", w) for w in unknown)
        hint = ". Config options come last, after the word --opts" if is_option else ""
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
    return args


def add_options_argument(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """Add ``--opts``, for command lines on which arguments may take several words.

    The other command lines take config options as their last words.
    """
    parser.add_argument(
        "--opts",
        nargs=argparse.REMAINDER,
        default=[],
        metavar="OPTION",
        help="config options, after all other arguments: pairs such as MODEL.WEIGHTS FILE for a "
        "YAML file, words such as train.init_checkpoint=FILE for a LazyConfig",
    )
