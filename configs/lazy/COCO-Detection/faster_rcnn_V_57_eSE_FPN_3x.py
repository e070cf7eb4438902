# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
# Weights: timm://ese_vovnet57b.ra4_e3600_r256_in1k; for others see ../common/timm.py.
from ..common.coco import dataloader
from ..common.optim import SGD as optimizer
from ..common.schedule import lr_multiplier_3x as lr_multiplier
from ..common.timm import V_57_eSE as _timm
from ..common.train import train
from ..models.faster_rcnn import model

model.backbone.bottom_up.spec = _timm.spec
model.update(_timm.input)
train.init_checkpoint = _timm.init_checkpoint
