# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Selection of the detections of an image from the scores and boxes of all anchors."""

from typing import Any

import torch
from detectron2.layers import batched_nms
from detectron2.structures import Boxes, Instances
from torch import Tensor


def select_detections(
    boxes: Tensor,
    scores: Tensor,
    image_size: tuple[int, int],
    *,
    score_threshold: float,
    topk_candidates: int,
    nms_threshold: float,
    max_detections: int,
) -> Instances:
    """Select the detections of an image.

    For each class, the ``topk_candidates`` best boxes above the threshold go to NMS. The
    ``max_detections`` best of all classes are returned.

    Args:
        boxes: (anchors, 4), XYXY in pixels.
        scores: (anchors, classes).
        image_size: (height, width) in pixels.

    Returns:
        instances with ``pred_boxes``, ``scores`` and ``pred_classes``, the best first.
    """
    # In a trace the number of anchors is a tensor.
    number: Any = torch.as_tensor(scores.shape[0]).clamp(max=topk_candidates)
    best, anchors = scores.topk(number, dim=0)
    rows, classes = (best > score_threshold).nonzero().unbind(dim=1)
    chosen = boxes[anchors[rows, classes]]
    kept_scores = best[rows, classes]
    keep = batched_nms(chosen, kept_scores, classes, nms_threshold)[:max_detections]
    return Instances(
        image_size,
        pred_boxes=Boxes(chosen[keep]),
        scores=kept_scores[keep],
        pred_classes=classes[keep],
    )
