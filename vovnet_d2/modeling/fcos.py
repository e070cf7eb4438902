# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Detectron2's FCOS under a name that a YAML file can give: ``META_ARCHITECTURE: "FCOS"``."""

from __future__ import annotations

from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, build_backbone
from detectron2.modeling.meta_arch import fcos
from torch import Tensor

__all__ = ["FCOS"]


class FCOS(fcos.FCOS):
    """Detectron2's :class:`FCOS` (:paper:`FCOS`), which no registry has, built from ``MODEL.FCOS``.

    Its scores are the square root of class score times centerness.
    """

    @configurable
    def __init__(self, **arguments: Any):
        """
        Args:
            arguments: of Detectron2's class.
        """
        super().__init__(**arguments)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """
        Raises:
            ValueError: ``MODEL.FCOS.IN_FEATURES`` names a map that the backbone does not return.
        """
        node = cfg.MODEL.FCOS
        backbone = build_backbone(cfg)
        shapes = backbone.output_shape()
        if missing := [name for name in node.IN_FEATURES if name not in shapes]:
            raise ValueError(
                f"MODEL.FCOS.IN_FEATURES asks for {', '.join(missing)}, but the backbone returns "
                f"{', '.join(shapes)}: choose from these, or change MODEL.FCOS.TOP_LEVELS."
            )
        in_shapes = [shapes[name] for name in node.IN_FEATURES]
        head = fcos.FCOSHead(
            input_shape=in_shapes,
            num_classes=node.NUM_CLASSES,
            conv_dims=[in_shapes[0].channels] * node.NUM_CONVS,
            norm=node.NORM,
            prior_prob=node.PRIOR_PROB,
        )
        return {
            "backbone": backbone,
            "head": head,
            "head_in_features": node.IN_FEATURES,
            "num_classes": node.NUM_CLASSES,
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

    def _transpose_dense_predictions(
        self, predictions: list[list[Tensor]], dims_per_anchor: list[int]
    ) -> list[list[Tensor]]:
        # In mixed precision Detectron2 would compute boxes and losses in the predictions' type.
        predictions = [[level.float() for level in levels] for levels in predictions]
        return super()._transpose_dense_predictions(predictions, dims_per_anchor)


# Another project may have taken the name, or Detectron2 itself one day.
if FCOS.__name__ not in META_ARCH_REGISTRY:
    META_ARCH_REGISTRY.register(FCOS)
