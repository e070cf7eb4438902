# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Adaptive training sample selection (arXiv 1912.02424): the anchors that learn an object."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import box_iou

ANCHOR_SCALE = 8
"""Side of an anchor in strides of its feature map."""

# Without it, a mean that is rounded up would reject candidates that overlap an object equally.
_ROUNDING = 1e-9


@torch.no_grad()
def match_adaptively(boxes: Tensor, cells: Sequence[Tensor], topk: int = 9) -> Tensor:
    """Select the positive anchors of each object as ATSS does (Algorithm 1).

    The candidates of an object are the ``topk`` anchors of each feature map whose centers are
    closest to the center of the object; among equal distances the first anchors are taken. A
    candidate is positive if its IoU with the object is at least the mean plus the standard
    deviation of the IoUs of all candidates, and if its center lies inside the object.

    Args:
        boxes: (objects, 4), XYXY in pixels.
        cells: for each feature map (locations, 4), XYXY: squares with the side of one stride around
            the locations. The anchors are squares of eight strides with the same centers.

    Returns:
        (objects, all locations): 1 plus the IoU of a positive anchor with the object, and 0
        elsewhere. An anchor belongs to the object of its largest value.
    """
    boxes = boxes.double()
    centers, candidates, start = [], [], 0
    for level in cells:
        centers.append((level[:, :2] + level[:, 2:]).double() / 2)
        offsets = (boxes[:, None, :2] + boxes[:, None, 2:]) / 2 - centers[-1]
        distances = offsets.square().sum(dim=2)
        # A stable sort, because topk leaves the order of equal distances open.
        candidates.append(start + distances.argsort(dim=1, stable=True)[:, :topk])
        start += len(level)
    center, candidate = torch.cat(centers), torch.cat(candidates, dim=1)

    side = torch.cat([level[:, 2:] - level[:, :2] for level in cells]).double() * ANCHOR_SCALE
    iou = box_iou(boxes, torch.cat([center - side / 2, center + side / 2], dim=1))
    candidate_iou = iou.gather(1, candidate)
    # A single candidate has a standard deviation of 0.
    correction = min(1, candidate.shape[1] - 1)
    threshold = candidate_iou.mean(dim=1) + candidate_iou.std(dim=1, correction=correction)
    to_sides = torch.cat([center - boxes[:, None, :2], boxes[:, None, 2:] - center], dim=2)
    inside = to_sides.amin(dim=2) > 0
    positive = inside.gather(1, candidate) & (candidate_iou >= threshold[:, None] - _ROUNDING)
    quality = torch.zeros_like(iou)
    return quality.scatter(1, candidate, torch.where(positive, 1 + candidate_iou, 0.0))
