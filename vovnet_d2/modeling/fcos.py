# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Detectron2's FCOS under a name that a YAML file can give: ``META_ARCHITECTURE: "FCOS"``.

ATSS can assign the objects to locations, and the losses and head can be those of GFL.
"""

from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, build_backbone
from detectron2.modeling.meta_arch import fcos
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.structures.boxes import matched_pairwise_iou
from detectron2.utils.events import get_event_storage
from fvcore.nn import giou_loss
from torch import Tensor

from ..errors import UserValueError
from .atss import match_adaptively
from .gfl import DistributionTransform, GFLHead, distribution_focal_loss, quality_focal_loss

_ASSIGNMENTS = ("center", "atss")
_LOSSES = ("fcos", "gfl")

# Weights of the box losses of GFL (arXiv 2006.04388).
_GIOU_WEIGHT = 2.0
_DISTRIBUTION_WEIGHT = 0.25


class FCOS(fcos.FCOS):
    """Detectron2's :class:`FCOS` (:paper:`FCOS`), which no registry has, built from ``MODEL.FCOS``.

    The scores of FCOS are the square root of class score times centerness. With a head of GFL
    (arXiv 2006.04388) the score is the class score, which learns the IoU of the box.
    """

    @configurable
    def __init__(self, *, assignment: str = "center", reg_max: int = 0, **arguments: Any):
        """
        Args:
            assignment: the locations that learn an object: ``"center"`` takes the locations near
                its center, as FCOS does, and ``"atss"`` the ones that
                :func:`.atss.match_adaptively` selects.
            reg_max: the ``reg_max`` of a :class:`.gfl.GFLHead`, or 0 for a head of FCOS.
            arguments: the arguments of Detectron2's class. ``focal_loss_gamma`` is the beta of
                GFL, whose classification loss has no alpha.

        Raises:
            ValueError: the assignment does not exist.
        """
        if reg_max:
            arguments["box2box_transform"] = DistributionTransform(reg_max)
        super().__init__(**arguments)
        _check_choice("ASSIGNMENT", assignment, _ASSIGNMENTS)
        self.assignment = assignment
        self.learns_distributions = reg_max > 0

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Read the arguments from a config. Raise ValueError if ``MODEL.FCOS.IN_FEATURES`` names a
        feature map that the backbone does not return, or if ``LOSSES`` or ``REG_MAX`` cannot be
        used."""
        node = cfg.MODEL.FCOS
        _check_choice("LOSSES", node.LOSSES, _LOSSES)
        if node.REG_MAX < 1:
            raise UserValueError(f"MODEL.FCOS.REG_MAX is {node.REG_MAX}: give 1 or more strides.")
        backbone = build_backbone(cfg)
        shapes = backbone.output_shape()
        if missing := [name for name in node.IN_FEATURES if name not in shapes]:
            raise UserValueError(
                f"MODEL.FCOS.IN_FEATURES asks for {', '.join(missing)}, but the backbone returns "
                f"{', '.join(shapes)}: choose from these, or change MODEL.FCOS.TOP_LEVELS."
            )
        in_shapes = [shapes[name] for name in node.IN_FEATURES]
        head: dict[str, Any] = {
            "input_shape": in_shapes,
            "num_classes": node.NUM_CLASSES,
            "conv_dims": [in_shapes[0].channels] * node.NUM_CONVS,
            "norm": node.NORM,
            "prior_prob": node.PRIOR_PROB,
        }
        reg_max = node.REG_MAX if node.LOSSES == "gfl" else 0
        return {
            "backbone": backbone,
            "head": GFLHead(**head, reg_max=reg_max) if reg_max else fcos.FCOSHead(**head),
            "head_in_features": node.IN_FEATURES,
            "num_classes": node.NUM_CLASSES,
            "assignment": node.ASSIGNMENT,
            "reg_max": reg_max,
            "center_sampling_radius": node.POS_RADIUS,
            "focal_loss_alpha": node.LOSS_ALPHA,
            "focal_loss_gamma": node.LOSS_GAMMA,
            "test_score_thresh": node.INFERENCE_TH_TEST,
            "test_topk_candidates": node.PRE_NMS_TOPK_TEST,
            "test_nms_thresh": node.NMS_TH,
            "max_detections_per_image": cfg.TEST.DETECTIONS_PER_IMAGE,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
        }

    def forward_training(
        self,
        images: ImageList,
        features: list[Tensor],
        predictions: list[list[Tensor]],
        gt_instances: list[Instances],
    ) -> dict[str, Tensor]:
        if not self.learns_distributions:
            return super().forward_training(images, features, predictions, gt_instances)
        logits, distributions = self._transpose(predictions)
        anchors = self.anchor_generator(features)
        labels, boxes = self.label_anchors(anchors, gt_instances)
        return self.gfl_losses(
            Boxes.cat(anchors).tensor,
            torch.cat(logits, dim=1),
            torch.cat(distributions, dim=1),
            torch.stack(labels),
            torch.stack(boxes),
        )

    def gfl_losses(
        self,
        anchors: Tensor,
        logits: Tensor,
        distributions: Tensor,
        labels: Tensor,
        boxes: Tensor,
    ) -> dict[str, Tensor]:
        """Compute the losses of arXiv 2006.04388 for N images and R locations.

        The box losses of a location weigh as much as its largest class score, and are divided by
        the sum of these weights in this process, but at least by 1. The classification loss is
        divided by the number of positive locations, averaged over iterations as in FCOS.

        Args:
            anchors: (R, 4), squares with the side of one stride, XYXY in pixels.
            logits: (N, R, classes).
            distributions: (N, R, 4 * bins), logits.
            labels: (N, R), the class, or the number of classes where there is no object.
            boxes: (N, R, 4), the boxes of the objects.
        """
        positive = labels != self.num_classes
        anchors, boxes = anchors.expand_as(boxes)[positive], boxes[positive]
        distributions = distributions[positive]
        predicted = self.box2box_transform.apply_deltas(distributions, anchors)
        iou = matched_pairwise_iou(Boxes(predicted.detach()), Boxes(boxes))
        quality = torch.zeros_like(logits)
        one_hot = F.one_hot(labels[positive], self.num_classes)
        quality[positive] = (iou[:, None] * one_hot).to(quality)
        class_loss = quality_focal_loss(logits, quality, self.focal_loss_gamma).sum()

        weight = logits.detach()[positive].sigmoid().amax(dim=1)
        box_loss = weight * giou_loss(predicted, boxes)
        distances = self.box2box_transform.get_deltas(anchors, boxes)
        distribution_loss = distribution_focal_loss(
            self.box2box_transform.split(distributions).flatten(0, 1), distances.flatten()
        )
        distribution_loss = weight * distribution_loss.unflatten(0, (-1, 4)).mean(dim=1)

        num_positive = int(positive.sum())
        get_event_storage().put_scalar("num_pos_anchors", num_positive / len(labels))
        normalizer = self._ema_update("loss_normalizer", max(num_positive, 1), 300)
        total_weight = weight.sum().clamp(min=1)
        return {
            "loss_gfl_cls": class_loss / normalizer,
            "loss_gfl_loc": _GIOU_WEIGHT * box_loss.sum() / total_weight,
            "loss_gfl_dfl": _DISTRIBUTION_WEIGHT * distribution_loss.sum() / total_weight,
        }

    def forward_inference(
        self, images: ImageList, features: list[Tensor], predictions: list[list[Tensor]]
    ) -> list[Instances]:
        if not self.learns_distributions:
            return super().forward_inference(images, features, predictions)
        logits, distributions = self._transpose(predictions)
        anchors = self.anchor_generator(features)
        return [
            self.inference_single_image(
                anchors,
                [level[index].sigmoid() for level in logits],
                [level[index] for level in distributions],
                image_size,
            )
            for index, image_size in enumerate(images.image_sizes)
        ]

    def _transpose(self, predictions: list[list[Tensor]]) -> list[list[Tensor]]:
        dimensions = [self.num_classes, 4 * self.box2box_transform.bins]
        return self._transpose_dense_predictions(predictions, dimensions)

    def _transpose_dense_predictions(
        self, predictions: list[list[Tensor]], dims_per_anchor: list[int]
    ) -> list[list[Tensor]]:
        # In mixed precision Detectron2 would compute boxes and losses in half precision.
        predictions = [[level.float() for level in levels] for levels in predictions]
        return super()._transpose_dense_predictions(predictions, dims_per_anchor)

    def _match_anchors(self, gt_boxes: Boxes, anchors: list[Boxes]) -> Tensor:
        if self.assignment == "center":
            return super()._match_anchors(gt_boxes, anchors)
        return match_adaptively(gt_boxes.tensor, [level.tensor for level in anchors])


def _check_choice(key: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UserValueError(
            f"MODEL.FCOS.{key} {value!r} does not exist: choose from {', '.join(choices)}."
        )


# Another project or a later Detectron2 may have registered the name.
if FCOS.__name__ not in META_ARCH_REGISTRY:
    META_ARCH_REGISTRY.register(FCOS)
