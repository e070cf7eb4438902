# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Detectron2's FPN and its top levels, on top of VoVNet."""

import math
from collections.abc import Sequence
from itertools import pairwise

import fvcore.nn.weight_init as weight_init
import torch
from detectron2.modeling import FPN, Backbone
from detectron2.modeling.backbone.fpn import LastLevelP6P7
from torch import nn

from ..errors import UserValueError


class LastLevelP6(nn.Module):
    """The top level P6, a 3x3 convolution of stride 2 (:paper:`FCOS` with one top level)."""

    num_levels = 1

    def __init__(self, in_channels: int, out_channels: int, in_feature: str):
        super().__init__()
        self.in_feature = in_feature
        self.p6 = nn.Conv2d(in_channels, out_channels, 3, 2, 1)
        weight_init.c2_xavier_fill(self.p6)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [self.p6(x)]


def strided_top_block(
    bottom_up: Backbone, fpn_channels: int, in_feature: str, num_levels: int = 2
) -> nn.Module | None:
    """Build top levels by strided convolutions, for RetinaNet and FCOS.

    Args:
        bottom_up: the backbone under the FPN.
        fpn_channels: number of channels of the feature maps of the FPN.
        in_feature: the input of the first level: a feature map of ``bottom_up`` ("stage5", as in
            :paper:`RetinaNet`) or the last one of the FPN ("p5").
        num_levels: 2 for P6 and P7, 1 for P6, 0 for none.

    Raises:
        ValueError: the number of levels is another one, or ``in_feature`` does not exist.
    """
    if num_levels not in (0, 1, 2):
        raise UserValueError(
            f"Number of top levels is {num_levels}: choose 0, 1 (P6) or 2 (P6, P7)."
        )
    if num_levels == 0:
        return None
    channels = {name: shape.channels for name, shape in bottom_up.output_shape().items()}
    channels["p5"] = fpn_channels
    if in_feature not in channels:
        raise UserValueError(
            f"Top levels cannot be made from {in_feature!r}: choose from {', '.join(channels)}; "
            "a stage must be among the backbone's OUT_FEATURES."
        )
    block = LastLevelP6P7 if num_levels == 2 else LastLevelP6
    return block(channels[in_feature], fpn_channels, in_feature)


def attach_fpn(
    bottom_up: Backbone,
    *,
    in_features: Sequence[str],
    out_channels: int,
    norm: str = "",
    fuse_type: str = "sum",
    top_block: nn.Module | None,
) -> FPN:
    """Build Detectron2's :class:`FPN` on ``bottom_up``; see there for the arguments.

    Raises:
        ValueError: ``in_features`` is empty or names a feature map that ``bottom_up`` does not
            return, the strides do not double from one to the next, or ``top_block`` needs a
            level that is not there.
    """
    available = bottom_up.output_shape()
    missing = [name for name in in_features if name not in available]
    if missing or not in_features:
        raise UserValueError(
            f"MODEL.FPN.IN_FEATURES asks for {', '.join(missing) or 'nothing'}, but the backbone "
            f"returns {', '.join(available)}: choose from these, or add to "
            "the backbone's OUT_FEATURES."
        )
    strides = [available[name].stride for name in in_features]
    if any(following != 2 * stride for stride, following in pairwise(strides)):
        raise UserValueError(
            f"MODEL.FPN.IN_FEATURES is {', '.join(in_features)}, with strides {strides}: FPN needs "
            "feature maps whose strides double (with STAGE5_DILATION 2, stage5 has the stride of "
            "stage4)."
        )
    levels = [f"p{int(math.log2(stride))}" for stride in strides]
    if top_block is not None and top_block.in_feature not in (*available, *levels):
        raise UserValueError(
            f"The top levels are made from {top_block.in_feature!r}, but the FPN over "
            f"{', '.join(in_features)} has {', '.join(levels)}: add the stage that is missing to "
            "MODEL.FPN.IN_FEATURES."
        )
    return FPN(
        bottom_up=bottom_up,
        in_features=in_features,
        out_channels=out_channels,
        norm=norm,
        top_block=top_block,
        fuse_type=fuse_type,
    )
