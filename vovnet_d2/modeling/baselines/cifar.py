# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""DenseNet-40, with dense blocks or one-shot aggregation, for images of about 32x32 (VoVNet paper,
section 3.2; :paper:`DenseNet` arXiv 1608.06993).

A network has three blocks of 3x3 convolutions, with 1x1 convolutions of full width and average
pooling between them. Only the connections inside a block differ. In a dense block every layer reads
the input and all layers before it. In one-shot aggregation (OSA) a layer reads the layer before it,
and all outputs are concatenated once, at the end.
"""

from collections import OrderedDict
from dataclasses import dataclass
from typing import Literal

import fvcore.nn.weight_init as weight_init
import torch
import torch.nn.functional as F
from torch import nn

from ...errors import UserValueError


@dataclass(frozen=True)
class CifarSpec:
    """Describes a classifier for the small images of CIFAR.

    Attributes:
        connections: "dense", or "osa" for one-shot aggregation.
        layers: number of 3x3 convolutions in each of the three blocks.
        width: output channels of each convolution (the growth rate of DenseNet).
    """

    connections: Literal["dense", "osa"]
    layers: int
    width: int


CIFAR_SPECS: dict[str, CifarSpec] = {
    "DenseNet-40": CifarSpec("dense", layers=12, width=12),
    "OSA-12x20": CifarSpec("osa", layers=12, width=20),
    "OSA-5x43": CifarSpec("osa", layers=5, width=43),
}

_STEM_CHANNELS = 16
_NUM_BLOCKS = 3


def _norm_relu_conv(in_channels: int, out_channels: int, kernel_size: int) -> nn.Sequential:
    """Build a norm, a ReLU and a convolution, in the order of DenseNet for OSA as well."""
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False)
    weight_init.c2_msra_fill(conv)
    return nn.Sequential(
        OrderedDict(norm=nn.BatchNorm2d(in_channels), relu=nn.ReLU(inplace=True), conv=conv)
    )


class CifarBlock(nn.Module):
    """3x3 convolutions, densely connected or in a chain, with all outputs concatenated."""

    def __init__(self, in_channels: int, spec: CifarSpec):
        super().__init__()
        self.dense = spec.connections == "dense"
        layers, channels = [], in_channels
        for _ in range(spec.layers):
            layers.append(_norm_relu_conv(channels, spec.width, 3))
            channels = channels + spec.width if self.dense else spec.width
        self.layers = nn.ModuleList(layers)
        self.out_channels = in_channels + spec.layers * spec.width

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features = [x]
        for layer in self.layers:
            features.append(layer(torch.cat(features, dim=1) if self.dense else features[-1]))
        return torch.cat(features, dim=1)


class CifarClassifier(nn.Module):
    """A 3x3 convolution, three blocks, average pooling and a fully-connected layer."""

    def __init__(
        self,
        spec: str | CifarSpec,
        *,
        in_channels: int = 3,
        num_classes: int = 10,
        last_transition: bool = False,
    ):
        """
        Args:
            spec: a key of :data:`CIFAR_SPECS`, or a spec.
            in_channels: number of channels of the input.
            last_transition: whether a 1x1 convolution of full width also follows the third block,
                as the aggregation of OSA does. DenseNet has two of them.

        Raises:
            ValueError: there is no network of that name.
        """
        super().__init__()
        if isinstance(spec, str):
            if spec not in CIFAR_SPECS:
                raise UserValueError(
                    f"Unknown CIFAR network {spec!r}: choose from {', '.join(CIFAR_SPECS)}."
                )
            spec = CIFAR_SPECS[spec]
        self.stem = nn.Conv2d(in_channels, _STEM_CHANNELS, 3, padding=1, bias=False)
        weight_init.c2_msra_fill(self.stem)
        channels = _STEM_CHANNELS
        for number in range(1, _NUM_BLOCKS + 1):
            block = CifarBlock(channels, spec)
            self.add_module(f"block{number}", block)
            channels = block.out_channels
            if number < _NUM_BLOCKS or last_transition:
                self.add_module(f"transition{number}", _norm_relu_conv(channels, channels, 1))
        self.norm = nn.BatchNorm2d(channels)
        self.linear = nn.Linear(channels, num_classes)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return "linear", (N, num_classes), for images (N, C, H, W) of at least 4x4 pixels."""
        x = self.stem(x)
        for number in range(1, _NUM_BLOCKS + 1):
            x = getattr(self, f"block{number}")(x)
            if (transition := getattr(self, f"transition{number}", None)) is not None:
                x = transition(x)
            if number < _NUM_BLOCKS:
                x = F.avg_pool2d(x, 2)
        x = F.relu_(self.norm(x))
        return {"linear": self.linear(x.mean((2, 3)))}
