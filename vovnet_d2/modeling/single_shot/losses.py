# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""SSD's loss, with hard-negative mining."""

import torch
import torch.nn.functional as F
from detectron2.modeling.box_regression import Box2BoxTransform
from torch import Tensor

from .matching import Targets


def mine_hard_negatives(
    background_loss: Tensor, positive: Tensor, candidates: Tensor, ratio: float
) -> Tensor:
    """Choose the negatives with the largest loss for background, which are the hardest.

    The tensors and the result are (N, anchors).

    Args:
        background_loss: the loss of each anchor as background.
        positive: boolean, True for an anchor with an object.
        candidates: boolean, True for an anchor that may be chosen.
        ratio: largest number of negatives for each positive of an image; without positives there
            are no negatives.
    """
    limit = (ratio * positive.sum(dim=1, keepdim=True)).floor()
    order = background_loss.masked_fill(~candidates, -torch.inf).argsort(
        dim=1, descending=True, stable=True
    )
    return candidates & (order.argsort(dim=1) < limit)


def single_shot_losses(
    logits: Tensor,
    deltas: Tensor,
    anchors: Tensor,
    targets: Targets,
    *,
    box2box_transform: Box2BoxTransform,
    negative_ratio: float,
) -> tuple[Tensor, Tensor]:
    """Compute SSD's losses (:paper:`SSD`, section 2.2).

    They are the softmax cross-entropy over positives and mined negatives, and smooth L1 over the
    offsets of the positives. Both are divided by the number of positives in the batch.

    Args:
        logits: (N, anchors, classes + 1), background last.
        deltas: (N, anchors, 4), the offsets of boxes from ``anchors``.
        anchors: (anchors, 4) or (N, anchors, 4), XYXY.

    Returns:
        the loss of classes and of boxes.
    """
    logits, deltas = logits.float(), deltas.float()
    background = logits.shape[-1] - 1
    background_loss = -logits.detach().log_softmax(dim=-1)[..., background]
    negative = mine_hard_negatives(
        background_loss, targets.positive, targets.negative, negative_ratio
    )
    classes = targets.classes.masked_fill(~targets.positive, background)
    used = targets.positive | negative
    class_loss = F.cross_entropy(logits[used], classes[used], reduction="sum")
    matched = anchors.expand_as(deltas)[targets.positive]
    wanted = box2box_transform.get_deltas(matched, targets.boxes[targets.positive])
    box_loss = F.smooth_l1_loss(deltas[targets.positive], wanted, reduction="sum")
    normalizer = targets.positive.sum().clamp(min=1)
    return class_loss / normalizer, box_loss / normalizer
