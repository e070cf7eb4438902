# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""The layers that single-shot detectors add to a backbone."""

import fvcore.nn.weight_init as weight_init
import torch
import torch.nn.functional as F
from detectron2.layers import CNNBlockBase, Conv2d, get_norm
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..layers import Norm, conv_norm_act


def conv_norm(
    in_channels: int,
    out_channels: int,
    kernel_size: int,
    *,
    norm: Norm,
    stride: int = 1,
    relu: bool = True,
) -> Conv2d:
    """Build a :func:`conv_norm_act` with or without ReLU, and initialise it as RefineDet does."""
    conv = conv_norm_act(in_channels, out_channels, kernel_size, norm=norm, stride=stride)
    if not relu:
        conv.activation = None
    nn.init.normal_(conv.weight, std=0.01)
    return conv


class ResidualBlock(CNNBlockBase):
    """A residual bottleneck that has a projection even if the widths are equal, unlike ResNet's."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        bottleneck_channels: int,
        *,
        norm: Norm,
        stride: int = 1,
    ):
        """
        Args:
            bottleneck_channels: width of the first two convolutions of the branch, 1x1 and 3x3.
            stride: stride of the projection and of the first convolution of the branch.
        """
        super().__init__(in_channels, out_channels, stride)
        self.shortcut = conv_norm(
            in_channels, out_channels, 1, norm=norm, stride=stride, relu=False
        )
        self.conv1 = conv_norm(in_channels, bottleneck_channels, 1, norm=norm, stride=stride)
        self.conv2 = conv_norm(bottleneck_channels, bottleneck_channels, 3, norm=norm)
        self.conv3 = conv_norm(bottleneck_channels, out_channels, 1, norm=norm, relu=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu_(self.shortcut(x) + self.conv3(self.conv2(self.conv1(x))))


class Predictor(Conv2d):
    """A convolution that predicts offsets or scores, either with a bias or with a norm."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int = 3, *, norm: Norm = ""
    ):
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            padding=kernel_size // 2,
            bias=norm == "",
            norm=get_norm(norm, out_channels),
        )
        if self.norm is None:
            weight_init.c2_xavier_fill(self)
        else:
            nn.init.normal_(self.weight, std=0.01)
            self.norm.eps = 1e-3


class L2Norm(nn.Module):
    """L2 normalisation over channels, times a learned scale for each channel (ParseNet, arXiv
    1506.04579, section 3.3).
    """

    def __init__(self, channels: int, scale: float):
        super().__init__()
        self.scale = nn.Parameter(torch.full((channels,), scale))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.normalize(x.float(), dim=1).to(x.dtype) * self.scale.to(x.dtype)[:, None, None]


def fill_xavier(module: nn.Module) -> None:
    """Initialise every convolution in ``module`` by Xavier's method, as Caffe does."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            weight_init.c2_xavier_fill(layer)


def set_norm_momentum(module: nn.Module, momentum: float) -> None:
    """Set the momentum of the running statistics of every batch norm in ``module``."""
    for layer in module.modules():
        if isinstance(layer, _BatchNorm):
            layer.momentum = momentum
