# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Training and evaluating detectors: ``tools/train_net.py``."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from typing import Any

from detectron2.config import CfgNode

from ..data import register_digits
from ..data.voc import register_voc
from .checks import check_data, check_initialisation
from .config import argument_parser
from .evaluation import check_evaluators
from .launch import launch_or_exit
from .run import Task, run_task
from .trainer import Trainer

__all__ = ["main", "run"]


def main(argv: Sequence[str] | None = None) -> None:
    """The command line of ``tools/train_net.py``, in as many processes as it asks for.

    Args:
        argv: the arguments, by default those of the program that is running.

    Raises:
        SystemExit: see :func:`launch_or_exit`.
    """
    args = argument_parser().parse_args(argv)
    if argv is None:
        args.command = shlex.join(["python", *sys.argv])
    launch_or_exit(run, args)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """What each process does; see :func:`run_task`."""
    register_digits()
    register_voc()
    return run_task(Task(Trainer, _check), args)


def _check(cfg: CfgNode, *, training: bool, resuming: bool) -> None:
    check_initialisation(cfg, training=training, resuming=resuming)
    check_evaluators(cfg)
    check_data(cfg, training=training)
