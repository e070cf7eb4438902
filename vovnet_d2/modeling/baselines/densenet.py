# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""DenseNet-67, the backbone of DSOD (DS/64-64-16-1 in :paper:`DSOD` arXiv 1708.01241, Table 1)."""

from collections import OrderedDict

import torch
import torch.nn.functional as F
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone
from torch import nn

from ..layers import Norm, conv_norm_act
from ..single_shot.extras import norm_relu_conv
from ..single_shot.layers import fill_xavier
from ..tracing import is_traced

_STEM_CHANNELS = (64, 64, 128)
_LAYERS_PER_BLOCK = (6, 8, 8, 8)
_BOTTLENECK_CHANNELS = 64
_GROWTH = 16
_SECOND_CHANNELS = 256  # channels of each half of the second feature map


def halve(x: torch.Tensor) -> torch.Tensor:
    """Apply 2x2 max-pooling of stride 2: (N, C, H, W) to (N, C, ceil(H/2), ceil(W/2)).

    Export back ends lack ceil mode, so a graph pads one row and one column with minus infinity.
    """
    if is_traced():
        return F.max_pool2d(F.pad(x, (0, 1, 0, 1), value=-torch.inf), kernel_size=2)
    return F.max_pool2d(x, kernel_size=2, ceil_mode=True)


class DenseLayer(nn.Module):
    """A 1x1 and a 3x3 convolution whose output is concatenated to their input."""

    def __init__(self, in_channels: int, *, norm: Norm):
        super().__init__()
        self.reduce = norm_relu_conv(in_channels, _BOTTLENECK_CHANNELS, 1, norm=norm)
        self.conv = norm_relu_conv(_BOTTLENECK_CHANNELS, _GROWTH, 3, norm=norm)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x, self.conv(self.reduce(x))], dim=1)


class DenseNet67(Backbone):
    """Four dense blocks at strides 4, 8, 16 and 16; it returns the first two feature maps of DSOD.

    DSOD is trained from scratch, so no part of the network can be frozen.
    """

    def __init__(self, *, in_channels: int = 3, norm: Norm = "BN"):
        """Build the network. For ``norm`` see :func:`conv_norm_act`."""
        super().__init__()
        stem: OrderedDict[str, nn.Module] = OrderedDict()
        channels = in_channels
        for number, width in enumerate(_STEM_CHANNELS, start=1):
            stride = 2 if number == 1 else 1
            stem[f"conv{number}"] = conv_norm_act(channels, width, 3, norm=norm, stride=stride)
            channels = width
        self.stem = nn.Sequential(stem)
        for number, num_layers in enumerate(_LAYERS_PER_BLOCK, start=1):
            widths = [channels + i * _GROWTH for i in range(num_layers)]
            block = nn.Sequential(*(DenseLayer(width, norm=norm) for width in widths))
            self.add_module(f"block{number}", block)
            channels = widths[-1] + _GROWTH
            width = _SECOND_CHANNELS if number == len(_LAYERS_PER_BLOCK) else channels
            self.add_module(f"transition{number}", norm_relu_conv(channels, width, 1, norm=norm))
            if number == 2:
                first_channels = channels
            channels = width
        self.shortcut = norm_relu_conv(first_channels, _SECOND_CHANNELS, 1, norm=norm)
        fill_xavier(self)
        self._shapes = {
            "first": ShapeSpec(channels=first_channels, stride=8),
            "second": ShapeSpec(channels=channels + _SECOND_CHANNELS, stride=16),
        }

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return "first", (N, 352, H/8, W/8), and "second", (N, 512, H/16, W/16); sizes are rounded
        up."""
        x = halve(self.stem(x))
        x = halve(self.transition1(self.block1(x)))
        first = self.transition2(self.block2(x))
        pooled = halve(first)
        x = self.transition3(self.block3(pooled))
        x = self.transition4(self.block4(x))
        return {"first": first, "second": torch.cat([x, self.shortcut(pooled)], dim=1)}

    def output_shape(self) -> dict[str, ShapeSpec]:
        return dict(self._shapes)
