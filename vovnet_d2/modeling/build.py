# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""The builders that Detectron2 finds by name: each turns a config into the arguments of a backbone.

Elsewhere in ``modeling``, only the meta-architectures read a config, in ``from_config``.
"""

import logging
import re
from collections.abc import Callable
from dataclasses import fields
from typing import Any

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN, Backbone
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from torch import nn

from ..errors import UserKeyError, UserValueError
from .baselines.densenet import DenseNet67
from .baselines.peleenet import PeleeNet
from .baselines.timm_backbone import TimmBackbone
from .baselines.torchvision_backbone import TorchvisionBackbone
from .fpn import attach_fpn, strided_top_block
from .specs import VoVNetSpec, get_spec
from .vovnet import VoVNet

__all__ = [
    "build_densenet67_backbone",
    "build_fcos_vovnet_fpn_backbone",
    "build_peleenet_backbone",
    "build_retinanet_timm_fpn_backbone",
    "build_retinanet_vovnet_fpn_backbone",
    "build_timm_backbone",
    "build_timm_fpn_backbone",
    "build_torchvision_backbone",
    "build_vovnet_backbone",
    "build_vovnet_classifier",
    "build_vovnet_fpn_backbone",
    "register_backbones",
]

logger = logging.getLogger(__name__)


def build_vovnet_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> VoVNet:
    """Build the VoVNet that ``MODEL.VOVNET`` describes, and freeze its first stages.

    ``MODEL.BACKBONE.FREEZE_AT`` is the number of stages to freeze.

    Raises:
        KeyError: ``add_vovnet_config`` was not called.
        ValueError: a key has a value that does not exist; the message names the choices.
    """
    arguments = _vovnet_arguments(cfg, input_shape)
    return VoVNet(**arguments, out_features=cfg.MODEL.VOVNET.OUT_FEATURES)


def build_vovnet_classifier(cfg: CfgNode, input_shape: ShapeSpec, num_classes: int) -> VoVNet:
    """Build the classifier of :func:`build_vovnet_backbone`'s network, which returns "linear"."""
    return VoVNet(**_vovnet_arguments(cfg, input_shape), num_classes=num_classes)


