# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: NPY002 (Detectron2 seeds the global generator)
"""SSD's augmentation (:paper:`SSD` arXiv 1512.02325, section 2.2, and its code's colours), as
Detectron2's augmentations.

All of it draws from NumPy's global generator, which Detectron2 seeds in every worker.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from detectron2.data import transforms as T
from numpy.typing import NDArray
from PIL import Image

__all__ = ["Distort", "Expand", "RandomInterpolationResize", "SamplerCrop", "ssd_augmentations"]

Array = NDArray[Any]


def ssd_augmentations(
    size: int, pixel_mean: Sequence[float], image_format: str
) -> list[T.Augmentation]:
    """Everything but the mirroring, in the order of use.

    Args:
        size: side of the resulting square in pixels.
        pixel_mean: what images are expanded with, in the order of ``image_format``.
        image_format: "BGR" or "RGB".
    """
    return [
        Distort(image_format),
        T.RandomApply(Expand(pixel_mean), prob=0.5),
        SamplerCrop(),
        RandomInterpolationResize(size),
    ]


class Distort(T.Augmentation):
    """Brightness, contrast, saturation and hue, each changed with probability 0.5; contrast comes
    right after brightness or last, by coin."""

    def __init__(
        self,
        image_format: str,
        *,
        brightness: float = 32.0,
        contrast: tuple[float, float] = (0.5, 1.5),
        saturation: tuple[float, float] = (0.5, 1.5),
        hue: float = 36.0,
    ):
        """
        Args:
            brightness: greatest shift, of pixels from 0 to 255.
            contrast, saturation: least and greatest factor.
            hue: greatest shift in degrees (OpenCV counts hue in steps of two).

        Raises:
            ValueError: an ``image_format`` other than "BGR" and "RGB".
        """
        super().__init__()
        if image_format not in ("BGR", "RGB"):
            raise ValueError(
                f"INPUT.FORMAT is {image_format!r}: SSD's augmentation knows the colours of BGR "
                "and RGB only; set INPUT.SSD_AUGMENTATION False."
            )
        self._init(locals())

    def get_transform(self, image: Array) -> T.Transform:
        steps = [
            partial(shift_brightness, shift=np.random.uniform(-self.brightness, self.brightness)),
            partial(scale_contrast, factor=np.random.uniform(*self.contrast)),
            partial(
                scale_saturation,
                factor=np.random.uniform(*self.saturation),
                image_format=self.image_format,
            ),
            partial(
                shift_hue,
                degrees=np.random.uniform(-self.hue, self.hue),
                image_format=self.image_format,
            ),
        ]
        used = np.random.uniform(size=4) < 0.5
        order = [0, 1, 2, 3] if np.random.uniform() < 0.5 else [0, 2, 3, 1]
        return T.TransformList([T.ColorTransform(steps[i]) for i in order if used[i]])


def shift_brightness(image: Array, shift: float) -> Array:
    return _to_pixels(image + np.float32(shift))


def scale_contrast(image: Array, factor: float) -> Array:
    return _to_pixels(image * np.float32(factor))


def scale_saturation(image: Array, factor: float, image_format: str) -> Array:
    hsv = _to_hsv(image, image_format)
    hsv[..., 1] = _to_pixels(hsv[..., 1] * np.float32(factor))
    return _from_hsv(hsv, image_format)


def shift_hue(image: Array, degrees: float, image_format: str) -> Array:
    hsv = _to_hsv(image, image_format)
    hsv[..., 0] += np.uint8(round(degrees * 256 / 360) % 256)  # a byte turns full circle by itself
    return _from_hsv(hsv, image_format)


def _to_pixels(values: Array) -> Array:
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


def _to_hsv(image: Array, image_format: str) -> Array:
    rgb = image if image_format == "RGB" else image[..., ::-1]
    return np.array(Image.fromarray(np.ascontiguousarray(rgb)).convert("HSV"))


def _from_hsv(hsv: Array, image_format: str) -> Array:
    bands = [Image.fromarray(np.ascontiguousarray(hsv[..., i])) for i in range(3)]
    rgb = np.asarray(Image.merge("HSV", bands).convert("RGB"))
    return rgb if image_format == "RGB" else rgb[..., ::-1]


class _Expansion(T.PadTransform):
    """A padding with a colour."""

    def apply_image(self, img: Array) -> Array:
        height, width = img.shape[:2]
        colour = np.rint(np.asarray(self.pad_value)).astype(img.dtype)
        shape = (self.y0 + height + self.y1, self.x0 + width + self.x1, img.shape[2])
        canvas = np.broadcast_to(colour, shape).copy()
        canvas[self.y0 : self.y0 + height, self.x0 : self.x0 + width] = img
        return canvas


class Expand(T.Augmentation):
    """The image somewhere on a canvas of ``ratio`` times its sides, which is of one colour."""

    def __init__(self, fill: Sequence[float], *, ratio: tuple[float, float] = (1.0, 4.0)):
        """
        Args:
            fill: a value for each channel.
            ratio: least and greatest; drawn uniformly.
        """
        super().__init__()
        self._init(locals())

    def get_transform(self, image: Array) -> T.Transform:
        height, width = image.shape[:2]
        ratio = np.random.uniform(*self.ratio)
        more_y, more_x = int(height * (ratio - 1)), int(width * (ratio - 1))
        top, left = np.random.randint(more_y + 1), np.random.randint(more_x + 1)
        return _Expansion(
            left, top, more_x - left, more_y - top, width, height, pad_value=self.fill
        )


class SamplerCrop(T.Augmentation):
    """One of SSD's seven samplers, drawn uniformly among those that succeed.

    One returns the whole image. Each of the others tries up to ``trials`` crops and takes the first
    whose IoU with any one box is at least 0.1, 0.3, 0.5, 0.7 or 0.9, or at most 1 (so the last only
    asks for a box to be there). What becomes of the boxes is for the mapper to say.

    With polygons for masks, Detectron2's cropping needs the package shapely.
    """

    def __init__(
        self,
        *,
        min_iou: Sequence[float] = (0.1, 0.3, 0.5, 0.7, 0.9, 0.0),
        scale: tuple[float, float] = (0.3, 1.0),
        aspect_ratio: tuple[float, float] = (0.5, 2.0),
        trials: int = 50,
    ):
        """
        Args:
            min_iou: of each sampler but the one of the whole image.
            scale: least and greatest square root of a crop's share of the image.
            aspect_ratio: least and greatest width / height, in units of the image's own.
        """
        super().__init__()
        self._init(locals())

    def get_transform(self, image: Array, boxes: Array) -> T.Transform:
        """
        Args:
            image: (H, W, C).
            boxes: (N, 4), XYXY in pixels.
        """
        height, width = image.shape[:2]
        crops = [self._sample(height, width, boxes, iou) for iou in self.min_iou]
        found = [crop for crop in crops if crop is not None]
        choice = np.random.randint(len(found) + 1)
        if choice == len(found):
            return T.NoOpTransform()
        left, top, right, bottom = (int(side) for side in found[choice])
        return T.CropTransform(left, top, right - left, bottom - top, width, height)

    def _sample(self, height: int, width: int, boxes: Array, min_iou: float) -> Array | None:
        """A crop, XYXY in whole pixels; all trials are drawn at once."""
        if len(boxes) == 0:
            return None
        scale = np.random.uniform(self.scale[0], self.scale[1], self.trials)
        low, high = self.aspect_ratio
        # Within the image.
        ratio = np.random.uniform(np.maximum(low, scale**2), np.minimum(high, scale**-2))
        sides = np.stack([scale * np.sqrt(ratio), scale / np.sqrt(ratio)], axis=1)
        corner = np.random.uniform(size=(self.trials, 2)) * (1 - sides)
        size = np.array([width, height])
        start = np.rint(corner * size)
        stop = np.clip(np.rint((corner + sides) * size), start + 1, size)
        start = np.minimum(start, stop - 1)
        crops = np.concatenate([start, stop], axis=1)
        success = (_pairwise_iou(crops, boxes) >= min_iou).any(axis=1)
        return crops[success.argmax()] if success.any() else None


def _pairwise_iou(a: Array, b: Array) -> Array:
    sides = np.minimum(a[:, None, 2:], b[:, 2:]) - np.maximum(a[:, None, :2], b[:, :2])
    common = sides.clip(min=0).prod(axis=2)
    areas = [(boxes[:, 2:] - boxes[:, :2]).prod(axis=1) for boxes in (a, b)]
    return common / (areas[0][:, None] + areas[1] - common)


class RandomInterpolationResize(T.Augmentation):
    """To a square, by linear, area, nearest, cubic or Lanczos interpolation."""

    METHODS = (
        Image.Resampling.BILINEAR,
        Image.Resampling.BOX,
        Image.Resampling.NEAREST,
        Image.Resampling.BICUBIC,
        Image.Resampling.LANCZOS,
    )

    def __init__(self, size: int):
        """
        Args:
            size: side in pixels.
        """
        super().__init__()
        self._init(locals())

    def get_transform(self, image: Array) -> T.Transform:
        method = self.METHODS[np.random.randint(len(self.METHODS))]
        return T.ResizeTransform(*image.shape[:2], self.size, self.size, method)
