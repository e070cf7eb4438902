# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
# Weights: none, trained from scratch. Not measured on COCO.
# Generalized IoU (arXiv 1902.09630) as the loss of the boxes, ten times as much as the default loss
# would weigh.
from .mask_rcnn_V_39_eSE_FPN_100ep_LSJ import dataloader, lr_multiplier, model, optimizer, train

model.roi_heads.box_predictor.update(box_reg_loss_type="giou", loss_weight={"loss_box_reg": 10.0})
