# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Which anchor is to find which object."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from detectron2.structures import Boxes, Instances, pairwise_iou
from torch import Tensor

__all__ = ["BACKGROUND", "IGNORED", "Targets", "assign_targets", "match_anchors"]

BACKGROUND = -1
"""An anchor that may serve as a negative."""
IGNORED = -2
"""An anchor between the two thresholds."""

# An object that no anchor overlaps by more than this is matched by none.
_MIN_IOU = 1e-6


def match_anchors(iou: Tensor, negative: float, positive: float) -> Tensor:
    """Match anchors with objects as :paper:`SSD`, section 2.2, does.

    First every object takes an anchor of its own: the pair of largest IoU is settled, then the
    largest among the objects and anchors that are left, and so on (among equals, the first object,
    then the first anchor). After that each anchor that is left takes the object it overlaps most,
    from an IoU of ``positive`` on.

    Args:
        iou: (objects, anchors).
        negative: IoU with its best object below which an anchor without object is background.

    Returns:
        (anchors,): the index of the object, :data:`BACKGROUND` or :data:`IGNORED`.
    """
    num_objects, num_anchors = iou.shape
    if num_objects == 0:
        return iou.new_full((num_anchors,), BACKGROUND, dtype=torch.int64)
    best_iou, best_object = iou.max(dim=0)
    matched = torch.where(best_iou < negative, BACKGROUND, IGNORED)
    matched = torch.where(best_iou >= positive, best_object, matched)
    remaining = iou.clone()
    for _ in range(min(iou.shape)):  # each step depends on the one before
        pair = remaining.argmax()
        found = remaining.flatten().index_select(0, pair[None]) > _MIN_IOU
        row, column = (pair // num_anchors)[None], (pair % num_anchors)[None]
        matched[column] = torch.where(found, row, matched[column])
        remaining.index_fill_(0, row, -1)
        remaining.index_fill_(1, column, -1)
    return matched


class Targets(NamedTuple):
    """What the anchors of N images are to predict; each (N, anchors), ``boxes`` (N, anchors, 4).

    Attributes:
        positive: whether the anchor has an object; ``boxes`` and ``classes`` hold the object's.
        negative: whether it may serve as background. Neither: it takes no part.
    """

    positive: Tensor
    negative: Tensor
    boxes: Tensor
    classes: Tensor


def assign_targets(
    anchors: Tensor, instances: Sequence[Instances], thresholds: Sequence[float]
) -> Targets:
    """
    Args:
        anchors: (anchors, 4) of all images, or (N, anchors, 4) of each, XYXY in pixels.
        instances: with ``gt_boxes`` and ``gt_classes``, of each image.
        thresholds: IoU below which an anchor is background, and from which on it is positive.
    """
    anchors = anchors.expand(len(instances), -1, -1)
    matched, boxes, classes = [], [], []
    for own, truth in zip(anchors, instances, strict=True):
        matched.append(match_anchors(pairwise_iou(truth.gt_boxes, Boxes(own)), *thresholds))
        if len(truth):
            index = matched[-1].clamp(min=0)
            boxes.append(truth.gt_boxes.tensor[index])
            classes.append(truth.gt_classes[index])
        else:
            boxes.append(torch.zeros_like(own))
            classes.append(torch.zeros_like(matched[-1]))
    index = torch.stack(matched)
    return Targets(index >= 0, index == BACKGROUND, torch.stack(boxes), torch.stack(classes))
