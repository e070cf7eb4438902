# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Training and evaluating detectors: ``tools/train_net.py``."""

import argparse
from collections.abc import Sequence
from functools import partial
from typing import Any

from detectron2.config import CfgNode

from ..errors import UserValueError
from . import arguments
from .data_checks import check_data
from .distillation import add_teacher_argument, teacher_options
from .evaluation import check_evaluators
from .fitting import add_fitting_arguments, data_of, fit_to_data, refuse_to_fit
from .initial_weights import check_initialisation
from .launch import launch_command
from .own_data import add_own_data_arguments
from .registered_data import register_data
from .rehearsal import rehearse_evaluation
from .run import run_task
from .scaling import warn_of_unscaled_batch
from .task import YamlTask
from .written import find_written

_EXAMPLE = "COCO-Detection/faster_rcnn_V_39_eSE_FPN_1x.yaml"


def argument_parser() -> argparse.ArgumentParser:
    """Return the parser of ``tools/train_net.py``: the arguments of all trainings, and those for a
    custom data set.
    """
    parser = arguments.argument_parser()
    add_own_data_arguments(parser)
    add_fitting_arguments(parser)
    add_teacher_argument(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line of ``tools/train_net.py``, in as many processes as it asks for. For the
    exit see :func:`launch_command`."""
    launch_command(run, argument_parser(), argv)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Train or evaluate a detector in this process; see :func:`run_task`, also for the errors.
    Raise ValueError if there is no config, or if a run that only evaluates has ``--epochs`` or
    ``--fit-anchors``."""
    _require_config(args)
    refuse_to_fit(args)
    args.opts = [*args.opts, *teacher_options(args)]
    return run_task(DetectionTask(args))


def _require_config(args: argparse.Namespace) -> None:
    """Refuse a run without a config. Nobody trains the detector of Detectron2's defaults."""
    if not args.config_file and "MODEL.BACKBONE.NAME" not in args.opts[::2]:
        data = " (--train-annotations and --val-annotations are data, and need one too)"
        raise UserValueError(
            "There is no config: give --config-file, a YAML file or the name of one of ours, such "
            f"as {_EXAMPLE}{data if args.train_annotations or args.val_annotations else ''}."
        )


class DetectionTask(YamlTask):
    """A run of a detector that a YAML file describes."""

    def check(self, cfg: CfgNode, *, resuming: bool) -> None:
        super().check(cfg, resuming=resuming)
        check_initialisation(cfg, training=self.training, resuming=resuming)
        register_data(cfg, self.args, training=self.training)
        check_data(cfg, training=self.training)
        check_evaluators(cfg)
        rehearse_evaluation(cfg, self.trainer)

    def fit(self, cfg: CfgNode, *, resuming: bool) -> None:
        args = self.args
        unsafe = args.allow_unsafe_yaml
        written = partial(find_written, args.config_file, args.opts, allow_unsafe_yaml=unsafe)
        rows = fit_to_data(cfg, args, written, data_of(cfg), resuming=resuming)
        # No row means that the data did not change the schedule.
        if not any(row.key == "SOLVER.MAX_ITER" for row in rows):
            super().fit(cfg, resuming=resuming)
        elif not args.auto_scale_lr:  # the user's file may have set the learning rate
            warn_of_unscaled_batch(self._written, cfg)
