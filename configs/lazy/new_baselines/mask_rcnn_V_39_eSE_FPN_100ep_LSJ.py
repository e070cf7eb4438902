# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
# Weights: none, trained from scratch. Not measured on COCO.
# The recipe of Detectron2's new_baselines/mask_rcnn_R_50_FPN_100ep_LSJ.py: large-scale jittering,
# batch norms over the images of all processes, two convolutions in the RPN, four in the box head.
# Detectron2 crops polygons with the package shapely: pip install shapely.
import detectron2.data.transforms as T
from detectron2.config import LazyCall as L
from detectron2.solver import WarmupParamScheduler
from fvcore.common.param_scheduler import MultiStepParamScheduler

from ..common.coco import dataloader
from ..common.optim import SGD as optimizer
from ..common.train import train
from ..models.mask_rcnn import model

model.backbone.bottom_up.norm = model.backbone.norm = "naiveSyncBN"
# Weighted by the number of boxes, as a process may have none.
model.roi_heads.box_head.conv_norm = model.roi_heads.mask_head.conv_norm = "naiveSyncBN_N"
model.proposal_generator.head.conv_dims = [-1, -1]
model.roi_heads.box_head.update(conv_dims=[256, 256, 256, 256], fc_dims=[1024])

dataloader.train.total_batch_size = 64
dataloader.train.mapper.update(
    augmentations=[
        L(T.ResizeScale)(min_scale=0.1, max_scale=2.0, target_height=1024, target_width=1024),
        L(T.FixedSizeCrop)(crop_size=(1024, 1024)),
        L(T.RandomFlip)(horizontal=True),
    ],
    use_instance_mask=True,
    recompute_boxes=True,  # which the crop has cut
)

optimizer.update(lr=0.1, weight_decay=4e-5)
train.amp.enabled = True
lr_multiplier = L(WarmupParamScheduler)(
    scheduler=L(MultiStepParamScheduler)(
        values=[1.0, 0.1, 0.01],
        milestones=[163889, 177546, 184375],  # 100 epochs
    ),
    warmup_length=500 / 184375,
    warmup_method="linear",
    warmup_factor=0.067,
)
