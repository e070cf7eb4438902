# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Training of a classifier, whose checkpoint is the backbone of a detector."""

import argparse
from collections.abc import Sequence
from typing import Any

from detectron2.config import CfgNode
from detectron2.utils import comm

from ..data.classification import class_names
from ..errors import UserValueError
from ..modeling.baselines.cifar import CIFAR_SPECS
from . import arguments
from .categories import first_difference
from .classifier import ClassifierTrainer
from .distillation import teacher_options
from .initial_weights import check_initialisation
from .launch import launch_command
from .run import run_task
from .task import YamlTask


def add_pretraining_config(cfg: CfgNode) -> None:
    """Add the keys of classification to a config. ``MODEL.VOVNET``, ``INPUT.FORMAT`` and
    ``MODEL.PIXEL_*`` mean the same as in the configs of detectors."""
    cfg.PRETRAIN = node = CfgNode()
    # "digits", the embedded ones; or a folder, see build_classification_dataset. The names in
    # DATASETS are its splits.
    node.DATA = ""
    # Taken from the data.
    node.NUM_CLASSES = 0
    # "VoVNet", which MODEL.VOVNET describes, or one of CIFAR_SPECS.
    node.NETWORK = "VoVNet"
    # Side of the square input in pixels.
    node.IMAGE_SIZE = 224
    # Part of the shorter side that is seen in evaluation.
    node.CROP_PCT = 0.875
    # Arguments of timm.data.create_transform: area and aspect ratio of the random crop,
    # probability of mirroring, strength of colour jitter (not where a policy is given), policy.
    node.SCALE = (0.08, 1.0)
    node.RATIO = (3 / 4, 4 / 3)
    node.HFLIP = 0.5
    node.COLOR_JITTER = 0.4
    node.AUTO_AUGMENT = ""
    # Probability of random erasing, alpha of mixup and CutMix: 0 is without.
    node.RE_PROB = 0.0
    node.MIXUP = 0.0
    node.CUTMIX = 0.0
    node.LABEL_SMOOTHING = 0.0
    # A name of timm.optim.list_optimizers().
    node.OPTIMIZER = "sgd"
    # DISTILLATION.TEACHER is a network of timm's here, and WEIGHTS "" stands for timm's weights.
    # The loss is between probabilities, which the temperature softens (arXiv 1503.02531).
    cfg.DISTILLATION.LOSS_WEIGHT = 1.0
    cfg.DISTILLATION.TEMPERATURE = 1.0


def argument_parser() -> argparse.ArgumentParser:
    """Return the arguments that all trainings share, and ``--teacher``."""
    parser = arguments.argument_parser("pretrain_net")
    parser.add_argument_group("a teacher (distillation)").add_argument(
        "--teacher",
        nargs=1,
        metavar="NAME",
        help="train with a loss that compares the probabilities of the classes with those of this "
        "network of timm's, with timm's weights or the file DISTILLATION.WEIGHTS",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line of ``tools/pretrain_net.py``, in as many processes as it asks for."""
    launch_command(run, argument_parser(), argv)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Train or evaluate a classifier in this process; see :func:`run_task`. Return
    ``{"classification": {"top1": ..., "top5": ...}}`` in percent on the main process."""
    args.opts = [*args.opts, *teacher_options(args)]
    return run_task(PretrainingTask(args))


class PretrainingTask(YamlTask):
    """A run of a classifier."""

    trainer = ClassifierTrainer

    def add_config(self, cfg: CfgNode) -> None:
        add_pretraining_config(cfg)

    def check(self, cfg: CfgNode, *, resuming: bool) -> None:
        super().check(cfg, resuming=resuming)
        if cfg.PRETRAIN.NETWORK == "VoVNet":
            check_initialisation(cfg, training=self.training, resuming=resuming)
        _check_pretraining(cfg, training=self.training)
        cfg.PRETRAIN.NUM_CLASSES = len(_find_classes(cfg, training=self.training))


def _check_pretraining(cfg: CfgNode, *, training: bool) -> None:
    """Check the keys of a classifier. Raise ValueError for a value that cannot be used."""
    node = cfg.PRETRAIN
    solver = cfg.SOLVER
    if solver.OPTIMIZER != "SGD" or solver.OPTIMIZER_ARGS or solver.LAYER_DECAY != 1:
        raise UserValueError(
            "SOLVER.OPTIMIZER, OPTIMIZER_ARGS and LAYER_DECAY are for detectors: "
            "PRETRAIN.OPTIMIZER names the optimizer of a classifier."
        )
    if cfg.INPUT.FORMAT not in ("BGR", "RGB") or len(cfg.MODEL.PIXEL_MEAN) != 3:
        raise UserValueError(
            f"INPUT.FORMAT is {cfg.INPUT.FORMAT!r} with {len(cfg.MODEL.PIXEL_MEAN)} values in "
            "MODEL.PIXEL_MEAN: images are read as BGR or RGB, with three."
        )
    networks = ["VoVNet", *CIFAR_SPECS]
    if node.NETWORK not in networks:
        raise UserValueError(
            f"PRETRAIN.NETWORK is {node.NETWORK!r}: choose from {', '.join(networks)}."
        )
    batch = cfg.SOLVER.IMS_PER_BATCH // comm.get_world_size() // cfg.SOLVER.ACCUMULATE
    if training and (node.MIXUP > 0 or node.CUTMIX > 0) and batch % 2:
        raise UserValueError(
            f"Mixup pairs the images that a process computes at once, which are {batch}: set "
            "SOLVER.IMS_PER_BATCH to an even multiple of the number of processes times "
            "SOLVER.ACCUMULATE."
        )
    for key in ("TRAIN", "TEST"):
        if len(cfg.DATASETS[key]) != 1:
            raise UserValueError(
                f"DATASETS.{key} is {cfg.DATASETS[key]!r}: name one split of PRETRAIN.DATA, such "
                f"as \"('{'train' if key == 'TRAIN' else 'val'}',)\"."
            )


def _find_classes(cfg: CfgNode, *, training: bool) -> list[str]:
    data, (test,) = cfg.PRETRAIN.DATA, cfg.DATASETS.TEST
    if not data:
        raise UserValueError(
            "PRETRAIN.DATA is empty: set it to a folder that holds train and val, with a folder of "
            "images for each class, or to digits."
        )
    classes = class_names(data, test)
    if training:
        (train,) = cfg.DATASETS.TRAIN
        if unequal := first_difference(class_names(data, train), classes):
            raise UserValueError(
                "The classes of {} and {} in {} differ: number {}, by name, is {!r} in one and "
                "{!r} in the other.".format(train, test, data, *unequal)
            )
    return classes
