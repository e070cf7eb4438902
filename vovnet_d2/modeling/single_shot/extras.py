# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""The stages that single-shot detectors add to a backbone for coarser feature maps."""

from collections import OrderedDict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from detectron2.layers import CNNBlockBase, Conv2d, ShapeSpec, get_norm
from detectron2.modeling import Backbone
from torch import nn

from ..layers import Norm
from .layers import conv_norm


class BackboneWithExtras(Backbone):
    """A backbone and further stages, each of which reads the last feature map before it."""

    def __init__(
        self,
        bottom_up: Backbone,
        in_features: Sequence[str],
        extras: Sequence[CNNBlockBase],
        *,
        size_divisibility: int = 0,
    ):
        """
        Args:
            in_features: feature maps of ``bottom_up`` to return; the first extra stage reads the
                last of them.
            extras: stages whose feature maps are named "extra1", "extra2", ...
            size_divisibility: the sides of an image must be multiples of this number; 0 takes the
                one of ``bottom_up``.
        """
        super().__init__()
        self.bottom_up = bottom_up
        self.in_features = tuple(in_features)
        self.extras = nn.ModuleDict({f"extra{i}": e for i, e in enumerate(extras, start=1)})
        self._size_divisibility = max(size_divisibility, bottom_up.size_divisibility)

    @property
    def size_divisibility(self) -> int:
        return self._size_divisibility

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """Compute the feature maps of :meth:`output_shape` from images (N, C, H, W)."""
        maps = self.bottom_up(x)
        maps = {name: maps[name] for name in self.in_features}
        x = maps[self.in_features[-1]]
        for name, extra in self.extras.items():
            x = maps[name] = extra(x)
        return maps

    def output_shape(self) -> dict[str, ShapeSpec]:
        shapes = self.bottom_up.output_shape()
        shapes = {name: shapes[name] for name in self.in_features}
        stride = shapes[self.in_features[-1]].stride
        for name, extra in self.extras.items():
            stride *= extra.stride
            shapes[name] = ShapeSpec(channels=extra.out_channels, stride=stride)
        return shapes


def norm_relu_conv(
    in_channels: int, out_channels: int, kernel_size: int, *, norm: Norm, stride: int = 1
) -> nn.Sequential:
    """Build a norm, a ReLU and a convolution without bias (pre-activation)."""
    conv = Conv2d(
        in_channels,
        out_channels,
        kernel_size,
        stride=stride,
        padding=kernel_size // 2,
        bias=False,
    )
    return nn.Sequential(
        OrderedDict(norm=get_norm(norm, in_channels), relu=nn.ReLU(inplace=False), conv=conv)
    )


class DSODExtra(CNNBlockBase):
    """DSOD's down-sampling block (:paper:`DSOD` arXiv 1708.01241, section 3.1).

    Half of the channels come from convolutions, the other half from max-pooling.
    """

    def __init__(self, in_channels: int, out_channels: int, *, norm: Norm):
        super().__init__(in_channels, out_channels, stride=2)
        half = out_channels // 2
        self.learned = nn.Sequential(
            norm_relu_conv(in_channels, half, 1, norm=norm),
            norm_relu_conv(half, half, 3, norm=norm, stride=2),
        )
        self.pooled = norm_relu_conv(in_channels, half, 1, norm=norm)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # This equals ceil_mode=True, which export back ends lack.
        pooled = F.max_pool2d(F.pad(x, (0, 1, 0, 1), value=-torch.inf), kernel_size=2)
        return torch.cat([self.learned(x), self.pooled(pooled)], dim=1)


class SSDExtra(CNNBlockBase):
    """SSD's extra layers: a 1x1 convolution to fewer channels, then a 3x3."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        norm: Norm,
        reduced_channels: int | None = None,
        stride: int = 2,
    ):
        """
        Args:
            reduced_channels: width between the two, by default half of ``out_channels``.
            stride: 2, or 1 for a 3x3 convolution without padding, which reduces a feature map of
                5x5 to 3x3, and one of 3x3 to 1x1.
        """
        super().__init__(in_channels, out_channels, stride)
        reduced = reduced_channels or out_channels // 2
        self.reduce = conv_norm(in_channels, reduced, 1, norm=norm)
        self.conv = conv_norm(reduced, out_channels, 3, norm=norm, stride=stride)
        if stride == 1:
            self.conv.padding = (0, 0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(self.reduce(x))
