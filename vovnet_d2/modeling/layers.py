# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""The layers that OSA blocks and stems are made of."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable

import fvcore.nn.weight_init as weight_init
import torch
import torch.fx
import torch.nn.functional as F
from detectron2.layers import Conv2d, get_norm
from torch import nn
from torchvision.ops import deform_conv2d

from .convolution import ConvNormAct
from .tracing import call_as_one_node, is_traced

__all__ = [
    "NORMS",
    "DeformableConv2d",
    "DepthwiseSeparableConv2d",
    "EffectiveSE",
    "bottleneck",
    "conv_norm_act",
    "downsample",
]

Norm = str | Callable[[int], nn.Module]

NORMS = ("", "BN", "SyncBN", "FrozenBN", "GN", "nnSyncBN", "naiveSyncBN", "naiveSyncBN_N", "LN")
"""The norms that Detectron2 knows by name; ``""`` is none."""


def _make_norm(norm: Norm, channels: int) -> nn.Module | None:
    """Detectron2's ``get_norm``, with errors that name the choices and GN for any width."""
    if isinstance(norm, str) and norm not in NORMS:
        choices = ", ".join(repr(name) for name in NORMS)
        raise ValueError(f"Unknown norm {norm!r}: choose from {choices}, or pass a callable.")
    if norm == "GN":
        # 32 groups as everywhere in Detectron2; the slim variants' 80 and 112 channels do not
        # divide by 32 and take the largest number of groups that divides both, 16.
        return nn.GroupNorm(math.gcd(32, channels), channels)
    return get_norm(norm, channels)


