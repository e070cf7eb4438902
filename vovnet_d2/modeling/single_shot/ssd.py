# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""SSD and DSOD, which predict the scores and the box of every anchor at once."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, Backbone, build_anchor_generator, build_backbone
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.structures import Boxes, ImageList, Instances
from torch import Tensor, nn

from ...errors import UserValueError
from .detections import select_detections
from .extras import BackboneWithExtras, DSODExtra, SSDExtra
from .heads import SSDHead
from .layers import Predictor, fill_xavier, set_norm_momentum
from .losses import single_shot_losses
from .matching import assign_targets

_EXTRAS = {"dsod": DSODExtra, "ssd": SSDExtra}


@META_ARCH_REGISTRY.register()
class SingleShotDetector(DenseDetector):
    """SSD (:paper:`SSD` arXiv 1512.02325) and DSOD (:paper:`DSOD` arXiv 1708.01241).

    The head, the extra stages and the anchors make it one or the other.
    """

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        head: nn.Module,
        head_in_features: Sequence[str],
        anchor_generator: nn.Module,
        box2box_transform: Box2BoxTransform,
        num_classes: int,
        iou_thresholds: Sequence[float] = (0.5, 0.5),
        negative_ratio: float = 3.0,
        norm_momentum: float = 0.001,
        test_score_thresh: float = 0.01,
        test_topk_candidates: int = 400,
        test_nms_thresh: float = 0.45,
        max_detections_per_image: int = 200,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
    ):
        """
        Args:
            head: takes the feature maps and returns the logits and the offsets for each.
            head_in_features: names of the feature maps, in the order of the head and the anchors.
            num_classes: number of classes without background.
            iou_thresholds: see :func:`assign_targets`.
            negative_ratio: see :func:`mine_hard_negatives`.
            norm_momentum: momentum of all batch norms, including those of the backbone.
            test_score_thresh, test_topk_candidates, test_nms_thresh, max_detections_per_image: see
                :func:`select_detections`.
            pixel_mean, pixel_std: see :class:`DenseDetector`.
        """
        super().__init__(
            backbone, head, list(head_in_features), pixel_mean=pixel_mean, pixel_std=pixel_std
        )
        self.anchor_generator = anchor_generator
        self.box2box_transform = box2box_transform
        self.num_classes = num_classes
        self.iou_thresholds = tuple(iou_thresholds)
        self.negative_ratio = negative_ratio
        self._select = partial(
            select_detections,
            score_threshold=test_score_thresh,
            topk_candidates=test_topk_candidates,
            nms_threshold=test_nms_thresh,
            max_detections=max_detections_per_image,
        )
        set_norm_momentum(self, norm_momentum)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        node = cfg.MODEL.SINGLE_SHOT
        bottom_up = build_backbone(cfg)
        if node.EXTRA_TYPE not in _EXTRAS:
            raise UserValueError(
                f"MODEL.SINGLE_SHOT.EXTRA_TYPE is {node.EXTRA_TYPE!r}: choose from "
                f"{', '.join(_EXTRAS)}."
            )
        channels = taps(bottom_up, node.IN_FEATURES)[-1].channels
        extras = []
        for width, options in _extra_options(node):
            extras.append(_EXTRAS[node.EXTRA_TYPE](channels, width, norm=node.NORM, **options))
            channels = width
        backbone = BackboneWithExtras(bottom_up, node.IN_FEATURES, extras)
        fill_xavier(backbone)
        features = [*node.IN_FEATURES, *backbone.extras]
        arguments = arguments_from_config(cfg, backbone, features)
        shapes = taps(backbone, features)
        head = SSDHead(
            [shape.channels for shape in shapes],
            arguments["anchor_generator"].num_anchors,
            node.NUM_CLASSES + 1,
            l2_norm_scale=node.L2_NORM_SCALE,
            block_channels=node.BLOCK_CHANNELS,
            kernel_size=node.PREDICTOR_KERNEL,
            norm=node.NORM,
            predictor_norm=node.PREDICTOR_NORM,
        )
        return {**arguments, "head": head}

    def solver_overrides(self) -> list[dict[str, Any]]:
        """Return the parameter groups that the optimizer treats differently.

        Each group has ``params``, an ``lr_factor`` on the learning rate, and a ``weight_decay``.
        Biases of predictors learn twice as fast. Biases and norms of predictors are not decayed.
        """
        predictors = [m for m in self.modules() if isinstance(m, Predictor)]
        biases = [p.bias for p in predictors if p.bias is not None]
        norms = [w for p in predictors if p.norm is not None for w in p.norm.parameters()]
        groups = [(biases, 2.0), (norms, 1.0)]
        return [
            {"params": params, "lr_factor": factor, "weight_decay": 0.0}
            for params, factor in groups
            if params
        ]

    def forward_training(
        self,
        images: ImageList,
        features: list[Tensor],
        predictions: Sequence[list[Tensor]],
        gt_instances: list[Instances],
    ) -> dict[str, Tensor]:
        """Return the losses "loss_cls" and "loss_box_reg"; see :func:`single_shot_losses`."""
        logits, deltas = self._flatten(predictions, [self.num_classes + 1, 4])
        anchors = self._anchors(features)
        targets = assign_targets(anchors, gt_instances, self.iou_thresholds)
        class_loss, box_loss = single_shot_losses(
            logits,
            deltas,
            anchors,
            targets,
            box2box_transform=self.box2box_transform,
            negative_ratio=self.negative_ratio,
        )
        return {"loss_cls": class_loss, "loss_box_reg": box_loss}

    def forward_inference(
        self, images: ImageList, features: list[Tensor], predictions: Sequence[list[Tensor]]
    ) -> list[Instances]:
        """Return the detections of each image, in pixels of the network's input."""
        logits, deltas = self._flatten(predictions, [self.num_classes + 1, 4])
        boxes = self._decode(deltas, self._anchors(features))
        scores = logits.float().softmax(dim=-1)[..., : self.num_classes]
        return [self._select(*each) for each in zip(boxes, scores, images.image_sizes, strict=True)]

    def _anchors(self, features: list[Tensor]) -> Tensor:
        """Return the anchors (anchors, 4) of all feature maps, which every image shares."""
        return Boxes.cat(self.anchor_generator(features)).tensor

    def _flatten(
        self, predictions: Sequence[list[Tensor]], dims_per_anchor: Sequence[int]
    ) -> list[Tensor]:
        """Join the predictions of all feature maps: one tensor (N, anchors, dims) for each kind."""
        kinds = self._transpose_dense_predictions(predictions, dims_per_anchor)
        return [torch.cat(levels, dim=1) for levels in kinds]

    def _decode(self, deltas: Tensor, anchors: Tensor) -> Tensor:
        """Return boxes from offsets (N, anchors, 4) and anchors ([N,] anchors, 4)."""
        flat = anchors.expand_as(deltas).reshape(-1, 4)
        return self.box2box_transform.apply_deltas(deltas.reshape(-1, 4), flat).view_as(deltas)


