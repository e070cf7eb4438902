# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Making weights: training a classifier, from the command line to its checkpoint."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

from detectron2.config import CfgNode
from detectron2.utils import comm

from ..data.classification import class_names
from ..modeling.baselines.cifar import CIFAR_SPECS
from .checks import check_initialisation
from .classifier import ClassifierTrainer
from .config import argument_parser
from .launch import launch_command
from .run import Task, run_task

__all__ = ["add_pretraining_config", "main", "run"]


def add_pretraining_config(cfg: CfgNode) -> None:
    """Add the keys of classification to a config. The rest of it means what it means elsewhere:
    ``MODEL.VOVNET``, ``INPUT.FORMAT`` and ``MODEL.PIXEL_*`` what the detectors' configs say."""
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


def main(argv: Sequence[str] | None = None) -> None:
    """The command line of ``tools/pretrain_net.py``; as that of ``tools/train_net.py``."""
    launch_command(run, argument_parser(), argv)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """What each process does; see :func:`run_task`.

    Returns:
        on the main process, ``{"classification": {"top1": ..., "top5": ...}}`` in percent.
    """
    return run_task(Task(ClassifierTrainer, _check, add_pretraining_config), args)


def _check(cfg: CfgNode, *, training: bool, resuming: bool) -> None:
    if cfg.PRETRAIN.NETWORK == "VoVNet":
        check_initialisation(cfg, training=training, resuming=resuming)
    _check_pretraining(cfg, training=training)
    cfg.PRETRAIN.NUM_CLASSES = len(_find_classes(cfg, training=training))


def _check_pretraining(cfg: CfgNode, *, training: bool) -> None:
    """
    Raises:
        ValueError: the input is not three channels, the network does not exist, there is not one
            split for training and one to evaluate, or mixup cannot pair the images of a batch.
    """
    node = cfg.PRETRAIN
    if cfg.INPUT.FORMAT not in ("BGR", "RGB") or len(cfg.MODEL.PIXEL_MEAN) != 3:
        raise ValueError(
            f"INPUT.FORMAT is {cfg.INPUT.FORMAT!r} with {len(cfg.MODEL.PIXEL_MEAN)} values in "
            "MODEL.PIXEL_MEAN: images are read as BGR or RGB, with three."
        )
    networks = ["VoVNet", *CIFAR_SPECS]
    if node.NETWORK not in networks:
        raise ValueError(
            f"PRETRAIN.NETWORK is {node.NETWORK!r}: choose from {', '.join(networks)}."
        )
    batch = cfg.SOLVER.IMS_PER_BATCH // comm.get_world_size()
    if training and (node.MIXUP > 0 or node.CUTMIX > 0) and batch % 2:
        raise ValueError(
            f"Mixup pairs the images of a process's batch, which are {batch}: set "
            "SOLVER.IMS_PER_BATCH to an even multiple of the number of processes."
        )
    for key in ("TRAIN", "TEST"):
        if len(cfg.DATASETS[key]) != 1:
            raise ValueError(
                f"DATASETS.{key} is {cfg.DATASETS[key]!r}: name one split of PRETRAIN.DATA, such "
                f"as \"('{'train' if key == 'TRAIN' else 'val'}',)\"."
            )


def _find_classes(cfg: CfgNode, *, training: bool) -> list[str]:
    data, (test,) = cfg.PRETRAIN.DATA, cfg.DATASETS.TEST
    if not data:
        raise ValueError(
            "PRETRAIN.DATA is empty: set it to a folder that holds train and val, with a folder of "
            "images for each class, or to digits."
        )
    classes = class_names(data, test)
    if training:
        (train,) = cfg.DATASETS.TRAIN
        pairs = enumerate(zip_longest(class_names(data, train), classes, fillvalue="missing"))
        if unequal := next(((i, a, b) for i, (a, b) in pairs if a != b), None):
            raise ValueError(
                "The classes of {} and {} in {} differ: number {}, by name, is {!r} in one and "
                "{!r} in the other.".format(train, test, data, *unequal)
            )
    return classes
