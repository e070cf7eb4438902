# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""VoVNet as it is commonly written, for measurements to compare with.

Each norm is an operator of its own, the concatenation is made and kept for the backward pass, and
so are the input of each pooling and the products of the squeeze-excitation; NCHW.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d
from torch import Tensor, nn

from ..modeling.convolution import ConvNormAct
from ..modeling.layers import EffectiveSE
from ..modeling.vovnet import OSABlock

__all__ = ["plain"]


def plain(model: nn.Module) -> nn.Module:
    """
    Args:
        model: a VoVNet, or a model with one in it, for training or inference.

    Returns:
        a copy with the same weights under the same names, in the same mode, in NCHW.
    """
    model = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
    for module in model.modules():
        module.__class__ = _PLAIN.get(module.__class__, module.__class__)
    return model


class _Convolution(Conv2d):
    """Detectron2's, of several maps."""

    def forward(self, maps: Tensor | list[Tensor]) -> Tensor:
        return super().forward(torch.cat(maps, dim=1) if isinstance(maps, list) else maps)


class _EffectiveSE(EffectiveSE):
    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = x * F.hardsigmoid(self.fc(x.mean((2, 3), keepdim=True)))
        return y if residual is None else residual + y


class _OSABlock(OSABlock):
    def downsample(self, x: Tensor) -> Tensor:
        return F.max_pool2d(x, kernel_size=3, stride=2, ceil_mode=True)


_PLAIN: dict[type[nn.Module], type[nn.Module]] = {
    ConvNormAct: _Convolution,
    EffectiveSE: _EffectiveSE,
    OSABlock: _OSABlock,
}
