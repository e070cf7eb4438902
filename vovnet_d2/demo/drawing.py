# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Predictions drawn on their image, by Detectron2's visualizers."""

from __future__ import annotations

import numpy as np
from detectron2.data.catalog import Metadata
from detectron2.utils.colormap import colormap
from detectron2.utils.video_visualizer import VideoVisualizer
from detectron2.utils.visualizer import VisImage, Visualizer

from .selection import Shown

__all__ = ["Artist"]


class Artist:
    """Draws on one image after the other."""

    def __init__(self, metadata: Metadata, *, moving: bool):
        """
        Args:
            metadata: names and colours of the categories.
            moving: whether the images are frames of a video, in which an object keeps its colour.
        """
        self._metadata = _with_stuff_colors(metadata)
        self._video = VideoVisualizer(self._metadata) if moving else None

    def draw(self, pixels: np.ndarray, shown: Shown) -> np.ndarray:
        """
        Args:
            pixels: (H, W, 3), uint8, BGR.

        Returns:
            a picture of the same kind and size.
        """
        image = np.ascontiguousarray(pixels[:, :, ::-1])
        drawn = self._draw_frame(image, shown) if self._video else self._draw_still(image, shown)
        return np.ascontiguousarray(drawn.get_image()[:, :, ::-1])

    def _draw_still(self, image: np.ndarray, shown: Shown) -> VisImage:
        canvas = Visualizer(image, self._metadata)
        if shown.panoptic:
            return canvas.draw_panoptic_seg(*shown.panoptic)
        if shown.labels is not None:
            canvas.draw_sem_seg(shown.labels)
        if shown.instances is not None:
            canvas.draw_instance_predictions(shown.instances)
        return canvas.get_output()

    def _draw_frame(self, image: np.ndarray, shown: Shown) -> VisImage:
        assert self._video
        if shown.panoptic:
            return self._video.draw_panoptic_seg_predictions(image, *shown.panoptic)
        if shown.labels is not None:
            return self._video.draw_sem_seg(image, shown.labels)
        return self._video.draw_instance_predictions(image, shown.instances)


def _with_stuff_colors(metadata: Metadata) -> Metadata:
    """Else Detectron2 draws at random, and a video flickers."""
    if metadata.get("stuff_colors") or not metadata.get("stuff_classes"):
        return metadata
    colors = colormap(rgb=True, maximum=255).astype(int).tolist()
    repeated = [colors[i % len(colors)] for i in range(len(metadata.stuff_classes))]
    return Metadata(**{**metadata.as_dict(), "stuff_colors": repeated})
