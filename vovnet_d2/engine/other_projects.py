# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Config files of other projects with a VoVNet: what they ask for, in this package's keys."""

from __future__ import annotations

import logging
from typing import Any

from detectron2.config import CfgNode

__all__ = ["translate"]

logger = logging.getLogger(__name__)

# Keys of AdelaiDet's MODEL.FCOS that this package does not have, and the values that ask for what
# its FCOS does; none where the value does not matter, or has no effect on a detector alone.
_FCOS_KEYS: dict[str, tuple[Any, ...]] = {
    "FPN_STRIDES": ([8, 16, 32, 64, 128],),
    "SIZES_OF_INTEREST": ([64, 128, 256, 512],),
    "USE_RELU": (True,),
    "USE_DEFORMABLE": (False,),
    "NUM_SHARE_CONVS": (0,),
    "CENTER_SAMPLE": (True,),
    "LOC_LOSS_TYPE": ("giou",),
    "BOX_QUALITY": ("ctrness",),
    "USE_SCALE": (),
    "THRESH_WITH_CTR": (),
    "INFERENCE_TH_TRAIN": (),
    "PRE_NMS_TOPK_TRAIN": (),
    "POST_NMS_TOPK_TRAIN": (),
    "YIELD_PROPOSAL": (False,),
    "YIELD_BOX_FEATURES": (False,),
}
# Meta-architectures, and the names of other parts, that have nothing of the kind here.
_ELSEWHERE = {
    "BlendMask": "AdelaiDet's BlendMask",
    "CondInst": "AdelaiDet's CondInst",
    "SOLOv2": "AdelaiDet's SOLOv2",
    "FCPose": "AdelaiDet's FCPose",
    "CenterROIHeads": "CenterMask2",
}


def translate(loaded: CfgNode, known: CfgNode) -> bool:
    """Change what a config file of another project says to what does the same here.

    Args:
        loaded: what the file and its bases hold; changed in place.
        known: a config with all keys that there are here.

    Returns:
        whether something was changed.

    Raises:
        ValueError: the file asks for something that has no counterpart; the message names the keys.
    """
    model = loaded.get("MODEL", CfgNode())
    proposals = model.get("PROPOSAL_GENERATOR", CfgNode())
    for name in (model.get("META_ARCHITECTURE"), model.get("ROI_HEADS", CfgNode()).get("NAME")):
        if name in _ELSEWHERE:
            raise ValueError(
                f"it is of {_ELSEWHERE[name]}, which this package does not have ({name}; keys "
                f"without a counterpart: {', '.join(_unknown_keys(loaded, known)) or 'none'}). "
                "Choose a config of Mask R-CNN or FCOS among this package's"
            )
    if model.get("META_ARCHITECTURE") != "OneStageDetector" or proposals.get("NAME") != "FCOS":
        return False
    model.META_ARCHITECTURE = "FCOS"
    del proposals["NAME"]
    obstacles = _translate_fcos(model.setdefault("FCOS", CfgNode()), loaded)
    obstacles += _unknown_keys(loaded, known)
    if obstacles:
        raise ValueError(
            f"these keys of its FCOS have no counterpart here: {', '.join(obstacles)}. Leave them "
            "out to train the FCOS that this package has"
        )
    logger.info("The config is of AdelaiDet's OneStageDetector: META_ARCHITECTURE FCOS takes it.")
    return True


def _translate_fcos(node: CfgNode, loaded: CfgNode) -> list[str]:
    """Bring AdelaiDet's MODEL.FCOS to this package's keys, and return what cannot be brought."""
    obstacles = []
    for key, values in _FCOS_KEYS.items():
        if key in node:
            value = node.pop(key)
            value = list(value) if isinstance(value, tuple) else value
            if values and value not in values:
                obstacles.append(f"MODEL.FCOS.{key} {value!r}")
    if "POST_NMS_TOPK_TEST" in node:
        loaded.setdefault("TEST", CfgNode()).DETECTIONS_PER_IMAGE = node.pop("POST_NMS_TOPK_TEST")
    convolutions = {node.pop(k) for k in ("NUM_CLS_CONVS", "NUM_BOX_CONVS") if k in node}
    if len(convolutions) == 1:
        node.NUM_CONVS = convolutions.pop()
    elif convolutions:
        obstacles.append("MODEL.FCOS.NUM_CLS_CONVS other than NUM_BOX_CONVS")
    return obstacles


def _unknown_keys(node: Any, known: Any, prefix: str = "") -> list[str]:
    """Return the keys of ``node`` that ``known`` does not have, the outermost of each branch."""
    found: list[str] = []
    for key, value in node.items():
        if key not in known:
            found.append(prefix + key)
        elif isinstance(value, CfgNode) and isinstance(known[key], CfgNode):
            found += _unknown_keys(value, known[key], f"{prefix}{key}.")
    return found
