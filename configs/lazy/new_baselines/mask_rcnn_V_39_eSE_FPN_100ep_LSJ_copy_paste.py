# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
# Weights: none, trained from scratch. Not measured on COCO.
# Copy-paste (arXiv 2012.07177): objects of another image are pasted into half of the images.
from .mask_rcnn_V_39_eSE_FPN_100ep_LSJ import dataloader, lr_multiplier, model, optimizer, train

dataloader.train.copy_paste = 0.5
