# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""The heads of a Detectron2 detector that do a fixed amount of work, and how to run them alone.

A whole detector cannot run on tensors without data, because its boxes come from scores. But the
heads before the choice of boxes are plain networks on feature maps of the backbone. The heads after
it run on a number of regions that the config limits.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.modeling.roi_heads import Res5ROIHeads, ROIHeads, StandardROIHeads
from torch import Tensor, nn

Features = dict[str, Tensor]

# Detectron2's DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TEST, for detectors without a proposal generator.
_PRECOMPUTED_PROPOSALS = 1000


@dataclass(frozen=True)
class Head:
    """Describes a head of a detector whose costs can be counted.

    Attributes:
        modules: the modules that do its work; none contains another.
        run: runs it on the feature maps of the backbone.
        regions: the number of regions it runs on, in words; ``""`` if it runs on whole feature
            maps.
    """

    name: str
    modules: Sequence[nn.Module]
    run: Callable[[Features], Any]
    regions: str = ""


def countable_heads(detector: nn.Module) -> list[Head]:
    """Return the heads that can be run alone, in the order in which they run."""
    heads = []
    rpn: Any = getattr(detector, "proposal_generator", None)
    if hasattr(rpn, "rpn_head"):
        heads.append(Head("rpn", [rpn.rpn_head], lambda f: rpn.rpn_head(_pick(f, rpn.in_features))))
    if isinstance(detector, DenseDetector):
        names = detector.head_in_features
        heads.append(Head("head", [detector.head], lambda f: detector.head(_pick(f, names))))
    roi_heads = getattr(detector, "roi_heads", None)
    if roi_heads is not None:
        proposals = getattr(rpn, "post_nms_topk", {False: _PRECOMPUTED_PROPOSALS})[False]
        heads += _roi_heads(roi_heads, proposals)
    semantic: Any = getattr(detector, "sem_seg_head", None)
    if hasattr(semantic, "layers"):
        heads.append(Head("semantic head", list(semantic.children()), semantic.layers))
    return heads


def _pick(features: Features, names: Sequence[str]) -> list[Tensor]:
    return [features[name] for name in names]


def _roi_heads(roi_heads: ROIHeads, proposals: int) -> list[Head]:
    if isinstance(roi_heads, StandardROIHeads):
        return _standard_roi_heads(roi_heads, proposals)
    if isinstance(roi_heads, Res5ROIHeads):
        return _res5_roi_heads(roi_heads, proposals)
    return []


def _standard_roi_heads(roi_heads: StandardROIHeads, proposals: int) -> list[Head]:
    # Cascade R-CNN has lists of these, and each head reads all proposals.
    box_heads, predictors = _as_list(roi_heads.box_head), _as_list(roi_heads.box_predictor)

    def run_boxes(features: Features) -> None:
        for head, predictor in zip(box_heads, predictors, strict=True):
            pooled = _pooled(features, roi_heads.box_in_features, roi_heads.box_pooler, proposals)
            predictor(head(pooled))

    def run_layers(kind: str, count: int) -> Callable[[Features], Any]:
        head, pooler = getattr(roi_heads, f"{kind}_head"), getattr(roi_heads, f"{kind}_pooler")
        names = getattr(roi_heads, f"{kind}_in_features")
        return lambda features: head.layers(_pooled(features, names, pooler, count))

    heads = [
        Head("box head", [*box_heads, *predictors], run_boxes, f"{proposals} proposals per image")
    ]
    detections: Any = predictors[-1].test_topk_per_image
    for kind in ("mask", "keypoint"):
        if getattr(roi_heads, f"{kind}_on") and getattr(roi_heads, f"{kind}_pooler") is not None:
            modules = list(getattr(roi_heads, f"{kind}_head").children())
            run = run_layers(kind, detections)
            heads.append(Head(f"{kind} head", modules, run, f"{detections} detections per image"))
    return heads


def _res5_roi_heads(roi_heads: Res5ROIHeads, proposals: int) -> list[Head]:
    def transform(features: Features, count: int) -> Tensor:
        return roi_heads.res5(_pooled(features, roi_heads.in_features, roi_heads.pooler, count))

    def run_boxes(features: Features) -> None:
        roi_heads.box_predictor(transform(features, proposals).mean((2, 3)))

    modules, regions = [roi_heads.res5, roi_heads.box_predictor], f"{proposals} proposals per image"
    if not roi_heads.mask_on:
        return [Head("box head", modules, run_boxes, regions)]

    # The box head and the mask head share res5, so they are one part.
    detections = roi_heads.box_predictor.test_topk_per_image

    def run_both(features: Features) -> None:
        run_boxes(features)
        roi_heads.mask_head.layers(transform(features, detections))

    modules += list(roi_heads.mask_head.children())
    regions += f" and {detections} detections"
    return [Head("box and mask head", modules, run_both, regions)]


def _as_list(module: Any) -> list[nn.Module]:
    return list(module) if isinstance(module, nn.ModuleList | list) else [module]


def _pooled(features: Features, names: Sequence[str], pooler: Any, count: int) -> Tensor:
    """Return a tensor with the shape of the output of a pooler for ``count`` regions."""
    features_of_one = features[names[0]]
    return features_of_one.new_empty(count, features_of_one.shape[1], *pooler.output_size)
