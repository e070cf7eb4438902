# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Checks of the config of a run: its parts fit each other, this machine and the processes."""

import logging
import os
from collections.abc import Iterator

import torch
from detectron2.config import CfgNode
from detectron2.utils import comm
from fvcore.common.registry import Registry

from ..backends import check_backend
from ..errors import UserFileNotFoundError, UserValueError
from ..tiles import check_tiles
from ..words import counted, suggest, suggest_path
from .compilation import check_compilation
from .loggers import check_loggers
from .other_projects import PARTS
from .precision import autocast_dtype

logger = logging.getLogger(__name__)


def check_config(cfg: CfgNode, *, training: bool) -> None:
    """Check the network and the run that a config describes, without the data.

    Raises:
        ValueError: the network or its backbone is not registered, the processes cannot share the
            batch, keypoints are in another memory format than Detectron2 takes, the device lacks
            the precision, test-time augmentation is asked for where Detectron2 has none, tiles
            cannot be cut, or a backend cannot be used.
    """
    check_network(cfg)
    check_run(cfg, training=training)


def check_network(cfg: CfgNode) -> None:
    """Raise ValueError, with the names that are close, if a config names a part of the network that
    is not registered."""
    for key in ("META_ARCHITECTURE", "BACKBONE.NAME", *_used_parts(cfg)):
        node, _, name = key.rpartition(".")
        value = cfg.MODEL[node][name] if node else cfg.MODEL[name]
        _check_registered(f"MODEL.{key}", value, PARTS[key])


def _used_parts(cfg: CfgNode) -> Iterator[str]:
    """Yield the keys that name the parts of the network, for Detectron2's meta-architectures."""
    kind = cfg.MODEL.META_ARCHITECTURE
    if kind in ("SemanticSegmentor", "PanopticFPN"):
        yield "SEM_SEG_HEAD.NAME"
    if kind not in ("GeneralizedRCNN", "PanopticFPN", "ProposalNetwork"):
        return
    if cfg.MODEL.PROPOSAL_GENERATOR.NAME != "PrecomputedProposals":
        yield "PROPOSAL_GENERATOR.NAME"
    if cfg.MODEL.PROPOSAL_GENERATOR.NAME in ("RPN", "RRPN"):
        yield "RPN.HEAD_NAME"
    if kind == "ProposalNetwork":
        return
    yield "ROI_HEADS.NAME"
    if cfg.MODEL.ROI_HEADS.NAME in ("StandardROIHeads", "CascadeROIHeads"):
        yield "ROI_BOX_HEAD.NAME"
        yield from ["ROI_MASK_HEAD.NAME"] * cfg.MODEL.MASK_ON
        yield from ["ROI_KEYPOINT_HEAD.NAME"] * cfg.MODEL.KEYPOINT_ON


def _check_registered(key: str, name: str, registry: Registry) -> None:
    if name not in registry:
        names = [known for known, _ in registry]
        raise UserValueError(
            f"{key} {name!r} is not registered.{suggest(name, names)} There are: "
            f"{', '.join(names)}."
        )


def check_run(cfg: CfgNode, *, training: bool) -> None:
    """Check the keys that matter for a run, whatever builds the net; see :func:`check_config`."""
    if training:
        _check_batch(cfg)
        check_loggers(cfg)
        check_compilation(cfg)
    if cfg.TEST.AMP.ENABLED or (training and cfg.SOLVER.AMP.ENABLED):
        autocast_dtype(cfg)  # raises an error if the device lacks the precision
    _check_memory_format(cfg)
    if training and cfg.INPUT.COPY_PASTE:
        _check_copy_paste(cfg)
    if not training:
        check_backend(
            cfg.TEST.BACKEND,
            torch.device(cfg.MODEL.DEVICE),
            int8=bool(cfg.TEST.INT8),
            half=cfg.TEST.AMP.ENABLED,
        )
        if cfg.TEST.INT8 and not os.path.isfile(cfg.TEST.INT8):
            raise UserFileNotFoundError(
                f"There is no INT8 file {cfg.TEST.INT8}.{suggest_path(cfg.TEST.INT8)}"
            )
    if cfg.TEST.TILES:
        _check_tiles(cfg)
    if cfg.TEST.AUG.ENABLED:
        _check_test_time_augmentation(cfg)


