# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Translation of the config files of other VoVNet projects into this package's keys."""

import logging
from typing import Any

from detectron2.config import CfgNode
from detectron2.modeling import (
    BACKBONE_REGISTRY,
    META_ARCH_REGISTRY,
    PROPOSAL_GENERATOR_REGISTRY,
    ROI_BOX_HEAD_REGISTRY,
    ROI_HEADS_REGISTRY,
    ROI_KEYPOINT_HEAD_REGISTRY,
    ROI_MASK_HEAD_REGISTRY,
    RPN_HEAD_REGISTRY,
    SEM_SEG_HEADS_REGISTRY,
)
from fvcore.common.registry import Registry

from ..errors import UserValueError

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
# Names of parts of networks that this package lacks, with the project whose configs have them.
_ELSEWHERE = {
    **dict.fromkeys(("BlendMask", "CondInst", "SOLOv2", "FCPose", "MEInst"), "AdelaiDet"),
    **dict.fromkeys(("OneStageRCNN", "BAText", "TextHead"), "AdelaiDet"),
    **dict.fromkeys(("CenterROIHeads", "SpatialAttentionMaskHead"), "CenterMask2"),
    **dict.fromkeys(("CenterNet", "CenterNetDetector", "CustomCascadeROIHeads"), "CenterNet2"),
    **dict.fromkeys(("CustomRCNN", "DeticCascadeROIHeads"), "Detic"),
    **dict.fromkeys(("TridentRPN", "TridentStandardROIHeads", "TridentRes5ROIHeads"), "TridentNet"),
    **dict.fromkeys(("PointRendMaskHead", "ImplicitPointRendMaskHead"), "Detectron2's PointRend"),
    **dict.fromkeys(("PointRendSemSegHead", "PointRendROIHeads"), "Detectron2's PointRend"),
    **dict.fromkeys(("DeepLabV3Head", "DeepLabV3PlusHead"), "Detectron2's DeepLab"),
    **dict.fromkeys(("DensePoseROIHeads", "DensePoseV1ConvXHead"), "Detectron2's DensePose"),
    **dict.fromkeys(("VoxMeshHead", "MeshRCNNROIHeads", "VoxMeshROIHeads"), "Mesh R-CNN"),
    **dict.fromkeys(("MaskFormer", "MaskFormerHead"), "MaskFormer or Mask2Former"),
    "MaskRCNNConvUpsamplePointSupHead": "Detectron2's PointSup",
    "PanopticDeepLab": "Detectron2's Panoptic-DeepLab",
    "TensorMask": "Detectron2's TensorMask",
    "SparseRCNN": "Sparse R-CNN",
    "SparseInst": "SparseInst",
    "YOLOF": "YOLOF",
    "Detr": "DETR",
    "DD3D": "DD3D",
}
# Keys that name a part, and where such parts are registered.
PARTS: dict[str, Registry] = {
    "META_ARCHITECTURE": META_ARCH_REGISTRY,
    "BACKBONE.NAME": BACKBONE_REGISTRY,
    "PROPOSAL_GENERATOR.NAME": PROPOSAL_GENERATOR_REGISTRY,
    "RPN.HEAD_NAME": RPN_HEAD_REGISTRY,
    "ROI_HEADS.NAME": ROI_HEADS_REGISTRY,
    "ROI_BOX_HEAD.NAME": ROI_BOX_HEAD_REGISTRY,
    "ROI_MASK_HEAD.NAME": ROI_MASK_HEAD_REGISTRY,
    "ROI_KEYPOINT_HEAD.NAME": ROI_KEYPOINT_HEAD_REGISTRY,
    "SEM_SEG_HEAD.NAME": SEM_SEG_HEADS_REGISTRY,
}
_NO_PROPOSALS = "PrecomputedProposals"  # which Detectron2 takes without a registry


def translate(loaded: CfgNode, known: CfgNode) -> bool:
    """Translate the keys of another project's config file, with its bases, into the ``known`` keys
    with the same meaning, in place. Return True if something was changed.

    Raise ValueError, with the keys, if the file asks for something that has no counterpart.
    """
    if not isinstance(model := loaded.get("MODEL", CfgNode()), CfgNode):
        return False  # merging it says what is wrong
    if "CONV_BODY" in model.get("BACKBONE", {}):
        raise UserValueError(
            "it is of maskrcnn-benchmark (MODEL.BACKBONE.CONV_BODY), as CenterMask's first version "
            "is, whose keys are not Detectron2's. Choose a config among this package's"
        )
    parts = _parts(model)
    is_fcos = parts.get("META_ARCHITECTURE") == "OneStageDetector"
    is_fcos &= parts.get("PROPOSAL_GENERATOR.NAME") == "FCOS"
    if not is_fcos:
        _refuse_others(parts, _unknown_keys(loaded, known))
        return False
    model.META_ARCHITECTURE = "FCOS"
    del model.PROPOSAL_GENERATOR["NAME"]
    obstacles = _translate_fcos(model.setdefault("FCOS", CfgNode()), loaded)
    obstacles += _unknown_keys(loaded, known)
    if obstacles:
        raise UserValueError(
            f"these keys of its FCOS have no counterpart here: {', '.join(obstacles)}. Leave them "
            "out to train the FCOS that this package has"
        )
    logger.info("The config is of AdelaiDet's OneStageDetector: META_ARCHITECTURE FCOS takes it.")
    return True


def _parts(model: CfgNode) -> dict[str, str]:
    """Return the names of parts that a file has, by their keys below MODEL."""
    found = {}
    for key in PARTS:
        value: Any = model
        for name in key.split("."):
            value = value.get(name) if isinstance(value, CfgNode) else None
        if isinstance(value, str):
            found[key] = value
    return found


def _refuse_others(parts: dict[str, str], unknown: list[str]) -> None:
    """Raise ValueError if a config names a part that is not registered here and known to be another
    project's, or that comes with keys that are ``unknown`` here. For the parts see :func:`_parts`.
    """
    missing = {
        key: name
        for key, name in parts.items()
        if name and name not in PARTS[key] and name != _NO_PROPOSALS
    }
    project = next((_ELSEWHERE[name] for name in missing.values() if name in _ELSEWHERE), "")
    if not missing or not (project or unknown):
        return
    named = ", ".join(f"MODEL.{key} {name}" for key, name in missing.items())
    keys = f", and the keys {', '.join(unknown)} have no counterpart" if unknown else ""
    raise UserValueError(
        f"it is of {project or 'another project'}, whose parts this package does not have: {named} "
        f"{'are' if len(missing) > 1 else 'is'} not registered{keys}. Choose a config among this "
        "package's (Mask R-CNN, RetinaNet, FCOS, semantic and panoptic FPN), or register the parts "
        "and add their keys in a script that calls vovnet_d2.engine.main"
    )


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
