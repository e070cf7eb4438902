# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
# Weights: none, trained from scratch. Not measured on COCO.
from .mask_rcnn_V_57_eSE_FPN_100ep_LSJ import dataloader, lr_multiplier, model, optimizer, train

lr_multiplier.scheduler.milestones = [4 * m for m in lr_multiplier.scheduler.milestones]
