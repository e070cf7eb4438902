# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Predictions drawn on their picture, by Detectron2's visualizer."""

from __future__ import annotations

import numpy as np
from detectron2.data.catalog import Metadata
from detectron2.utils.visualizer import VisImage, Visualizer

from ..data.label_colors import with_stuff_colors
from ..engine.pictures import without_thin_masks
from ..engine.plain_text import plain_text
from .selection import Shown

__all__ = ["Artist"]


class Artist:
    """Draws on one picture after the other."""

    def __init__(self, metadata: Metadata):
        """
        Args:
            metadata: names and colours of the categories.
        """
        self._metadata = with_stuff_colors(metadata)

    def draw(self, pixels: np.ndarray, shown: Shown) -> np.ndarray:
        """
        Args:
            pixels: (H, W, 3), uint8, BGR.

        Returns:
            a picture of the same kind and size.
        """
        image = np.ascontiguousarray(pixels[:, :, ::-1])
        return np.ascontiguousarray(self._draw(image, shown).get_image()[:, :, ::-1])

    @plain_text()
    def _draw(self, image: np.ndarray, shown: Shown) -> VisImage:
        canvas = Visualizer(image, self._metadata)
        if image.shape[1] == 2:  # maps and masks of that width Detectron2's visualizer refuses
            shown = Shown(shown.instances, None, None)
        if shown.panoptic:
            return canvas.draw_panoptic_seg(*shown.panoptic)
        if shown.labels is not None:
            canvas.draw_sem_seg(shown.labels)
        if shown.instances is not None:
            canvas.draw_instance_predictions(without_thin_masks(shown.instances))
        return canvas.get_output()
