# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""The heads of SSD, DSOD and RefineDet, which predict scores and offsets of every anchor."""

from collections import OrderedDict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from ..layers import ConvTranspose2d, Norm
from .layers import L2Norm, Predictor, ResidualBlock, conv_norm

Maps = list[torch.Tensor]


class LevelHead(nn.Module):
    """The predictors of one feature map, after an optional normalisation and an optional residual
    block.
    """

    def __init__(
        self,
        in_channels: int,
        num_anchors: int,
        num_logits: int,
        *,
        l2_norm_scale: float = 0.0,
        block_channels: Sequence[int] = (),
        kernel_size: int = 3,
        norm: Norm = "BN",
        predictor_norm: Norm = "",
    ):
        """
        Args:
            num_anchors: number of anchors at each location.
            num_logits: number of logits of each anchor.
            l2_norm_scale: initial scale of an L2 normalisation of the feature map; 0 for none.
            block_channels: widths of the output and of the bottleneck of the residual block; empty
                for no block.
            kernel_size: the kernel size of the two predictors.
            norm: the norm of the block.
            predictor_norm: the norm of the predictors; "" gives them a bias.
        """
        super().__init__()
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        if l2_norm_scale:
            layers["l2_norm"] = L2Norm(in_channels, l2_norm_scale)
        if block_channels:
            layers["block"] = ResidualBlock(in_channels, *block_channels, norm=norm)
            in_channels = block_channels[0]
        self.layers = nn.Sequential(layers)
        self.logits = Predictor(
            in_channels, num_anchors * num_logits, kernel_size, norm=predictor_norm
        )
        self.deltas = Predictor(in_channels, num_anchors * 4, kernel_size, norm=predictor_norm)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return logits (N, anchors · logits, H, W) and offsets (N, anchors · 4, H, W)."""
        x = self.layers(x)
        return self.logits(x), self.deltas(x)


class SSDHead(nn.Module):
    """One :class:`LevelHead` for each feature map, without shared weights."""

    def __init__(
        self,
        in_channels: Sequence[int],
        num_anchors: Sequence[int],
        num_logits: int,
        *,
        l2_norm_scale: float = 0.0,
        block_channels: Sequence[int] = (),
        kernel_size: int = 3,
        norm: Norm = "BN",
        predictor_norm: Norm = "",
    ):
        """
        Args:
            in_channels, num_anchors: one number for each feature map.
            num_logits: see :class:`LevelHead`, also for the other arguments.
        """
        super().__init__()
        self.levels = nn.ModuleList(
            LevelHead(
                channels,
                anchors,
                num_logits,
                l2_norm_scale=l2_norm_scale,
                block_channels=block_channels,
                kernel_size=kernel_size,
                norm=norm,
                predictor_norm=predictor_norm,
            )
            for channels, anchors in zip(in_channels, num_anchors, strict=True)
        )

    def forward(self, features: Maps) -> tuple[Maps, Maps]:
        """Return the logits and the offsets of each feature map."""
        logits, deltas = zip(
            *(level(x) for level, x in zip(self.levels, features, strict=True)), strict=True
        )
        return list(logits), list(deltas)


class TransferConnection(nn.Module):
    """RefineDet's transfer connection block (:paper:`RefineDet` arXiv 1711.06897, section 3.1).

    It makes a feature map for the ODM stage from a feature map of the ARM stage and from the result
    of the coarser level.
    """

    def __init__(self, in_channels: int, channels: int, *, is_top: bool, norm: Norm):
        """
        Args:
            is_top: True if there is no coarser level.
        """
        super().__init__()
        self.conv1 = conv_norm(in_channels, channels, 3, norm=norm)
        self.conv2 = conv_norm(channels, channels, 3, norm=norm, relu=is_top)
        self.upsample = None if is_top else ConvTranspose2d(channels, channels, 2, norm=norm)
        self.conv3 = conv_norm(channels, channels, 3, norm=norm)

    def forward(self, x: torch.Tensor, coarser: torch.Tensor | None) -> torch.Tensor:
        """Combine ``x`` with the coarser level's result, which has half the height and width."""
        x = self.conv2(self.conv1(x))
        if self.upsample is not None:
            x = F.relu_(x + self.upsample(coarser))
        return self.conv3(x)


class RefineDetHead(nn.Module):
    """The anchor refinement module (ARM) and the object detection module (ODM) of RefineDet.

    ARM reads the feature maps of the backbone, and ODM the results of the transfer connections.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        num_anchors: Sequence[int],
        num_classes: int,
        *,
        tcb_channels: int = 256,
        block_channels: Sequence[int] = (1024, 256),
        norm: Norm = "BN",
    ):
        """
        Args:
            in_channels, num_anchors: one number for each feature map, the finest first.
            num_classes: number of classes without background.
            tcb_channels: width of the transfer connections.
            block_channels: see :class:`LevelHead`.
        """
        super().__init__()
        self.arm = SSDHead(in_channels, num_anchors, 2, block_channels=block_channels, norm=norm)
        top = len(in_channels) - 1
        self.tcb = nn.ModuleList(
            TransferConnection(channels, tcb_channels, is_top=level == top, norm=norm)
            for level, channels in enumerate(in_channels)
        )
        self.odm = SSDHead(
            [tcb_channels] * len(in_channels),
            num_anchors,
            num_classes + 1,
            block_channels=block_channels,
            norm=norm,
        )

    def forward(self, features: Maps) -> tuple[Maps, Maps, Maps, Maps]:
        """Return the logits and the offsets of the ARM for each feature map, then those of the ODM.
        The feature maps come the finest first; each has half the height and width of the one
        before."""
        refined: Maps = []
        coarser = None
        for connection, x in zip(reversed(self.tcb), reversed(features), strict=True):
            coarser = connection(x, coarser)
            refined.insert(0, coarser)
        return (*self.arm(features), *self.odm(refined))