def _check_batch(cfg: CfgNode) -> None:
    batch, processes = cfg.SOLVER.IMS_PER_BATCH, comm.get_world_size()
    if batch < 1 or batch % processes:
        raise UserValueError(
            f"SOLVER.IMS_PER_BATCH is {batch}: it must be a multiple of the number of processes, "
            f"which is {processes}."
        )
    parts = cfg.SOLVER.ACCUMULATE
    if parts < 1 or batch // processes % parts:
        raise UserValueError(
            f"SOLVER.ACCUMULATE is {parts}: it must divide the images of a process, which are "
            f"{batch // processes} (SOLVER.IMS_PER_BATCH {batch}, "
            f"{counted(processes, 'processes')})."
        )


def _check_memory_format(cfg: CfgNode) -> None:
    if cfg.MODEL.CHANNELS_LAST not in (None, True, False):
        raise UserValueError(
            f"MODEL.CHANNELS_LAST is {cfg.MODEL.CHANNELS_LAST!r}: choose True, False, or None for "
            "what is faster on this machine."
        )
    if cfg.MODEL.KEYPOINT_ON and cfg.MODEL.CHANNELS_LAST:
        raise UserValueError(
            "MODEL.KEYPOINT_ON needs MODEL.CHANNELS_LAST False: Detectron2's keypoint head takes "
            "contiguous maps only."
        )


def _check_copy_paste(cfg: CfgNode) -> None:
    has_labels = cfg.MODEL.META_ARCHITECTURE in ("PanopticFPN", "SemanticSegmentor")
    if not cfg.MODEL.MASK_ON or cfg.MODEL.KEYPOINT_ON or has_labels:
        raise UserValueError(
            f"INPUT.COPY_PASTE {cfg.INPUT.COPY_PASTE} pastes objects by their masks: it needs "
            "MODEL.MASK_ON True, and a network that learns no keypoints and no label maps. Set "
            "INPUT.COPY_PASTE 0 for others."
        )


def _check_tiles(cfg: CfgNode) -> None:
    check_tiles(cfg.TEST.TILES, cfg.TEST.TILE_OVERLAP)
    if cfg.TEST.AUG.ENABLED:
        raise UserValueError(
            "TEST.TILES and TEST.AUG.ENABLED cannot be combined: Detectron2's test-time "
            "augmentation takes whole images."
        )


def _check_test_time_augmentation(cfg: CfgNode) -> None:
    if cfg.MODEL.META_ARCHITECTURE != "GeneralizedRCNN" or cfg.MODEL.KEYPOINT_ON:
        raise UserValueError(
            "Detectron2 has test-time augmentation for GeneralizedRCNN without keypoints only: set "
            "TEST.AUG.ENABLED False."
        )


def check_schedule(cfg: CfgNode) -> None:
    """Check the schedule of a training, and warn of a training that is all warm-up.

    Raises:
        ValueError: ``TEST.PATIENCE`` needs evaluations that the training does not have, or
            ``SOLVER.EMA`` is no decay of an average.
    """
    if not 0 <= cfg.SOLVER.EMA < 1:
        raise UserValueError(
            f"SOLVER.EMA is {cfg.SOLVER.EMA}: give the decay of the weights' average, below 1 "
            "(0.9998, or 0.99 for a short training), or 0 for no average."
        )
    if cfg.SOLVER.WARMUP_ITERS >= cfg.SOLVER.MAX_ITER:
        logger.warning(
            "SOLVER.WARMUP_ITERS %d is not below SOLVER.MAX_ITER %d: the learning rate never "
            "reaches SOLVER.BASE_LR.",
            cfg.SOLVER.WARMUP_ITERS,
            cfg.SOLVER.MAX_ITER,
        )
    patience = cfg.TEST.PATIENCE
    if patience < 0:
        raise UserValueError(f"TEST.PATIENCE is {patience}: give a number of evaluations, or 0.")
    if patience and not (cfg.TEST.EVAL_PERIOD > 0 and cfg.DATASETS.TEST):
        raise UserValueError(
            f"TEST.PATIENCE is {patience}, and nothing is evaluated on the way: set "
            "TEST.EVAL_PERIOD and data to evaluate on (--val-annotations, DATASETS.TEST)."
        )
