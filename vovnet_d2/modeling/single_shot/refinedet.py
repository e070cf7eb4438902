# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""RefineDet: the ARM stage refines and filters anchors, and the ODM stage makes objects of them."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, build_backbone
from detectron2.structures import ImageList, Instances
from torch import Tensor

from ...errors import UserValueError
from .extras import BackboneWithExtras
from .heads import RefineDetHead
from .layers import ResidualBlock, fill_xavier
from .losses import single_shot_losses
from .matching import assign_targets
from .ssd import SingleShotDetector, arguments_from_config, taps


@META_ARCH_REGISTRY.register()
class RefineDet(SingleShotDetector):
    """RefineDet (:paper:`RefineDet` arXiv 1711.06897), as the VoVNet paper runs it."""

    @configurable
    def __init__(
        self,
        *,
        arm_iou_thresholds: Sequence[float] = (0.5, 0.5),
        objectness_threshold: float = 0.01,
        **kwargs: Any,
    ):
        """
        Args:
            arm_iou_thresholds: ``iou_thresholds`` of the ARM stage.
            objectness_threshold: anchors with less objectness are left out of the ODM stage: they
                are no negatives in training, and have no class scores at test.
            kwargs: arguments of :class:`SingleShotDetector` for the ODM stage. The head returns
                four kinds of predictions; see :class:`RefineDetHead`.
        """
        super().__init__(**kwargs)
        self.arm_iou_thresholds = tuple(arm_iou_thresholds)
        self.objectness_threshold = objectness_threshold

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        node, refine = cfg.MODEL.SINGLE_SHOT, cfg.MODEL.REFINEDET
        bottom_up = build_backbone(cfg)
        fill_xavier(bottom_up)
        shapes = taps(bottom_up, node.IN_FEATURES)
        strides = [shape.stride for shape in shapes]
        if any(following != 2 * stride for stride, following in pairwise(strides)):
            raise UserValueError(
                f"MODEL.SINGLE_SHOT.IN_FEATURES is {', '.join(node.IN_FEATURES)}, with strides "
                f"{strides}: RefineDet needs feature maps whose strides double, the finest first."
            )
        width = refine.EXTRA_CHANNELS
        extra = ResidualBlock(shapes[-1].channels, width, width // 4, norm=node.NORM, stride=2)
        backbone = BackboneWithExtras(
            bottom_up, node.IN_FEATURES, [extra], size_divisibility=2 * strides[-1]
        )
        features = list(backbone.output_shape())
        arguments = arguments_from_config(cfg, backbone, features)
        head = RefineDetHead(
            [shape.channels for shape in taps(backbone, features)],
            arguments["anchor_generator"].num_anchors,
            node.NUM_CLASSES,
            tcb_channels=refine.TCB_CHANNELS,
            block_channels=(refine.HEAD_CHANNELS, refine.HEAD_CHANNELS // 4),
            norm=node.NORM,
        )
        return {
            **arguments,
            "head": head,
            "arm_iou_thresholds": refine.ARM_IOU_THRESHOLDS,
            "objectness_threshold": refine.OBJECTNESS_THRESHOLD,
        }

    def forward_training(
        self,
        images: ImageList,
        features: list[Tensor],
        predictions: Sequence[list[Tensor]],
        gt_instances: list[Instances],
    ) -> dict[str, Tensor]:
        """Return the losses "loss_arm_cls", "loss_arm_box_reg", "loss_odm_cls" and
        "loss_odm_box_reg"; see :func:`single_shot_losses`.
        """
        arm_logits, arm_deltas, odm_logits, odm_deltas = self._flatten_both(predictions)
        options = {
            "box2box_transform": self.box2box_transform,
            "negative_ratio": self.negative_ratio,
        }
        anchors = self._anchors(features)
        targets = assign_targets(anchors, gt_instances, self.arm_iou_thresholds)
        targets = targets._replace(classes=targets.classes * 0)  # one class for any object
        arm_losses = single_shot_losses(arm_logits, arm_deltas, anchors, targets, **options)

        refined = self._decode(arm_deltas.detach(), anchors)
        targets = assign_targets(refined, gt_instances, self.iou_thresholds)
        likely = _objectness(arm_logits.detach()) >= self.objectness_threshold
        targets = targets._replace(negative=targets.negative & likely)
        odm_losses = single_shot_losses(odm_logits, odm_deltas, refined, targets, **options)
        names = ("loss_arm_cls", "loss_arm_box_reg", "loss_odm_cls", "loss_odm_box_reg")
        return dict(zip(names, arm_losses + odm_losses, strict=True))

    def forward_inference(
        self, images: ImageList, features: list[Tensor], predictions: Sequence[list[Tensor]]
    ) -> list[Instances]:
        """See :class:`SingleShotDetector`."""
        arm_logits, arm_deltas, odm_logits, odm_deltas = self._flatten_both(predictions)
        refined = self._decode(arm_deltas, self._anchors(features))
        boxes = self._decode(odm_deltas, refined)
        likely = _objectness(arm_logits) >= self.objectness_threshold
        scores = odm_logits.float().softmax(dim=-1)[..., : self.num_classes] * likely[..., None]
        return [self._select(*each) for each in zip(boxes, scores, images.image_sizes, strict=True)]

    def _flatten_both(self, predictions: Sequence[list[Tensor]]) -> list[Tensor]:
        return self._flatten(predictions, [2, 4, self.num_classes + 1, 4])


def _objectness(arm_logits: Tensor) -> Tensor:
    """Return the probability of an object, (N, anchors), from logits with background last."""
    return arm_logits.float().softmax(dim=-1)[..., 0]
