# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
# The weights of timm's that a network can start from, with the network and the input they are for:
# see MODEL_ZOO.md. All have eSE in the last block of each stage only.
from detectron2.config import LazyCall as L

from vovnet_d2.modeling.specs import get_spec

V_39_eSE = dict(
    init_checkpoint="timm://ese_vovnet39b.ra_in1k",
    spec=L(get_spec)(spec="V-39-eSE", ese="last"),
    input=dict(
        input_format="RGB",
        pixel_mean=[123.675, 116.28, 103.53],
        pixel_std=[58.395, 57.12, 57.375],
    ),
)
V_57_eSE = dict(
    init_checkpoint="timm://ese_vovnet57b.ra4_e3600_r256_in1k",
    spec=L(get_spec)(spec="V-57-eSE", ese="last"),
    input=dict(
        input_format="RGB",
        pixel_mean=[127.5, 127.5, 127.5],
        pixel_std=[127.5, 127.5, 127.5],
    ),
)
