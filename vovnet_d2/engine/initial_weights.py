# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""The weights that a run starts from: whether there are any, and whether they are complete."""

import logging
import os

from detectron2.config import CfgNode
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_backbone
from torch import nn

from ..checkpoint import VoVNetCheckpointer, check_input_convention
from ..checkpoint.zoo import ZOO
from ..errors import UserValueError
from ..words import counted, listed

logger = logging.getLogger(__name__)


def check_initialisation(
    cfg: CfgNode, *, training: bool, resuming: bool, backbone: nn.Module | None = None
) -> None:
    """Raise ValueError if a run needs weights and has none. A training needs weights if parts of
    its backbone are frozen. An evaluation always needs some. By default the backbone is built as
    the config describes it."""
    if cfg.MODEL.WEIGHTS or resuming:
        return
    if not training:
        raise UserValueError(
            "There are no weights to evaluate: set MODEL.WEIGHTS to a file (a training writes "
            "OUTPUT_DIR/model_final.pth), or add --resume for the newest in OUTPUT_DIR."
        )
    if is_pretrained(cfg):
        return
    backbone = backbone or build_backbone(cfg)
    frozen = [n for n, m in backbone.named_modules() if isinstance(m, FrozenBatchNorm2d)]
    frozen += [n for n, p in backbone.named_parameters() if not p.requires_grad]
    if frozen:
        raise UserValueError(
            "MODEL.WEIGHTS is empty and parts of the backbone are frozen, for example "
            f"{frozen[0]}: they would keep their random values, and the loss would diverge. Either "
            f"give weights{_suggest_weights(cfg)}, or train from scratch with "
            f"MODEL.{_backbone_node(cfg)}.NORM BN (or GN) and MODEL.BACKBONE.FREEZE_AT 0."
        )


def is_pretrained(cfg: CfgNode) -> bool:
    """Return True if a training with this config starts from weights, at least of the backbone."""
    backbone = cfg.MODEL.get(_backbone_node(cfg), {})
    return bool(cfg.MODEL.WEIGHTS or backbone.get("PRETRAINED", False))


def _suggest_weights(cfg: CfgNode) -> str:
    names = [n for n, entry in ZOO.items() if entry.variant == cfg.MODEL.VOVNET.CONV_BODY]
    if "vovnet" not in cfg.MODEL.BACKBONE.NAME or not names:
        return " in MODEL.WEIGHTS"
    body = cfg.MODEL.VOVNET.CONV_BODY
    return f" (MODEL.WEIGHTS {' or '.join(names)}; see the config files of {body})"


def _backbone_node(cfg: CfgNode) -> str:
    """Return the name of the node of ``cfg.MODEL`` that describes the backbone."""
    nodes = {"resnet": "RESNETS", "timm": "TIMM", "torchvision": "TORCHVISION"}
    nodes |= {"densenet67": "DENSENET67", "peleenet": "PELEENET"}
    found = [node for word, node in nodes.items() if word in cfg.MODEL.BACKBONE.NAME]
    return found[0] if found else "VOVNET"


def report_loaded(checkpointer: VoVNetCheckpointer, cfg: CfgNode, *, resume: bool) -> None:
    """Say where the weights come from, and whether they fit the config's input."""
    if resume and checkpointer.has_checkpoint():
        logger.info("Resumed from %s.", checkpointer.get_checkpoint_file())
    elif resume:
        logger.info(
            "Nothing to resume in %s: started from %s.",
            os.path.abspath(checkpointer.save_dir),
            cfg.MODEL.WEIGHTS or "random weights",
        )
    if warning := check_input_convention(cfg, checkpointer.input_convention):
        logger.warning(warning)


def check_all_loaded(checkpointer: VoVNetCheckpointer, weights: str, *, part: str = "") -> None:
    """Refuse to predict or evaluate with weights that leave parts of the network at random values.
    ``part`` is the beginning of the names of the tensors that are needed. Raise ValueError if the
    weights that ``checkpointer`` loaded last lack such a tensor."""
    missing = [n for n in checkpointer.missing_outside_backbone if n.startswith(part)]
    if missing:
        names = next(iter(checkpointer.loaded_categories.values()), [])
        way_out = (
            f"They were trained on {counted(len(names), 'categories')} ({listed(names)}): use the "
            "config.yaml that this training wrote."
            if names
            else "Train first, or give the weights of a whole model."
        )
        raise UserValueError(
            f"{weights} has no weights for {counted(len(missing), 'tensors')} outside the "
            f"backbone, for example {missing[0]}, which would be left at random values. {way_out} "
            "To go on all the same, add --allow-partial (in code: allow_partial=True)."
        )