def conv_norm_act(
    in_channels: int,
    out_channels: int,
    kernel_size: int,
    *,
    norm: Norm,
    stride: int = 1,
    dilation: int = 1,
    conv_class: type[Conv2d] = ConvNormAct,
    **conv_args: int | bool,
) -> Conv2d:
    """Convolution, norm and ReLU; the map keeps its size at stride 1. A bias stands only where no
    norm follows.

    Args:
        norm: a name of :data:`NORMS` or a callable from a channel number to a module.
        conv_class: a subclass of :class:`detectron2.layers.Conv2d`.
        conv_args: further arguments of ``conv_class``.
    """
    conv = conv_class(
        in_channels,
        out_channels,
        kernel_size=kernel_size,
        stride=stride,
        padding=dilation * (kernel_size // 2),
        dilation=dilation,
        bias=norm == "",
        norm=_make_norm(norm, out_channels),
        activation=nn.ReLU(inplace=True),  # not a function, which TorchScript cannot call
        **conv_args,
    )
    weight_init.c2_msra_fill(conv)
    return conv


class DepthwiseSeparableConv2d(nn.Sequential):
    """A 3x3 depthwise convolution, then a 1x1 convolution with norm and ReLU.

    Nothing stands between the two. Detectron2's layer of this name has no stride and gives the
    depthwise convolution a bias, which published VoVNet weights do not have.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        norm: Norm,
        stride: int = 1,
        dilation: int = 1,
    ):
        """
        Args:
            norm: see :func:`conv_norm_act`.
        """
        depthwise = nn.Conv2d(
            in_channels,
            in_channels,
            kernel_size=3,
            stride=stride,
            padding=dilation,
            dilation=dilation,
            groups=in_channels,
            bias=False,
        )
        # Each output sees the 9 inputs of its own channel and no ReLU follows, so variance is kept
        # by 1 / fan_in; fan_out would count the other channels' filters and make it vanish.
        nn.init.kaiming_normal_(depthwise.weight, nonlinearity="linear")
        pointwise = conv_norm_act(in_channels, out_channels, 1, norm=norm)
        super().__init__(OrderedDict(depthwise=depthwise, pointwise=pointwise))


class DeformableConv2d(Conv2d):
    """Deformable convolution (:paper:`deformconv`, modulated: :paper:`deformconv2`) with the
    arguments of :class:`detectron2.layers.Conv2d`.

    A convolution of its own, zero-initialised, predicts the offsets (and masks): at first the
    layer computes what the plain convolution does, times one half where modulated.
    """

    def __init__(self, *args, modulated: bool = False, deformable_groups: int = 1, **kwargs):
        """
        Args:
            modulated: whether each tap is also scaled by a predicted mask in (0, 1).
            deformable_groups: number of groups of input channels with offsets of their own.

        Raises:
            ValueError: ``deformable_groups`` does not divide the input channels.
        """
        super().__init__(*args, **kwargs)
        if deformable_groups < 1 or self.in_channels % deformable_groups:
            raise ValueError(
                f"deformable_groups is {deformable_groups}: it must divide the layer's "
                f"{self.in_channels} input channels."
            )
        self.modulated = modulated
        taps = deformable_groups * math.prod(self.kernel_size)
        self.num_offsets = 2 * taps
        self.offset = nn.Conv2d(
            self.in_channels,
            self.num_offsets + (taps if modulated else 0),
            kernel_size=self.kernel_size,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
        )
        for parameter in self.offset.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        offset = self.offset(x)
        mask: torch.Tensor | None = None
        if self.modulated:
            mask = offset[:, self.num_offsets :].sigmoid()
            offset = offset[:, : self.num_offsets]
        x = _deformable_convolution(
            x, offset, mask, self.weight, self.bias, self.stride, self.padding, self.dilation
        )
        if self.norm is not None:
            if torch.jit.is_scripting():
                x = self.norm(x)
            else:
                x = call_as_one_node(self.norm, x)
        if self.activation is not None:
            x = self.activation(x)
        return x


@torch.fx.wrap  # A symbolic trace records the call, as it has no dtype to look at.
def _deformable_convolution(
    x: torch.Tensor,
    offset: torch.Tensor,
    mask: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
) -> torch.Tensor:
    """Compute torchvision's deformable convolution in at least 32 bits, whatever ``x`` has."""
    # torchvision's kernels lack bfloat16, and on the CPU autocast, too.
    dtype = torch.promote_types(x.dtype, torch.float32)
    return deform_conv2d(
        x.to(dtype),
        offset.to(dtype),
        weight.to(dtype),
        None if bias is None else bias.to(dtype),
        stride=stride,
        padding=padding,
        dilation=dilation,
        mask=None if mask is None else mask.to(dtype),
    ).to(x.dtype)


def bottleneck(
    in_channels: int, out_channels: int, *, norm: Norm, stride: int = 1, dilation: int = 1
) -> nn.Sequential:
    """A 1x1 convolution to half the output's width, then a 3x3 (VoVNet paper, Table 3)."""
    half = out_channels // 2
    return nn.Sequential(
        OrderedDict(
            reduce=conv_norm_act(in_channels, half, 1, norm=norm),
            conv=conv_norm_act(half, out_channels, 3, norm=norm, stride=stride, dilation=dilation),
        )
    )


class EffectiveSE(nn.Module):
    """Effective squeeze-excitation (CenterMask, section 3.3): channels weighted by one
    fully-connected layer of their averages and a hard sigmoid, without SE's reduction."""

    def __init__(self, channels: int):
        super().__init__()
        self.fc = nn.Conv2d(channels, channels, kernel_size=1)
        weight_init.c2_msra_fill(self.fc)

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """
        Args:
            x: (N, C, H, W).
            residual: (N, C, H, W), added to the result.
        """
        gate = F.hardsigmoid(self.fc(x.mean((2, 3), keepdim=True)))
        return x * gate if residual is None else residual + x * gate


def downsample(x: torch.Tensor) -> torch.Tensor:
    """3x3 max-pooling of stride 2: (N, C, H, W) to (N, C, ceil((H-1)/2), ceil((W-1)/2)).

    It is ``max_pool2d(x, 3, 2, ceil_mode=True)``. Graphs, as export back ends lack this mode, get
    the same to the bit for maps without negative values, such as those that come from a ReLU: one
    row and column of zeros is seen only by windows that ceil mode would let stand over the edge.
    """
    if not torch.jit.is_scripting():
        return _downsample(x)
    return F.max_pool2d(x, kernel_size=3, stride=2, ceil_mode=True)


def _downsample(x: torch.Tensor) -> torch.Tensor:
    """Compute what :func:`downsample` returns, outside of TorchScript."""
    if is_traced():
        return F.max_pool2d(F.pad(x, (0, 1, 0, 1)), kernel_size=3, stride=2)
    return F.max_pool2d(x, kernel_size=3, stride=2, ceil_mode=True)
