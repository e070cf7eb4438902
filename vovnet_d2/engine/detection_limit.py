# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""The limit ``TEST.DETECTIONS_PER_IMAGE``: the number of detections of an image that a network
gives and an evaluation counts.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from detectron2.config import CfgNode
from detectron2.data.catalog import Metadata
from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES

from ..data.check.crowding import DEFAULT_LIMIT, measure_crowding

_COCO_IDS = {category["id"] for category in COCO_CATEGORIES if category["isthing"]}


def evaluated_detections(limit: int, metadata: Metadata) -> int:
    """Return how many detections of a category in an image COCO's evaluation is to count.

    The evaluation counts all detections of the network (``TEST.DETECTIONS_PER_IMAGE``, the
    ``limit``). For COCO's own categories it counts 100, which is part of the definition of AP on
    COCO, even if a network gives more (single-shot detectors give 200 to 500).
    """
    ids = metadata.get("thing_dataset_id_to_contiguous_id", {})
    return DEFAULT_LIMIT if ids.keys() == _COCO_IDS else max(limit, DEFAULT_LIMIT)


def explain_crowding(cfg: CfgNode, records: Iterable[Mapping[str, Any]]) -> str:
    """Say how many objects of a data set to evaluate on are beyond ``TEST.DETECTIONS_PER_IMAGE``,
    and what to set, in a sentence without a full stop. It is empty if no image has more objects
    than that."""
    objects = ((a for a in r.get("annotations", ()) if not a.get("iscrowd", 0)) for r in records)
    limit = cfg.TEST.DETECTIONS_PER_IMAGE
    crowding = measure_crowding((sum(1 for _ in each) for each in objects), limit)
    if crowding is None:
        return ""
    proposals = cfg.MODEL.RPN.POST_NMS_TOPK_TEST
    has_rpn = cfg.MODEL.META_ARCHITECTURE in ("GeneralizedRCNN", "PanopticFPN")
    more = f", and MODEL.RPN.POST_NMS_TOPK_TEST above its {proposals}"
    return str(crowding) + (more if has_rpn and proposals <= crowding.most else "")
