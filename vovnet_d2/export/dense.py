# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""The dense part of a detector: the backbone, its FPN and the head that reads every location."""

from typing import Any

from detectron2.modeling import Backbone
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.modeling.proposal_generator import RPN
from torch import Tensor, nn


class DensePart(Backbone):
    """The backbone, its FPN and the dense head of a detector as one network.

    The dense head is the head of RetinaNet, FCOS, SSD, RefineDet or a region proposal network. It
    reads feature maps and returns feature maps, so that one graph can hold everything. Of a
    detector without such a head, this is the backbone and the FPN.
    """

    def __init__(self, model: Any):
        """Take the modules of one of Detectron2's detectors, which stay shared with it."""
        super().__init__()
        self.backbone = model.backbone
        self.head, self.head_features = find_dense_head(model)

    @property
    def size_divisibility(self) -> int:
        return self.backbone.size_divisibility

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Compute the feature maps of images (N, C, H, W), normalised and padded for the backbone,
        by name, then the predictions of the head, named by :func:`prediction_name`."""
        outputs = dict(self.backbone(images))
        if self.head is not None:
            predictions = self.head([outputs[name] for name in self.head_features])
            for kind, levels in enumerate(predictions):
                for feature, level in zip(self.head_features, levels, strict=True):
                    outputs[prediction_name(kind, feature)] = level
        return outputs


def find_dense_head(model: Any) -> tuple[nn.Module | None, tuple[str, ...]]:
    """Find the dense head of a detector, and the names of the feature maps that it reads."""
    if isinstance(model, DenseDetector):
        return model.head, tuple(model.head_in_features)
    generator = getattr(model, "proposal_generator", None)
    if isinstance(generator, RPN):
        return generator.rpn_head, tuple(generator.in_features)
    return None, ()


def prediction_name(kind: int, feature: str) -> str:
    """Name a prediction by its index in the output of the head and by its feature map."""
    return f"head{kind}_{feature}"