def _vovnet_arguments(cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
    # MODEL.VOVNET of another project lacks our keys until add_vovnet_config adds them.
    if "STAGE5_DILATION" not in cfg.MODEL.get("VOVNET", {}):
        raise UserKeyError(
            "The config has no MODEL.VOVNET of vovnet_d2: call vovnet_d2.add_vovnet_config(cfg) "
            "right after get_cfg()."
        )
    node = cfg.MODEL.VOVNET
    return {
        "spec": _find_spec(node),
        "in_channels": input_shape.channels,
        "norm": node.NORM,
        "freeze_at": cfg.MODEL.BACKBONE.FREEZE_AT,
        "stage5_dilation": node.STAGE5_DILATION,
        "stage_with_dcn": node.STAGE_WITH_DCN,
        "with_modulated_dcn": node.WITH_MODULATED_DCN,
        "deformable_groups": node.DEFORMABLE_GROUPS,
        "checkpoint_blocks": node.CHECKPOINT_BLOCKS,
    }


def _find_spec(node: CfgNode) -> VoVNetSpec:
    overrides = {f.name: node.get(f.name.upper()) for f in fields(VoVNetSpec)}
    try:
        return get_spec(node.CONV_BODY, **{k: v for k, v in overrides.items() if v is not None})
    except ValueError as error:
        # The key of a field has the same name in capitals.
        message = re.sub(r"VoVNetSpec\.\w+", lambda m: _key(m[0]), str(error))
        raise UserValueError(message) from error


def _key(field: str) -> str:
    return f"MODEL.VOVNET.{field.partition('.')[2].upper()}"


def _build_fpn(cfg: CfgNode, bottom_up: Backbone, top_block: nn.Module | None) -> FPN:
    return attach_fpn(
        bottom_up,
        in_features=cfg.MODEL.FPN.IN_FEATURES,
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        norm=cfg.MODEL.FPN.NORM,
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
        top_block=top_block,
    )


def _build_retinanet_fpn(cfg: CfgNode, bottom_up: Backbone, in_feature: str) -> FPN:
    top_block = strided_top_block(bottom_up, cfg.MODEL.FPN.OUT_CHANNELS, in_feature)
    return _build_fpn(cfg, bottom_up, top_block)


def build_vovnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Build VoVNet with FPN for Faster, Mask, Keypoint and Cascade R-CNN; P6 is a max-pooled P5."""
    return _build_fpn(cfg, build_vovnet_backbone(cfg, input_shape), LastLevelMaxPool())


def build_retinanet_vovnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Build VoVNet with FPN, for RetinaNet.

    P6 and P7 come from ``MODEL.VOVNET.TOP_BLOCK_IN_FEATURE`` by strided convolutions.
    """
    bottom_up = build_vovnet_backbone(cfg, input_shape)
    return _build_retinanet_fpn(cfg, bottom_up, cfg.MODEL.VOVNET.TOP_BLOCK_IN_FEATURE)


def build_fcos_vovnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Build VoVNet with FPN, for FCOS.

    ``MODEL.FCOS.TOP_LEVELS`` is the number of further levels, which come from P5.
    """
    bottom_up = build_vovnet_backbone(cfg, input_shape)
    top_block = strided_top_block(
        bottom_up, cfg.MODEL.FPN.OUT_CHANNELS, "p5", cfg.MODEL.FCOS.TOP_LEVELS
    )
    return _build_fpn(cfg, bottom_up, top_block)


# The networks that VoVNet is compared with.


def build_timm_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> TimmBackbone:
    """Build the network of timm that ``MODEL.TIMM`` names."""
    node = cfg.MODEL.TIMM
    return TimmBackbone(
        node.NAME,
        in_channels=input_shape.channels,
        out_features=node.OUT_FEATURES,
        norm=node.NORM,
        # MODEL.WEIGHTS would replace the weights of timm.
        pretrained=node.PRETRAINED and not cfg.MODEL.WEIGHTS,
        freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT,
        arguments=node.ARGUMENTS,
    )


def build_timm_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Build a network of timm with the FPN of :func:`build_vovnet_fpn_backbone`."""
    return _build_fpn(cfg, build_timm_backbone(cfg, input_shape), LastLevelMaxPool())


def build_retinanet_timm_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Build a network of timm with FPN, for RetinaNet.

    P6 and P7 come from ``MODEL.TIMM.TOP_BLOCK_IN_FEATURE`` by strided convolutions.
    """
    bottom_up = build_timm_backbone(cfg, input_shape)
    return _build_retinanet_fpn(cfg, bottom_up, cfg.MODEL.TIMM.TOP_BLOCK_IN_FEATURE)


def build_torchvision_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> TorchvisionBackbone:
    """Build the network of torchvision that ``MODEL.TORCHVISION`` names. Raise ValueError if the
    input does not have three channels, which these networks need."""
    if input_shape.channels != 3:
        raise UserValueError(
            f"torchvision's networks take images of 3 channels, not {input_shape.channels}: timm "
            "has networks that take any number (build_timm_backbone)."
        )
    node = cfg.MODEL.TORCHVISION
    return TorchvisionBackbone(
        node.NAME,
        node.NODES,
        norm=node.NORM,
        # MODEL.WEIGHTS would replace the weights of torchvision.
        pretrained=node.PRETRAINED and not cfg.MODEL.WEIGHTS,
        freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT,
    )


def build_densenet67_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> DenseNet67:
    """Build DSOD's own backbone, with ``MODEL.DENSENET67.NORM``. ``FREEZE_AT`` does not apply."""
    return DenseNet67(in_channels=input_shape.channels, norm=cfg.MODEL.DENSENET67.NORM)


def build_peleenet_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> PeleeNet:
    """Build the PeleeNet that ``MODEL.PELEENET`` describes."""
    return PeleeNet(
        in_channels=input_shape.channels,
        norm=cfg.MODEL.PELEENET.NORM,
        out_features=cfg.MODEL.PELEENET.OUT_FEATURES,
        freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT,
    )


_BUILDERS: tuple[Callable[[CfgNode, ShapeSpec], Backbone], ...] = (
    build_vovnet_backbone,
    build_vovnet_fpn_backbone,
    build_retinanet_vovnet_fpn_backbone,
    build_fcos_vovnet_fpn_backbone,
    build_timm_backbone,
    build_timm_fpn_backbone,
    build_retinanet_timm_fpn_backbone,
    build_torchvision_backbone,
    build_densenet67_backbone,
    build_peleenet_backbone,
)


def _foreign_builders() -> dict[str, str]:
    """Return the names of our builders that another package registered, with its module."""
    registered = dict(BACKBONE_REGISTRY)
    return {
        builder.__name__: getattr(registered[builder.__name__], "__module__", "unknown")
        for builder in _BUILDERS
        if registered.get(builder.__name__, builder) is not builder
    }


def register_backbones(*, override: bool = False) -> None:
    """Register the builders in Detectron2's ``BACKBONE_REGISTRY``; importing the package does it.

    Args:
        override: replace builders that another VoVNet package registered under the same names. If
            False, these stay, and :func:`vovnet_d2.add_vovnet_config` raises an error.
    """
    foreign = _foreign_builders()
    for builder in _BUILDERS:
        name = builder.__name__
        if name in foreign and override:
            # fvcore's Registry has no way to replace an entry.
            BACKBONE_REGISTRY._obj_map.pop(name)
            logger.info("Backbone %s of %s replaced by vovnet_d2's.", name, foreign[name])
        if name not in BACKBONE_REGISTRY:
            BACKBONE_REGISTRY.register(builder)


def require_own_builders() -> None:
    """Raise KeyError if another package has registered the names of our builders. The message says
    which one, and how to choose."""
    if foreign := _foreign_builders():
        owners = ", ".join(f"{name} (by {module})" for name, module in foreign.items())
        raise UserKeyError(
            f"Registered by another package before vovnet_d2 was imported: {owners}. To use "
            "vovnet_d2's, call vovnet_d2.register_backbones(override=True) before "
            "add_vovnet_config(cfg); to keep theirs, do not call add_vovnet_config."
        )


register_backbones()
