# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Predictions drawn on the frames of a video, by OpenCV.

Detectron2's visualizers draw by matplotlib, which takes several times as long as a small network.
"""

from __future__ import annotations

import math
from functools import lru_cache
from pathlib import Path

import cv2
import matplotlib
import numpy as np
from detectron2.data.catalog import Metadata
from detectron2.structures import Instances
from detectron2.utils.colormap import colormap
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from .selection import Shown

__all__ = ["FrameArtist"]

Pixels = NDArray[np.uint8]

_FONT = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
_MIN_FONT_SIZE = 12  # pixels
_MIN_KEYPOINT_SCORE = 0.05  # as Detectron2's visualizer has it


class FrameArtist:
    """Draws on one frame after the other; each category has its colour in all of them."""

    def __init__(self, metadata: Metadata):
        """
        Args:
            metadata: names and colours of the categories.
        """
        self._things: list[str] = metadata.get("thing_classes", [])
        self._stuff: list[str] = metadata.get("stuff_classes", [])
        self._thing_colors = _colors(metadata.get("thing_colors"), len(self._things))
        self._stuff_colors = _colors(metadata.get("stuff_colors"), len(self._stuff))
        numbers = {name: i for i, name in enumerate(metadata.get("keypoint_names", []))}
        self._limbs = [
            (numbers[one], numbers[other], tuple(reversed(color)))
            for one, other, color in metadata.get("keypoint_connection_rules", [])
        ]

    def draw(self, pixels: Pixels, shown: Shown) -> Pixels:
        """
        Args:
            pixels: (H, W, 3), uint8, BGR.

        Returns:
            a picture of the same kind and size.
        """
        canvas = np.ascontiguousarray(pixels).copy()
        font_size = max(_MIN_FONT_SIZE, round(math.sqrt(canvas.shape[0] * canvas.shape[1]) / 60))
        if shown.panoptic:
            self._draw_segments(canvas, shown, font_size)
        elif shown.labels is not None:
            labels = shown.labels.numpy()
            chosen = labels < len(self._stuff_colors)
            _blend(canvas, chosen, self._stuff_colors[labels[chosen]])
        elif shown.instances is not None:
            self._draw_instances(canvas, shown.instances, font_size)
        return canvas

    def _draw_segments(self, canvas: Pixels, shown: Shown, font_size: int) -> None:
        assert shown.panoptic
        ids = shown.panoptic[0].numpy()
        for segment in shown.panoptic[1]:
            mask = ids == segment["id"]
            number, is_thing = segment["category_id"], segment["isthing"]
            _blend(canvas, mask, (self._thing_colors if is_thing else self._stuff_colors)[number])
            if is_thing and mask.any():
                y, x = (int(np.median(index)) for index in np.nonzero(mask))
                text = _describe(self._things[number], segment.get("score"))
                _write(canvas, text, x, y, font_size)

    def _draw_instances(self, canvas: Pixels, instances: Instances, font_size: int) -> None:
        boxes = instances.pred_boxes.tensor.numpy()
        numbers, scores = instances.pred_classes.tolist(), instances.scores.tolist()
        # Small objects are drawn last, so that large ones do not hide them.
        order = np.argsort(-instances.pred_boxes.area().numpy(), kind="stable")
        for i in order:
            color = self._thing_colors[numbers[i]]
            x1, y1, x2, y2 = (int(value) for value in np.rint(boxes[i]))
            if instances.has("pred_masks"):
                rows, columns = slice(max(y1 - 1, 0), y2 + 2), slice(max(x1 - 1, 0), x2 + 2)
                mask = instances.pred_masks[i].numpy()[rows, columns]
                _blend(canvas[rows, columns], mask, color)
            cv2.rectangle(canvas, (x1, y1), (x2, y2), color.tolist(), max(1, font_size // 8))
        if instances.has("pred_keypoints"):
            for points in instances.pred_keypoints.numpy():
                self._draw_keypoints(canvas, points, max(2, font_size // 5))
        for i in order:
            x, y = (int(value) for value in boxes[i][:2])
            _write(canvas, _describe(self._things[numbers[i]], scores[i]), x, y, font_size)

    def _draw_keypoints(self, canvas: Pixels, points: NDArray[np.float32], radius: int) -> None:
        """
        Args:
            points: (K, 3), each with x, y and a score.
        """
        places = [(int(x), int(y)) for x, y, _ in np.rint(points)]
        visible = points[:, 2] > _MIN_KEYPOINT_SCORE
        for one, other, color in self._limbs:
            if visible[one] and visible[other]:
                cv2.line(canvas, places[one], places[other], color, radius)
        for place, is_visible in zip(places, visible, strict=True):
            if is_visible:
                cv2.circle(canvas, place, radius, (0, 0, 255), -1)


def _colors(rgb: list[list[int]] | None, count: int) -> Pixels:
    """Colours of categories, (count, 3), BGR: their own, or those of Detectron2's colour map."""
    if rgb:
        return np.array(rgb, dtype=np.uint8)[:, ::-1]
    known = colormap(rgb=False, maximum=255).astype(np.uint8)
    return known[np.arange(count) % len(known)]


def _blend(canvas: Pixels, mask: NDArray[np.bool_], color: Pixels) -> None:
    """Mix the pixels under a mask with a colour, or with one for each of them, half and half."""
    canvas[mask] = (canvas[mask].astype(np.uint16) + color) // 2


def _describe(name: str, score: float | None) -> str:
    return name if score is None else f"{name} {score:.0%}"


def _write(canvas: Pixels, text: str, x: int, y: int, size: int) -> None:
    """Write white on dark, with the upper left corner at (x, y), or as near as fits."""
    letters = _render(text, size)
    height, width = canvas.shape[:2]
    y = min(max(y, 0), max(height - letters.shape[0], 0))
    x = min(max(x, 0), max(width - letters.shape[1], 0))
    region = canvas[y : y + letters.shape[0], x : x + letters.shape[1]]
    letters = letters[: region.shape[0], : region.shape[1], None]
    region[:] = np.maximum(region // 3, letters)


@lru_cache(maxsize=1024)
def _render(text: str, size: int) -> Pixels:
    """A line of text as an image (H, W), white on black. OpenCV's own fonts are ASCII only."""
    font = ImageFont.truetype(str(_FONT), size)
    margin = max(1, size // 6)
    right, bottom = (int(side) for side in font.getbbox(text)[2:])
    image = Image.new("L", (right + 2 * margin, bottom + 2 * margin))
    ImageDraw.Draw(image).text((margin, margin), text, fill=255, font=font)
    return np.asarray(image)
