# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
# Weights: timm://ese_vovnet39b.ra_in1k. This recipe has not been measured on COCO.
from ..common.coco import dataloader
from ..common.optim import AdamW as optimizer
from ..common.schedule import lr_multiplier_1x as lr_multiplier
from ..common.timm import V_39_eSE as _timm
from ..common.train import train
from ..models.mask_rcnn import model

dataloader.train.mapper.use_instance_mask = True
model.backbone.bottom_up.spec = _timm.spec
model.update(_timm.input)
train.init_checkpoint = _timm.init_checkpoint
