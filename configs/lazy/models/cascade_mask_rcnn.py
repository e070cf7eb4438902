# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
# Cascade Mask R-CNN: three box heads, each with a higher IoU for its positives.
from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.roi_heads import (
    CascadeROIHeads,
    FastRCNNConvFCHead,
    FastRCNNOutputLayers,
)

from .mask_rcnn import model

for _single in ("box_head", "box_predictor", "proposal_matcher"):
    model.roi_heads.pop(_single)
model.roi_heads.update(
    _target_=CascadeROIHeads,
    box_heads=[
        L(FastRCNNConvFCHead)(
            input_shape=L(ShapeSpec)(channels="${.....backbone.out_channels}", height=7, width=7),
            conv_dims=[],
            fc_dims=[1024, 1024],
        )
        for _ in range(3)
    ],
    box_predictors=[
        L(FastRCNNOutputLayers)(
            input_shape=L(ShapeSpec)(channels="${....box_heads.0.fc_dims.0}"),
            test_score_thresh=0.05,
            box2box_transform=L(Box2BoxTransform)(weights=(_xy, _xy, _wh, _wh)),
            cls_agnostic_bbox_reg=True,
            num_classes="${...num_classes}",
        )
        for _xy, _wh in ((10, 5), (20, 10), (30, 15))
    ],
    proposal_matchers=[
        L(Matcher)(thresholds=[_iou], labels=[0, 1], allow_low_quality_matches=False)
        for _iou in (0.5, 0.6, 0.7)
    ],
)
model.proposal_generator.post_nms_topk = (2000, 1000)
