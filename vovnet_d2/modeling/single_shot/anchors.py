# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""SSD's default boxes. RefineDet's are those of Detectron2's ``DefaultAnchorGenerator``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling.anchor_generator import ANCHOR_GENERATOR_REGISTRY, DefaultAnchorGenerator

__all__ = ["SSDAnchorGenerator"]


@ANCHOR_GENERATOR_REGISTRY.register()
class SSDAnchorGenerator(DefaultAnchorGenerator):
    """The default boxes of :paper:`SSD`, section 2.2.

    At each place of a map: a square of its size, a square of the geometric mean of its size and its
    second size, where it has one, and for each aspect ratio r a box of width size·√r and height
    size/√r, followed by the upright one of 1/r.

    The arguments are those of :class:`DefaultAnchorGenerator`, but that ``sizes`` holds one or two
    sizes for each map, in pixels, and ``aspect_ratios`` are width / height, without their inverses.
    Four sizes are two such pairs for a map that is used twice, as Pelee's finest is.
    """

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: Sequence[ShapeSpec]) -> dict[str, Any]:
        arguments = super().from_config(cfg, input_shape)
        if steps := cfg.MODEL.SINGLE_SHOT.ANCHOR_STEPS:
            if len(steps) != len(input_shape):
                raise ValueError(
                    f"MODEL.SINGLE_SHOT.ANCHOR_STEPS has {len(steps)} steps for {len(input_shape)} "
                    "maps: give one for each, or none to take the maps' strides."
                )
            arguments["strides"] = list(steps)
        return arguments

    def generate_cell_anchors(
        self, sizes: Sequence[float] = (30, 60), aspect_ratios: Sequence[float] = (2,)
    ) -> torch.Tensor:
        """The boxes (number, 4) of one place, around the origin, XYXY in pixels."""
        shapes: list[tuple[float, float]] = []
        for index in range(0, len(sizes), 2):
            size, *second = sizes[index : index + 2]
            shapes += [(size, size)] + [(math.sqrt(size * s),) * 2 for s in second]
            for ratio in aspect_ratios:
                long, short = size * math.sqrt(ratio), size / math.sqrt(ratio)
                shapes += [(long, short), (short, long)]
        half = torch.tensor(shapes) / 2
        return torch.cat([-half, half], dim=1)
