# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
# Weights: timm://ese_vovnet39b.ra_in1k; for others see ../common/timm.py.
from ..common.coco import dataloader
from ..common.optim import SGD as optimizer
from ..common.schedule import lr_multiplier_3x as lr_multiplier
from ..common.timm import V_39_eSE as _timm
from ..common.train import train
from ..models.retinanet import model

model.backbone.bottom_up.spec = _timm.spec
model.update(_timm.input)
train.init_checkpoint = _timm.init_checkpoint

optimizer.lr = 0.01
# RetinaNet with VoVNet is known to diverge within its first 1000 iterations.
lr_multiplier.warmup_length *= 4
train.clip_gradients.enabled = True
