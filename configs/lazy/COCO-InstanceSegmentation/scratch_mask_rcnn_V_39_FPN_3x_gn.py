# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
# Weights: none, trained from scratch with GN (VoVNet paper, Table 5).
from ..common.coco import dataloader
from ..common.optim import SGD as optimizer
from ..common.schedule import lr_multiplier_3x as lr_multiplier
from ..common.train import train
from ..models.mask_rcnn import model

dataloader.train.mapper.use_instance_mask = True
model.backbone.bottom_up.update(spec="V-39", norm="GN")
model.backbone.norm = "GN"
model.roi_heads.box_head.update(conv_dims=[256, 256, 256, 256], conv_norm="GN", fc_dims=[1024])
model.roi_heads.mask_head.conv_norm = "GN"
