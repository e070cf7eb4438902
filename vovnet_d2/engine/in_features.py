# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""An explanation of heads that ask for feature maps which the backbone does not return."""

from collections.abc import Callable, Sequence

from detectron2.config import CfgNode
from detectron2.modeling import Backbone, build_backbone, build_model
from torch import nn

from ..errors import UserError, UserKeyError

_NODES = {
    "GeneralizedRCNN": ("RPN", "ROI_HEADS"),
    "PanopticFPN": ("RPN", "ROI_HEADS"),
    "ProposalNetwork": ("RPN",),
    "RetinaNet": ("RETINANET",),
}
"""The nodes of Detectron2's heads whose ``IN_FEATURES`` name feature maps, by meta-architecture."""

_SEMANTIC = ("PanopticFPN", "SemanticSegmentor")
"""The meta-architectures with a semantic head. Detectron2's head leaves out feature maps that it
does not find. A head of the user's may have no use for ``IN_FEATURES``.
"""


def build_explained(cfg: CfgNode, build: Callable[[CfgNode], nn.Module] = build_model) -> nn.Module:
    """Build the network of a config.

    Raises:
        KeyError: a head asks for a feature map that the backbone does not return. The message names
            the config key and the feature maps.
    """
    has_semantic_head = (
        cfg.MODEL.META_ARCHITECTURE in _SEMANTIC and cfg.MODEL.SEM_SEG_HEAD.NAME == "SemSegFPNHead"
    )
    try:
        network = build(cfg)
    except KeyError as error:  # Detectron2's heads raise it, with the name of a feature map alone
        name = error.args[0] if error.args else ""
        nodes = _NODES.get(cfg.MODEL.META_ARCHITECTURE, ())
        if keys := [node for node in nodes if name in cfg.MODEL[node].IN_FEATURES]:
            raise _explain(cfg, name, keys, build_backbone(cfg)) from error
        raise
    except ValueError as error:
        if has_semantic_head and not isinstance(error, UserError):  # it finds no feature map at all
            _check_semantic_head(cfg, build_backbone(cfg))
        raise
    if has_semantic_head:
        _check_semantic_head(cfg, network.backbone)
    return network


def _check_semantic_head(cfg: CfgNode, backbone: Backbone) -> None:
    for name in cfg.MODEL.SEM_SEG_HEAD.IN_FEATURES:
        if name not in backbone.output_shape():
            raise _explain(cfg, name, ["SEM_SEG_HEAD"], backbone)


def _explain(cfg: CfgNode, name: str, nodes: Sequence[str], backbone: Backbone) -> UserKeyError:
    keys = " and ".join(f"MODEL.{node}.IN_FEATURES" for node in nodes)
    return UserKeyError(
        f"MODEL.BACKBONE.NAME {cfg.MODEL.BACKBONE.NAME} returns no feature map {name!r}, which is "
        f"in {keys}. It returns {', '.join(backbone.output_shape())}: choose from these."
    )
