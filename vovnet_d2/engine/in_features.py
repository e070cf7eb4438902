# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""An explanation of heads that ask for feature maps which the backbone does not return."""

from collections.abc import Iterator
from contextlib import contextmanager

from detectron2.config import CfgNode
from detectron2.modeling import build_backbone

from ..errors import UserKeyError

_NODES = {
    "GeneralizedRCNN": ("RPN", "ROI_HEADS"),
    "PanopticFPN": ("RPN", "ROI_HEADS"),
    "ProposalNetwork": ("RPN",),
    "RetinaNet": ("RETINANET",),
}
"""The nodes of Detectron2's heads whose ``IN_FEATURES`` name feature maps, by meta-architecture."""


@contextmanager
def explain_in_features(cfg: CfgNode) -> Iterator[None]:
    """Turn the KeyError of Detectron2's heads, which has only the name of a feature map, into a
    message.

    Raises:
        KeyError: a network is built inside, and one of its heads asks for a feature map that the
            backbone does not return. The message names the config key and the feature maps.
    """
    try:
        yield
    except KeyError as error:
        name = error.args[0] if error.args else None
        nodes = _NODES.get(cfg.MODEL.META_ARCHITECTURE, ())
        keys = [
            f"MODEL.{node}.IN_FEATURES" for node in nodes if name in cfg.MODEL[node].IN_FEATURES
        ]
        if not keys:
            raise
        returned = ", ".join(build_backbone(cfg).output_shape())
        raise UserKeyError(
            f"MODEL.BACKBONE.NAME {cfg.MODEL.BACKBONE.NAME} returns no feature map {name!r}, which "
            f"is in {' and '.join(keys)}. It returns {returned}: choose from these."
        ) from error
