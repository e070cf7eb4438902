# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Default boxes of SSD. RefineDet uses Detectron2's ``DefaultAnchorGenerator``."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling.anchor_generator import ANCHOR_GENERATOR_REGISTRY, DefaultAnchorGenerator

from ...errors import UserValueError


@ANCHOR_GENERATOR_REGISTRY.register()
class SSDAnchorGenerator(DefaultAnchorGenerator):
    """The default boxes of :paper:`SSD`, section 2.2.

    Each location of a feature map has a square of the first size, a square of the geometric mean of
    the first and the second size if there is a second one, and for each aspect ratio r a box of
    width size·√r and height size/√r, followed by the box of ratio 1/r.

    The arguments are those of :class:`DefaultAnchorGenerator`, with two differences. ``sizes`` has
    one or two sizes in pixels for each feature map, or two such pairs for a feature map that is
    used twice, such as the finest one of Pelee. ``aspect_ratios`` are width / height, without their
    inverses.
    """

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: Sequence[ShapeSpec]) -> dict[str, Any]:
        arguments = super().from_config(cfg, input_shape)
        if steps := cfg.MODEL.SINGLE_SHOT.ANCHOR_STEPS:
            if len(steps) != len(input_shape):
                raise UserValueError(
                    f"MODEL.SINGLE_SHOT.ANCHOR_STEPS has {len(steps)} steps for {len(input_shape)} "
                    "feature maps: give one for each, or none to take their strides."
                )
            arguments["strides"] = list(steps)
        return arguments

    def generate_cell_anchors(
        self, sizes: Sequence[float] = (30, 60), aspect_ratios: Sequence[float] = (2,)
    ) -> torch.Tensor:
        """Return the boxes (number, 4) of one location, around the origin, XYXY in pixels."""
        shapes: list[tuple[float, float]] = []
        for index in range(0, len(sizes), 2):
            size, *second = sizes[index : index + 2]
            shapes += [(size, size)] + [(math.sqrt(size * s),) * 2 for s in second]
            for ratio in aspect_ratios:
                long, short = size * math.sqrt(ratio), size / math.sqrt(ratio)
                shapes += [(long, short), (short, long)]
        half = torch.tensor(shapes) / 2
        return torch.cat([-half, half], dim=1)
