# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Generalized focal loss (GFL, arXiv 2006.04388): scores that say how well a box fits, and box
sides that are predicted as distributions."""

from typing import Any

import torch
import torch.nn.functional as F
from detectron2.layers import ShapeSpec
from detectron2.modeling.box_regression import Box2BoxTransformLinear
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from torch import Tensor, nn


class GFLHead(RetinaNetHead):
    """The head of GFL: RetinaNet's with one anchor, and with a distribution for each box side.

    ``forward`` returns two lists over the feature maps: class logits (N, classes, H, W), and logits
    of distributions (N, 4 * (reg_max + 1), H, W), in the order left, top, right, bottom. Distances
    are in strides, so no feature map needs a learnt scale.
    """

    def __init__(
        self, *, input_shape: list[ShapeSpec], conv_dims: list[int], reg_max: int, **arguments: Any
    ):
        """
        Args:
            reg_max: the largest distance from a location to a box side, in strides.
            input_shape, conv_dims, arguments: see :class:`RetinaNetHead`.
        """
        super().__init__(input_shape=input_shape, conv_dims=conv_dims, num_anchors=1, **arguments)
        self.bbox_pred = nn.Conv2d(conv_dims[-1], 4 * (reg_max + 1), 3, padding=1)
        nn.init.normal_(self.bbox_pred.weight, std=0.01)
        nn.init.zeros_(self.bbox_pred.bias)  # type: ignore[arg-type]


class DistributionTransform(Box2BoxTransformLinear):
    """Boxes from distributions over the distances of their sides (equation 5).

    The expected values of the distributions, over 0, 1, ... ``reg_max`` strides, are the distances
    from the center of a location to the sides of the box.
    """

    def __init__(self, reg_max: int):
        super().__init__(normalize_by_size=True)
        self.bins = reg_max + 1

    def split(self, logits: Tensor) -> Tensor:
        """Reshape (boxes, 4 * bins) logits to (boxes, 4, bins)."""
        return logits.unflatten(1, (4, self.bins))

    def apply_deltas(self, deltas: Tensor, boxes: Tensor) -> Tensor:
        """Return the predicted boxes, (boxes, 4), XYXY in pixels.

        Args:
            deltas: (boxes, 4 * bins), the logits of the distributions.
            boxes: (boxes, 4), squares with the side of one stride around the locations.
        """
        probabilities = self.split(deltas).softmax(dim=2)
        steps = torch.arange(self.bins, dtype=deltas.dtype, device=deltas.device)
        # Autocast would compute a matrix product, and then the boxes, in half precision.
        return super().apply_deltas((probabilities * steps).sum(dim=2), boxes)


def quality_focal_loss(logits: Tensor, quality: Tensor, beta: float = 2.0) -> Tensor:
    """Compute the quality focal loss of class scores (equation 2), one value per logit.

    Args:
        logits: logits of any shape.
        quality: the wanted scores, of the same shape: 0 for a class that is not there, and the IoU
            of the predicted box with the object for the class that is.
        beta: exponent of the difference between the predicted and the wanted score. With scores of
            0 and 1 this is the focal loss with this gamma and without alpha.
    """
    loss = F.binary_cross_entropy_with_logits(logits, quality, reduction="none")
    return loss * (logits.sigmoid() - quality).abs() ** beta


def distribution_focal_loss(logits: Tensor, distances: Tensor) -> Tensor:
    """Compute the distribution focal loss of box sides (equation 6), one value per side.

    Args:
        logits: (sides, bins), over the distances 0, 1, ... bins - 1.
        distances: (sides,), the true distances, which are clamped to this range.
    """
    last = logits.shape[1] - 1
    distances = distances.clamp(0, last)
    left = distances.floor().clamp(max=last - 1)
    index, weight = left.long(), distances - left
    return (
        F.cross_entropy(logits, index, reduction="none") * (1 - weight)
        + F.cross_entropy(logits, index + 1, reduction="none") * weight
    )
