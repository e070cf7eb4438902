# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
# Detectron2's SGD for detectors: norms are not decayed.
import torch
from detectron2.config import LazyCall as L
from detectron2.solver.build import get_default_optimizer_params

from vovnet_d2.engine.solver import stage_lr_factor

SGD = L(torch.optim.SGD)(
    params=L(get_default_optimizer_params)(
        weight_decay_norm=0.0
    ),  # its model is set by the trainer
    lr=0.02,
    momentum=0.9,
    weight_decay=1e-4,
    foreach=True,
)
# AdamW, as Base-AdamW.yaml has it: norms and biases are not decayed. Stages can learn at different
# rates (SOLVER.LAYER_DECAY): `optimizer.params.lr_factor_func.decay=0.8`.
AdamW = L(torch.optim.AdamW)(
    params=L(get_default_optimizer_params)(
        base_lr="${..lr}",
        weight_decay_norm=0.0,
        weight_decay_bias=0.0,
        lr_factor_func=L(stage_lr_factor)(decay=1.0),
    ),
    lr=2e-4,
    weight_decay=0.05,
)
