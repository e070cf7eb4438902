# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Build VoVNet as it is commonly written, for comparisons in measurements.

Each block calls Detectron2's convolution and norm, and keeps the concatenated feature maps for the
backward pass. The memory format is NCHW.
"""

import copy

import torch
from detectron2.layers import Conv2d
from torch import Tensor, nn

from ..modeling.convolution import ConvNormAct


def plain(model: nn.Module) -> nn.Module:
    """Return a copy of a model in which each VoVNet has separate norms and is in NCHW.

    The copy has the same weights under the same names, and is in the same mode.
    """
    model = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
    for module in model.modules():
        module.__class__ = _PLAIN.get(module.__class__, module.__class__)
    return model


class _Convolution(Conv2d):
    """Detectron2's convolution, which also takes several feature maps and concatenates them."""

    def forward(self, maps: Tensor | list[Tensor]) -> Tensor:
        return super().forward(torch.cat(maps, dim=1) if isinstance(maps, list) else maps)


_PLAIN: dict[type[nn.Module], type[nn.Module]] = {ConvNormAct: _Convolution}
