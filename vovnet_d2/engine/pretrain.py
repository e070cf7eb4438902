# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Making weights: training a classifier, from the command line to its checkpoint."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.engine import default_setup, launch
from detectron2.evaluation import verify_results
from detectron2.utils import comm
from torch.multiprocessing import ProcessExitedException

from ..checkpoint import VoVNetCheckpointer
from ..config import add_vovnet_config
from ..data.classification import class_names
from ..modeling.baselines.cifar import CIFAR_SPECS
from .checks import check_config, check_initialisation
from .classifier import ClassifierTrainer
from .config import _merge_file, _merge_options, argument_parser, find_config
from .launch import _exit, _find_last_checkpoint, _raised_by_this_package, _start_logging
from .report import format_results
from .scaling import scale_to_batch, warn_of_unscaled_batch
from .trainer import report_loaded

__all__ = ["add_pretraining_config", "main", "run"]

logger = logging.getLogger(__name__)


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
    args = argument_parser().parse_args(argv)
    gpus = torch.cuda.device_count()
    if gpus and args.num_gpus > gpus:
        _exit(f"--num-gpus is {args.num_gpus}, but torch finds {gpus}.", 2)
    try:
        launch(
            _run_or_exit,
            args.num_gpus,
            num_machines=args.num_machines,
            machine_rank=args.machine_rank,
            dist_url=args.dist_url,
            args=(args,),
        )
    except ProcessExitedException as error:
        sys.exit(error.exit_code)


def _run_or_exit(args: argparse.Namespace) -> None:
    try:
        run(args)
    except FloatingPointError as error:
        _exit(str(error), 1)
    except (FileNotFoundError, KeyError, ValueError) as error:
        if not _raised_by_this_package(error):
            raise
        _exit(str(error.args[0]), 2)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """What each process does: train or only evaluate.

    Args:
        args: of :func:`argument_parser`.

    Returns:
        on the main process, ``{"classification": {"top1": ..., "top5": ...}}`` in percent.

    Raises:
        FloatingPointError: the training diverged.
        FileNotFoundError, KeyError, ValueError: arguments, config, data or weights do not fit.
    """
    cfg = _set_up(args)
    if args.eval_only:
        model = ClassifierTrainer.build_model(cfg)
        checkpointer = VoVNetCheckpointer(
            model,
            cfg.OUTPUT_DIR,
            allow_partial=args.allow_partial,
            allow_pickle=args.allow_pickle,
        )
        checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume)
        report_loaded(checkpointer, cfg, resume=args.resume)
        results = ClassifierTrainer.test(cfg, model)
    else:
        trainer = ClassifierTrainer(
            cfg, allow_partial=args.allow_partial, allow_pickle=args.allow_pickle
        )
        trainer.resume_or_load(resume=args.resume)
        results = trainer.train()
    if comm.is_main_process():
        logger.info("Results:\n%s", format_results(cfg, results))
        verify_results(cfg, results)
    return results


def _set_up(args: argparse.Namespace) -> CfgNode:
    if args.config_file:
        args.config_file = find_config(args.config_file)
    written = _load_config(args.config_file, [], args.allow_unsafe_yaml)
    cfg = _load_config(args.config_file, args.opts, args.allow_unsafe_yaml)
    _start_logging(cfg.OUTPUT_DIR)
    if args.auto_scale_lr:
        cfg = scale_to_batch(written, args.opts)
    elif not args.eval_only:
        warn_of_unscaled_batch(written, cfg)
    if torch.device(cfg.MODEL.DEVICE).type == "cuda" and not torch.cuda.is_available():
        logger.warning("torch finds no GPU: MODEL.DEVICE is set to cpu, which is slow.")
        cfg.MODEL.DEVICE = "cpu"
    training = not args.eval_only
    last = _find_last_checkpoint(cfg.OUTPUT_DIR)
    if training and last and not args.resume:
        logger.warning(
            "%s holds a run, up to %s: this one starts anew and overwrites its files. To go on "
            "with it instead, add --resume; to keep it, set another OUTPUT_DIR.",
            cfg.OUTPUT_DIR,
            os.path.basename(last),
        )
    check_config(cfg, training=training)
    if cfg.PRETRAIN.NETWORK == "VoVNet":
        check_initialisation(cfg, training=training, resuming=args.resume and bool(last))
    _check_pretraining(cfg, training=training)
    cfg.PRETRAIN.NUM_CLASSES = len(_find_classes(cfg, training=training))
    cfg.freeze()
    default_setup(cfg, args)
    return cfg


def _load_config(config_file: str, options: Sequence[str], allow_unsafe: bool) -> CfgNode:
    cfg = get_cfg()
    add_vovnet_config(cfg)
    add_pretraining_config(cfg)
    if config_file:
        _merge_file(cfg, config_file, allow_unsafe)
    _merge_options(cfg, options)
    return cfg


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