def taps(backbone: Backbone, names: Sequence[str]) -> list[Any]:
    """Return the shapes of the feature maps that a detector reads. Raise ValueError if
    ``MODEL.SINGLE_SHOT.IN_FEATURES`` is empty, or if one of them does not exist."""
    shapes = backbone.output_shape()
    missing = [name for name in names if name not in shapes]
    if missing or not names:
        raise UserValueError(
            f"MODEL.SINGLE_SHOT.IN_FEATURES asks for {', '.join(missing) or 'nothing'}, but the "
            f"backbone returns {', '.join(shapes)}: choose from these, or let it return more."
        )
    return [shapes[name] for name in names]


def arguments_from_config(
    cfg: CfgNode, backbone: BackboneWithExtras, features: Sequence[str]
) -> dict[str, Any]:
    """Return the arguments that SingleShotDetector and RefineDet share: all except the head."""
    node = cfg.MODEL.SINGLE_SHOT
    return {
        "backbone": backbone,
        "head_in_features": features,
        "anchor_generator": build_anchor_generator(cfg, taps(backbone, features)),
        "box2box_transform": Box2BoxTransform(weights=node.BBOX_REG_WEIGHTS),
        "num_classes": node.NUM_CLASSES,
        "iou_thresholds": node.IOU_THRESHOLDS,
        "negative_ratio": node.NEGATIVE_RATIO,
        "norm_momentum": node.NORM_MOMENTUM,
        "test_score_thresh": node.SCORE_THRESH_TEST,
        "test_topk_candidates": node.TOPK_CANDIDATES_TEST,
        "test_nms_thresh": node.NMS_THRESH_TEST,
        "max_detections_per_image": cfg.TEST.DETECTIONS_PER_IMAGE,
        "pixel_mean": cfg.MODEL.PIXEL_MEAN,
        "pixel_std": cfg.MODEL.PIXEL_STD,
    }


def _extra_options(node: CfgNode) -> list[tuple[int, dict[str, int]]]:
    options: list[tuple[int, dict[str, int]]] = [(width, {}) for width in node.EXTRA_CHANNELS]
    for key, argument in (("STRIDES", "stride"), ("REDUCED_CHANNELS", "reduced_channels")):
        values = node[f"EXTRA_{key}"]
        if not values:
            continue
        if len(values) != len(options) or node.EXTRA_TYPE != "ssd":
            raise UserValueError(
                f"MODEL.SINGLE_SHOT.EXTRA_{key} is {list(values)}: give one for each of "
                f"EXTRA_CHANNELS {list(node.EXTRA_CHANNELS)}, and only with EXTRA_TYPE ssd, or "
                "none."
            )
        for (_, arguments), value in zip(options, values, strict=True):
            arguments[argument] = value
    return options
