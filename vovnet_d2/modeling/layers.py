# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""The layers that OSA blocks and stems are made of."""

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

from ..errors import UserValueError
from .convolution import ConvNormAct
from .tracing import call_as_one_node, is_traced

Norm = str | Callable[[int], nn.Module]

NORMS = ("", "BN", "SyncBN", "FrozenBN", "GN", "nnSyncBN", "naiveSyncBN", "naiveSyncBN_N", "LN")
"""The norms that Detectron2 knows by name; ``""`` is none."""


def _make_norm(norm: Norm, channels: int) -> nn.Module | None:
    """Build a norm as Detectron2's ``get_norm`` does, with GN for any number of channels."""
    if isinstance(norm, str) and norm not in NORMS:
        choices = ", ".join(repr(name) for name in NORMS)
        raise UserValueError(f"Unknown norm {norm!r}: choose from {choices}, or pass a callable.")
    if norm == "GN":
        # Detectron2 uses 32 groups, which do not divide 80 and 112 channels of slim variants.
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
    """Build a convolution with norm and ReLU. The feature map keeps its size at stride 1.

    There is a bias only if no norm follows.

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
        activation=nn.ReLU(inplace=True),  # TorchScript cannot call a function here
        **conv_args,
    )
    weight_init.c2_msra_fill(conv)
    return conv


class ConvTranspose2d(nn.ConvTranspose2d):
    """Transposed convolution with a norm, like :class:`detectron2.layers.Conv2d`."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, *, norm: Norm):
        """
        Args:
            kernel_size: also the stride, and the factor by which the feature map grows.
        """
        super().__init__(
            in_channels, out_channels, kernel_size, stride=kernel_size, bias=norm == ""
        )
        self.norm = get_norm(norm, out_channels)
        nn.init.normal_(self.weight, std=0.01)

    def forward(self, input: torch.Tensor, output_size: list[int] | None = None) -> torch.Tensor:
        x = super().forward(input, output_size)
        return x if self.norm is None else self.norm(x)


class DepthwiseSeparableConv2d(nn.Sequential):
    """A 3x3 depthwise convolution, then a 1x1 convolution with norm and ReLU.

    There is no norm or activation between the two. Detectron2's layer of this name has no stride,
    and its depthwise convolution has a bias, which published VoVNet weights lack.
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
        # An output reads the 9 inputs of its channel and no ReLU follows, so 1 / fan_in keeps the
        # variance. fan_out would count the filters of all channels and make the output vanish.
        nn.init.kaiming_normal_(depthwise.weight, nonlinearity="linear")
        pointwise = conv_norm_act(in_channels, out_channels, 1, norm=norm)
        super().__init__(OrderedDict(depthwise=depthwise, pointwise=pointwise))


class DeformableConv2d(Conv2d):
    """Deformable convolution (:paper:`deformconv`, modulated: :paper:`deformconv2`) with the
    arguments of :class:`detectron2.layers.Conv2d`.

    A second convolution, initialised with zeros, predicts the offsets and masks. At first the layer
    returns the result of the plain convolution, or half of it if modulated.
    """

    def __init__(self, *args, modulated: bool = False, deformable_groups: int = 1, **kwargs):
        """
        Args:
            modulated: whether each tap is also scaled by a predicted mask in (0, 1).
            deformable_groups: number of groups of input channels; each group has its own offsets.

        Raises:
            ValueError: ``deformable_groups`` does not divide the input channels.
        """
        super().__init__(*args, **kwargs)
        if deformable_groups < 1 or self.in_channels % deformable_groups:
            raise UserValueError(
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


@torch.fx.wrap  # A symbolic trace records the call, because its tensors have no dtype.
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
    """Compute torchvision's deformable convolution in at least 32 bits."""
    # torchvision's kernels do not support bfloat16, nor autocast on a CPU.
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
    """Build a 1x1 convolution to half of the output channels, then a 3x3 (VoVNet, Table 3)."""
    half = out_channels // 2
    return nn.Sequential(
        OrderedDict(
            reduce=conv_norm_act(in_channels, half, 1, norm=norm),
            conv=conv_norm_act(half, out_channels, 3, norm=norm, stride=stride, dilation=dilation),
        )
    )


class EffectiveSE(nn.Module):
    """Effective squeeze-excitation (CenterMask, section 3.3).

    One fully-connected layer on the averages of the channels and a hard sigmoid give each channel
    its weight. SE has two layers with fewer channels between them.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.fc = nn.Conv2d(channels, channels, kernel_size=1)
        weight_init.c2_msra_fill(self.fc)

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """Weight the channels of ``x``, and add ``residual`` to it. Both are (N, C, H, W)."""
        gate = F.hardsigmoid(self.fc(x.mean((2, 3), keepdim=True)))
        return x * gate if residual is None else residual + x * gate


def max_pool(x: torch.Tensor) -> torch.Tensor:
    """Apply 3x3 max-pooling of stride 2: (N, C, H, W) to (N, C, ceil((H-1)/2), ceil((W-1)/2)).

    This is ``max_pool2d(x, 3, 2, ceil_mode=True)``. Export back ends lack this mode, so a graph
    gets a padding of one row and one column of zeros. The result is the same to the bit for feature
    maps without negative values, such as the output of a ReLU.
    """
    if not torch.jit.is_scripting():
        return _max_pool(x)
    return F.max_pool2d(x, kernel_size=3, stride=2, ceil_mode=True)


def _max_pool(x: torch.Tensor) -> torch.Tensor:
    """Compute what :func:`max_pool` returns, outside of TorchScript."""
    if is_traced():
        return F.max_pool2d(F.pad(x, (0, 1, 0, 1)), kernel_size=3, stride=2)
    return F.max_pool2d(x, kernel_size=3, stride=2, ceil_mode=True)
