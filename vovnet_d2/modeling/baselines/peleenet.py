# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""PeleeNet (:paper:`Pelee` arXiv 1804.06882, section 2)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from detectron2.layers import CNNBlockBase, ShapeSpec
from detectron2.modeling import Backbone
from torch import nn

from ...errors import UserValueError
from ..layers import Norm, conv_norm_act
from ..tracing import is_traced
from .densenet import halve

_STEM_CHANNELS = 32
_LAYERS = {"stage2": 3, "stage3": 4, "stage4": 8, "stage5": 6}
_BOTTLENECK_CHANNELS = {"stage2": 16, "stage3": 32, "stage4": 64, "stage5": 64}
_BRANCH_GROWTH = 16


def average_halve(x: torch.Tensor) -> torch.Tensor:
    """Apply 2x2 average pooling of stride 2: (N, C, H, W) to (N, C, ceil(H/2), ceil(W/2)).

    Windows over the edge average only the pixels inside. In a graph, the edge is repeated instead.
    """
    if is_traced():
        return F.avg_pool2d(F.pad(x, (0, 1, 0, 1), mode="replicate"), kernel_size=2)
    return F.avg_pool2d(x, kernel_size=2, ceil_mode=True)


class PeleeStem(CNNBlockBase):
    """Two layers of stride 2; the second one joins convolutions and max-pooling."""

    def __init__(self, in_channels: int, *, norm: Norm):
        width = _STEM_CHANNELS
        super().__init__(in_channels, width, stride=4)
        self.conv = conv_norm_act(in_channels, width, 3, norm=norm, stride=2)
        self.learned = nn.Sequential(
            conv_norm_act(width, width // 2, 1, norm=norm),
            conv_norm_act(width // 2, width, 3, norm=norm, stride=2),
        )
        self.fuse = conv_norm_act(2 * width, width, 1, norm=norm)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x)
        return self.fuse(torch.cat([self.learned(x), halve(x)], dim=1))


class TwoWayDenseLayer(nn.Module):
    """Two branches with one and with two 3x3 convolutions, concatenated to their input."""

    def __init__(self, in_channels: int, bottleneck_channels: int, *, norm: Norm):
        """
        Args:
            bottleneck_channels: width of the 1x1 convolutions; a narrow input reduces it.
        """
        super().__init__()
        if bottleneck_channels > in_channels // 2:
            bottleneck_channels = in_channels // 8 * 4
        self.out_channels = in_channels + 2 * _BRANCH_GROWTH
        self.small = nn.Sequential(
            conv_norm_act(in_channels, bottleneck_channels, 1, norm=norm),
            conv_norm_act(bottleneck_channels, _BRANCH_GROWTH, 3, norm=norm),
        )
        self.large = nn.Sequential(
            conv_norm_act(in_channels, bottleneck_channels, 1, norm=norm),
            conv_norm_act(bottleneck_channels, _BRANCH_GROWTH, 3, norm=norm),
            conv_norm_act(_BRANCH_GROWTH, _BRANCH_GROWTH, 3, norm=norm),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x, self.small(x), self.large(x)], dim=1)


class PeleeStage(CNNBlockBase):
    """Average pooling except in the first stage, dense layers and a 1x1 convolution."""

    def __init__(
        self,
        in_channels: int,
        num_layers: int,
        bottleneck_channels: int,
        *,
        stride: int,
        norm: Norm,
    ):
        layers: list[nn.Module] = []
        channels = in_channels
        for _ in range(num_layers):
            layer = TwoWayDenseLayer(channels, bottleneck_channels, norm=norm)
            layers.append(layer)
            channels = layer.out_channels
        super().__init__(in_channels, channels, stride)
        self.layers = nn.Sequential(*layers)
        self.transition = conv_norm_act(channels, channels, 1, norm=norm)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x if self.stride == 1 else average_halve(x)
        return self.transition(self.layers(x))


class PeleeNet(Backbone):
    """A stem and four stages of two-way dense layers, from "stage2" (stride 4) to "stage5"."""

    def __init__(
        self,
        *,
        in_channels: int = 3,
        norm: Norm = "BN",
        out_features: Sequence[str] | None = None,
        num_classes: int | None = None,
        freeze_at: int = 0,
    ):
        """
        Args:
            norm: see :func:`conv_norm_act`.
            out_features: feature maps to return: any of "stem", "stage2" to "stage5". Later stages
                are not built. None is all stages, or with ``num_classes`` only "linear".
            num_classes: adds a classifier to the last stage, whose output is "linear".
            freeze_at: 0 freezes nothing, 1 the stem, 2 the stem and stage2, up to 5.

        Raises:
            ValueError: a feature or ``freeze_at`` does not exist.
        """
        super().__init__()
        choices = ["stem", *_LAYERS, *(["linear"] if num_classes else [])]
        if out_features is None:
            out_features = ["linear"] if num_classes else list(_LAYERS)
        unknown = [name for name in out_features if name not in choices]
        if unknown or not out_features:
            raise UserValueError(
                f"PeleeNet has no feature {', '.join(unknown) or '(none asked for)'}: choose from "
                f"{', '.join(choices)}."
            )
        if not 0 <= freeze_at <= 5:
            raise UserValueError(
                f"freeze_at is {freeze_at}: choose 0 (nothing), 1 (stem), 2 (stem and stage2), "
                "3, 4 or 5 (up to stage5)."
            )
        self.out_features = tuple(out_features)
        last = max(choices.index(name) for name in out_features)
        self.stem = PeleeStem(in_channels, norm=norm)
        channels, stride = self.stem.out_channels, self.stem.stride
        shapes = {"stem": ShapeSpec(channels=channels, stride=stride)}
        for name in list(_LAYERS)[:last]:
            stage = PeleeStage(
                channels,
                _LAYERS[name],
                _BOTTLENECK_CHANNELS[name],
                stride=1 if name == "stage2" else 2,
                norm=norm,
            )
            self.add_module(name, stage)
            channels, stride = stage.out_channels, stride * stage.stride
            shapes[name] = ShapeSpec(channels=channels, stride=stride)
        self._stages = tuple(shapes)
        for name in self._stages[:freeze_at]:
            getattr(self, name).freeze()
        if num_classes and "linear" in out_features:
            self.linear = nn.Linear(channels, num_classes)
            nn.init.normal_(self.linear.weight, std=0.01)
            nn.init.zeros_(self.linear.bias)
            shapes["linear"] = ShapeSpec(channels=num_classes)
        self._shapes = {name: shapes[name] for name in self.out_features}

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the feature maps of ``out_features`` for images (N, C, H, W). Sizes round up."""
        outputs = {}
        for name in self._stages:
            x = getattr(self, name)(x)
            outputs[name] = x
        if "linear" in self.out_features:
            outputs["linear"] = self.linear(x.mean((2, 3)))
        return {name: outputs[name] for name in self.out_features}

    def output_shape(self) -> dict[str, ShapeSpec]:
        return dict(self._shapes)
