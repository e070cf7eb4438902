# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""The assignment of objects to anchors."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from detectron2.structures import Boxes, Instances, pairwise_iou
from torch import Tensor

BACKGROUND = -1
"""An anchor that may serve as a negative."""
IGNORED = -2
"""An anchor between the two thresholds."""

# An object needs an anchor with a larger IoU to be matched.
_MIN_IOU = 1e-6

_MAX_OVERLAPS = 2**24  # IoUs of objects and anchors, which are 64 MiB in float32


def match_anchors(iou: Tensor, negative: float, positive: float) -> Tensor:
    """Match anchors with objects as :paper:`SSD`, section 2.2, does.

    First every object gets one anchor: the pair with the largest IoU is settled, then the largest
    one among the other objects and anchors, and so on (among equals, the first object, then the
    first anchor). After that each other anchor gets the object that it overlaps most, if the IoU is
    at least ``positive``.

    All pairs whose object and anchor overlap each other most are settled together, because no later
    pair can change them. So the number of operators does not grow with the number of images, and
    little with the number of objects.

    Args:
        iou: (N, objects, anchors), -1 for an object that an image does not have. It is overwritten.
        negative: an anchor without object is background if its largest IoU is below this.

    Returns:
        (N, anchors): the index of the object, :data:`BACKGROUND` or :data:`IGNORED`.
    """
    num_images, num_objects, num_anchors = iou.shape
    if num_objects == 0:
        return iou.new_full((num_images, num_anchors), BACKGROUND, dtype=torch.int64)
    best_iou, best_object = iou.max(dim=1)
    matched = torch.where(best_iou < negative, BACKGROUND, IGNORED)
    matched = torch.where(best_iou >= positive, best_object, matched)
    objects = torch.arange(num_objects, device=iou.device)
    for _ in range(min(num_objects, num_anchors)):
        anchor = iou.argmax(dim=2)  # this and the next three are (N, objects)
        overlap = iou.gather(2, anchor[..., None])[..., 0]
        rival = iou.argmax(dim=1).gather(1, anchor)
        settled = (rival == objects) & (overlap > _MIN_IOU)
        image, row = settled.nonzero(as_tuple=True)
        if len(image) == 0:
            break
        column = anchor[image, row]
        matched[image, column] = row
        iou[image, row] = -1
        iou[image, :, column] = -1
    return matched


class Targets(NamedTuple):
    """Training targets of the anchors of N images: (N, anchors) each, ``boxes`` (N, anchors, 4).

    Attributes:
        positive: True if the anchor has an object, which ``boxes`` and ``classes`` describe.
        negative: True if the anchor may serve as background. Other anchors are ignored.
    """

    positive: Tensor
    negative: Tensor
    boxes: Tensor
    classes: Tensor


def assign_targets(
    anchors: Tensor, instances: Sequence[Instances], thresholds: Sequence[float]
) -> Targets:
    """Assign objects to anchors by :func:`match_anchors`.

    Args:
        anchors: (anchors, 4) for all images, or (N, anchors, 4), XYXY in pixels.
        instances: ``gt_boxes`` and ``gt_classes`` of each image.
        thresholds: an anchor is background below the first IoU, and positive from the second on.
    """
    anchors = anchors.expand(len(instances), -1, -1)
    num_images, num_anchors, _ = anchors.shape
    most = max(1, *map(len, instances))
    boxes = instances[0].gt_boxes.tensor.new_zeros(num_images, most, 4)
    classes = instances[0].gt_classes.new_zeros(num_images, most)
    for n, truth in enumerate(instances):
        boxes[n, : len(truth)] = truth.gt_boxes.tensor
        classes[n, : len(truth)] = truth.gt_classes
    size = max(1, _MAX_OVERLAPS // (most * num_anchors))  # images that are matched together
    matched = torch.cat(
        [
            match_anchors(_overlaps(anchors[i : i + size], instances[i : i + size]), *thresholds)
            for i in range(0, num_images, size)
        ]
    )
    index = matched.clamp(min=0)
    return Targets(
        matched >= 0,
        matched == BACKGROUND,
        boxes.gather(1, index[..., None].expand(-1, -1, 4)),
        classes.gather(1, index),
    )


def _overlaps(anchors: Tensor, instances: Sequence[Instances]) -> Tensor:
    """Return the IoUs for :func:`match_anchors`."""
    most = max(map(len, instances))
    iou = anchors.new_full((len(instances), most, anchors.shape[1]), -1)
    for n, (own, truth) in enumerate(zip(anchors, instances, strict=True)):
        iou[n, : len(truth)] = pairwise_iou(truth.gt_boxes, Boxes(own))
    return iou
