# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Convolution with norm and activation, of one feature map or of the concatenation of several."""

from typing import Any

import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d
from torch import Tensor

from .training_step import convolve, normalize


class ConvNormAct(Conv2d):
    """Detectron2's convolution with norm and activation, which also takes several feature maps.

    In training, :mod:`.training_step` saves time and memory.
    """

    def forward(self, maps: Tensor | list[Tensor]) -> Tensor:
        """Apply the layer to a feature map (N, ``in_channels``, H, W), or to several feature maps
        (N, channels, H, W) that have ``in_channels`` channels in all."""
        if not torch.jit.is_scripting():
            return self._run(maps)
        x = maps if isinstance(maps, Tensor) else torch.cat(maps, dim=1)
        x = F.conv2d(
            x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups
        )
        if self.norm is not None:
            x = self.norm(x)
        if self.activation is not None:
            x = self.activation(x)
        return x

    def _run(self, maps: Any) -> Tensor:
        """Compute what :meth:`forward` returns, outside of TorchScript."""
        x = convolve(self, maps)
        if self.norm is not None:
            x = normalize(self.norm, x)
        return x if self.activation is None else self.activation(x)
