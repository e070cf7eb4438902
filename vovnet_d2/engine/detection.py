# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Training and evaluating detectors: ``tools/train_net.py``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from typing import Any

from detectron2.config import CfgNode

from ..data import register_digits
from ..data.cityscapes import provide_cityscapes_scripts
from ..data.own import register_own_data
from ..data.voc import register_voc
from ..errors import UserValueError
from . import config
from .data_checks import check_data
from .distillation import add_teacher_argument, teacher_options
from .evaluation import check_evaluators
from .fitting import add_fitting_arguments, data_of, fit_to_data, refuse_to_fit
from .initial_weights import check_initialisation
from .launch import launch_command
from .own_data import add_own_data_arguments, use_own_data
from .rehearsal import rehearse_evaluation
from .run import Task, run_task
from .trainer import Trainer
from .written import find_written

__all__ = ["argument_parser", "main", "register_data", "run"]

_EXAMPLE = "COCO-Detection/faster_rcnn_V_39_eSE_FPN_1x.yaml"


def argument_parser() -> argparse.ArgumentParser:
    """Return the parser of ``tools/train_net.py``: the arguments of all trainings, and those for a
    custom data set.
    """
    parser = config.argument_parser()
    add_own_data_arguments(parser)
    add_fitting_arguments(parser)
    add_teacher_argument(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line of ``tools/train_net.py``, in as many processes as it asks for.

    Args:
        argv: the arguments, by default those of the program that is running.

    Raises:
        SystemExit: see :func:`launch_command`.
    """
    launch_command(run, argument_parser(), argv)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Train or evaluate a detector in this process; see :func:`run_task`.

    Raises:
        ValueError: there is no config, or a run that only evaluates has ``--epochs`` or
            ``--fit-anchors``; for the others see :func:`run_task`.
    """
    _require_config(args)
    refuse_to_fit(args)
    args.opts = [*args.opts, *teacher_options(args)]
    return run_task(Task(Trainer, partial(_check, args), fit=partial(_fit, args)), args)


def _require_config(args: argparse.Namespace) -> None:
    """Refuse a run without a config: nobody trains the detector of Detectron2's defaults."""
    if not args.config_file and "MODEL.BACKBONE.NAME" not in args.opts[::2]:
        data = " (--train-annotations and --val-annotations are data, and need one too)"
        raise UserValueError(
            "There is no config: give --config-file, a YAML file or the name of one of ours, such "
            f"as {_EXAMPLE}{data if args.train_annotations or args.val_annotations else ''}."
        )


def register_data(
    cfg: CfgNode, args: argparse.Namespace, *, training: bool, folder: str = ""
) -> None:
    """Register the data sets that a config may name, and complete the config by the user's files.

    Args:
        args: the arguments, from :func:`argument_parser`.
        folder: the folder for converted annotations; ``OUTPUT_DIR`` by default.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: see :func:`use_own_data` and :func:`register_own_data`.
    """
    register_digits()
    register_voc()
    provide_cityscapes_scripts()
    use_own_data(cfg, args, training=training, folder=folder)
    register_own_data(cfg.DATASETS.OWN)


def _check(args: argparse.Namespace, cfg: CfgNode, *, training: bool, resuming: bool) -> None:
    check_initialisation(cfg, training=training, resuming=resuming)
    register_data(cfg, args, training=training)
    check_data(cfg, training=training)
    check_evaluators(cfg)
    rehearse_evaluation(cfg, Trainer)


def _fit(args: argparse.Namespace, cfg: CfgNode, *, resuming: bool) -> bool:
    unsafe = args.allow_unsafe_yaml
    written = partial(find_written, args.config_file, args.opts, allow_unsafe_yaml=unsafe)
    rows = fit_to_data(cfg, args, written, data_of(cfg), resuming=resuming)
    return any(row.key == "SOLVER.MAX_ITER" for row in rows)
