# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: NPY002 (Detectron2 seeds the global generator)
"""The augmentation of :paper:`SSD` (arXiv 1512.02325, section 2.2), written as augmentations of
Detectron2. The changes of colours follow SSD's code.

All random numbers come from NumPy's global generator, which Detectron2 seeds in every worker.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from detectron2.data import transforms as T
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision.ops import box_iou
from torchvision.transforms.v2 import functional as F

from ..errors import UserValueError

Array = NDArray[Any]


def ssd_augmentations(
    size: int, pixel_mean: Sequence[float], image_format: str
) -> list[T.Augmentation]:
    """Return all augmentations except the mirroring, in their order.

    Args:
        size: the side of the resulting square in pixels.
        pixel_mean: the colour around expanded images, in ``image_format``.
        image_format: "BGR" or "RGB".
    """
    return [
        Distort(image_format),
        T.RandomApply(Expand(pixel_mean), prob=0.5),
        SamplerCrop(),
        RandomInterpolationResize(size),
    ]


_Change = tuple[Callable[[Tensor, float], Tensor], float]

# The changes with their least and greatest factors, as in torchvision's recipe for SSD. Only the
# hue differs: SSD shifts it by up to 36 degrees.
_CHANGES = (
    (F.adjust_brightness, (0.875, 1.125)),
    (F.adjust_contrast, (0.5, 1.5)),
    (F.adjust_saturation, (0.5, 1.5)),
    (F.adjust_hue, (-0.1, 0.1)),
)


class Distort(T.Augmentation):
    """Changes brightness, contrast, saturation and hue, each with probability 0.5. The contrast is
    changed right after the brightness or last, each with probability 0.5."""

    def __init__(self, image_format: str):
        """
        Raises:
            ValueError: an ``image_format`` other than "BGR" and "RGB".
        """
        super().__init__()
        if image_format not in ("BGR", "RGB"):
            raise UserValueError(
                f"INPUT.FORMAT is {image_format!r}: SSD's augmentation knows the colours of BGR "
                "and RGB only; set INPUT.SSD_AUGMENTATION False."
            )
        self._init(locals())

    def get_transform(self, image: Array) -> T.Transform:
        changes = [(change, np.random.uniform(*limits)) for change, limits in _CHANGES]
        used = np.random.uniform(size=4) < 0.5
        order = [0, 1, 2, 3] if np.random.uniform() < 0.5 else [0, 2, 3, 1]
        change = partial(self._change, [changes[i] for i in order if used[i]])
        return T.ColorTransform(change)

    def _change(self, changes: Sequence[_Change], image: Array) -> Array:
        step = 1 if self.image_format == "RGB" else -1
        pixels = torch.from_numpy(image[..., ::step].transpose(2, 0, 1).copy())
        for change, factor in changes:
            pixels = change(pixels, factor)
        return pixels.numpy().transpose(1, 2, 0)[..., ::step]


class _Expansion(T.PadTransform):
    """Pads an image with a colour."""

    def apply_image(self, img: Array) -> Array:
        height, width = img.shape[:2]
        colour = np.rint(np.asarray(self.pad_value)).astype(img.dtype)
        shape = (self.y0 + height + self.y1, self.x0 + width + self.x1, img.shape[2])
        canvas = np.broadcast_to(colour, shape).copy()
        canvas[self.y0 : self.y0 + height, self.x0 : self.x0 + width] = img
        return canvas


class Expand(T.Augmentation):
    """Puts the image somewhere on a canvas of one colour, ``ratio`` times as wide and high."""

    def __init__(self, fill: Sequence[float], *, ratio: tuple[float, float] = (1.0, 4.0)):
        """Draw a ratio uniformly from the least to the greatest one. ``fill`` has a value for each
        channel."""
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
    """Crops by one of SSD's seven samplers, drawn uniformly among the samplers that succeed.

    One sampler returns the whole image. Each other sampler tries up to ``trials`` crops. It takes
    the first crop whose IoU with any box is at least 0.1, 0.3, 0.5, 0.7, 0.9 or 0. The sampler with
    0 only needs a box in the image. The mapper handles the boxes.

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
            min_iou: the least IoU of each sampler except that of the whole image.
            scale: the least and greatest square root of a crop's share of the image.
            aspect_ratio: the least and greatest width / height, relative to that of the image.
        """
        super().__init__()
        self._init(locals())

    def get_transform(self, image: Array, boxes: Array) -> T.Transform:
        """Return the crop of a sampler that is drawn, or a transform that changes nothing.

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
        """Return a crop, XYXY in whole pixels, or None if no trial succeeds. All trials are drawn
        at once."""
        if len(boxes) == 0:
            return None
        scale = np.random.uniform(self.scale[0], self.scale[1], self.trials)
        low, high = self.aspect_ratio
        # The crop must lie within the image.
        ratio = np.random.uniform(np.maximum(low, scale**2), np.minimum(high, scale**-2))
        sides = np.stack([scale * np.sqrt(ratio), scale / np.sqrt(ratio)], axis=1)
        corner = np.random.uniform(size=(self.trials, 2)) * (1 - sides)
        size = np.array([width, height])
        start = np.rint(corner * size)
        stop = np.clip(np.rint((corner + sides) * size), start + 1, size)
        start = np.minimum(start, stop - 1)
        crops = np.concatenate([start, stop], axis=1)
        overlaps = box_iou(torch.as_tensor(crops), torch.as_tensor(boxes)).numpy()
        success = (overlaps >= min_iou).any(axis=1)
        return crops[success.argmax()] if success.any() else None


class RandomInterpolationResize(T.Augmentation):
    """Resizes to a square by linear, area, nearest, cubic or Lanczos interpolation."""

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
