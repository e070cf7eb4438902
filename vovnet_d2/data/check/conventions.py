# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""The order and the unit of the numbers in boxes and polygons are found. COCO has x, y, width,
height in pixels; other files have, for example, two corners or fractions. The masks, the areas or
the sizes of the images show the convention.

One convention is found for a whole set, before single annotations are checked.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .masks import box_of
from .values import are_numbers, is_box, is_number

Array = NDArray[np.float64]

# For each order of the four numbers, the conversion to x, y, width, height.
ORDERS: dict[str, Callable[[Array], Array]] = {
    "x, y, width, height": lambda b: b,
    "x1, y1, x2, y2": lambda b: _stack(b[0], b[1], b[2] - b[0], b[3] - b[1]),
    "y1, x1, y2, x2": lambda b: _stack(b[1], b[0], b[3] - b[1], b[2] - b[0]),
    "x1, x2, y1, y2": lambda b: _stack(b[0], b[2], b[1] - b[0], b[3] - b[2]),
    "y, x, height, width": lambda b: _stack(b[1], b[0], b[3], b[2]),
    "centre x, centre y, width, height": lambda b: _stack(
        b[0] - b[2] / 2, b[1] - b[3] / 2, b[2], b[3]
    ),
}
# For each unit, the number that stands for a whole side of the image; 0 for pixels.
UNITS = {"pixels": 0.0, "fractions of the size": 1.0, "percent": 100.0, "thousandths": 1000.0}

_MIN_BOXES = 3
# The share of boxes that must fit another convention, and the share below which COCO's is doubted.
_NEARLY_ALL, _FEW = 0.98, 0.75
_AGREE = 0.9  # the share of boxes that must agree with their masks or areas
_MIN_SIDE = 16  # pixels; objects of a larger image are more than a pixel wide


def _stack(*columns: Array) -> Array:
    return np.stack(columns)


@dataclass(frozen=True)
class Sample:
    """An annotation as it is in the file, and its image.

    Attributes:
        box: four finite numbers.
        size: width and height of the image to which the annotations refer.
        mask_box: x, y, width, height around the polygons; None if there are no polygons.
        area: the "area" of the annotation; None if it has none.
    """

    box: Sequence[float]
    size: tuple[float, float]
    mask_box: Sequence[float] | None
    area: float | None


@dataclass(frozen=True)
class Convention:
    order: str
    unit: str

    def __str__(self) -> str:
        return f"{self.order} in {self.unit}"

    def to_coco(self, boxes: Array, sizes: Array) -> Array:
        """Convert boxes (4, N) in this convention to x, y, width, height in pixels, (4, N). The
        ``sizes``, (2, N), are the widths and heights of the images."""
        if whole := UNITS[self.unit]:
            # The side of the image that each of the four numbers is a part of.
            along_y = self.order.startswith("y")
            pair = sizes[::-1] if along_y else sizes
            four = np.concatenate([pair, pair])
            if self.order == "x1, x2, y1, y2":
                four = np.repeat(sizes, 2, axis=0)
            boxes = boxes * four / whole
        return ORDERS[self.order](boxes)


COCO = Convention("x, y, width, height", "pixels")


def find_conventions(samples: Sequence[Sample]) -> list[Convention]:
    """Return the conventions that fit the boxes. The result is COCO's alone if nothing contradicts
    it. Otherwise it is another convention, or several that cannot be told apart."""
    if len(samples) < _MIN_BOXES:
        return [COCO]
    boxes = np.array([s.box for s in samples], dtype=float).T
    sizes = np.array([s.size for s in samples], dtype=float).T
    shapes = {
        convention: convention.to_coco(boxes, sizes) for convention in _candidates(boxes, sizes)
    }
    masks = np.array([s.mask_box or [np.nan] * 4 for s in samples], dtype=float).T
    if np.isfinite(masks[0]).mean() >= 0.5:
        return _by_masks(shapes, masks)
    areas = np.array([np.nan if s.area is None else s.area for s in samples])
    return _by_sizes(shapes, sizes, areas)


def _candidates(boxes: Array, sizes: Array) -> list[Convention]:
    tiny = boxes.min() >= -0.01 and boxes.max() <= 1.01 and sizes.min() >= _MIN_SIDE
    units = ["fractions of the size"] if tiny else ["pixels"]
    if not tiny and boxes.min() >= 0:
        units += [unit for unit in ("percent", "thousandths") if boxes.max() <= UNITS[unit]]
    found = [Convention(order, unit) for unit in units for order in ORDERS]
    return found if COCO in found else [COCO, *found]


def _by_masks(shapes: dict[Convention, Array], masks: Array) -> list[Convention]:
    known = np.isfinite(masks[0])
    shares = {
        c: boxes_agree(shape[:, known], masks[:, known]).mean() for c, shape in shapes.items()
    }
    if shares[COCO] >= 0.5:
        return [COCO]
    best = max(shares, key=lambda c: shares[c])
    return [best] if shares[best] >= _AGREE else [COCO]


def boxes_agree(shape: Array, masks: Array) -> NDArray[np.bool_]:
    """Return True for each box of ``shape`` whose edges are near those of the box in ``masks``: at
    most two pixels away, or a tenth of its side if that is more. Both arrays are (4, N) or (4,): x,
    y, width, height."""
    corners, others = _corners(shape), _corners(masks)
    limit = np.maximum(2, 0.1 * np.concatenate([masks[2:], masks[2:]]))
    return np.asarray((np.abs(corners - others) <= limit).all(axis=0))


def _corners(shape: Array) -> Array:
    return np.concatenate([shape[:2], shape[:2] + shape[2:]])


def _by_sizes(shapes: dict[Convention, Array], sizes: Array, areas: Array) -> list[Convention]:
    fits = {c: _fit(shape, sizes).mean() for c, shape in shapes.items()}
    by_area = {c: _same_area(shape, areas) for c, shape in shapes.items()}
    told = max(by_area.values()) >= _AGREE  # False if the areas are those of masks
    fractions = not any(c.unit == "pixels" for c in shapes if c != COCO)
    doubted = told and by_area[COCO] < 0.5
    if not fractions and fits[COCO] >= _FEW and not doubted:
        return [COCO]
    fitting = [c for c in shapes if c != COCO and fits[c] >= _NEARLY_ALL]
    if told:
        fitting = [c for c in fitting if by_area[c] >= _AGREE] or fitting
    for unit in UNITS:  # pixels come first; other units only if pixels do not fit
        if found := [c for c in fitting if c.unit == unit]:
            return found
    return [COCO]


def _fit(shape: Array, sizes: Array) -> NDArray[np.bool_]:
    x1, y1, x2, y2 = _corners(shape)
    slack = 1 + 0.01 * sizes.max(axis=0)
    inside = (x1 >= -slack) & (y1 >= -slack) & (x2 <= sizes[0] + slack) & (y2 <= sizes[1] + slack)
    return np.asarray(inside & (shape[2:] > 0).all(axis=0))


def _same_area(shape: Array, areas: Array) -> float:
    known = np.isfinite(areas)
    if known.mean() < 0.5:
        return 0.0
    products = (shape[2] * shape[3])[known]
    return float((np.abs(products - areas[known]) <= 0.01 * areas[known] + 0.01).mean())


# Polygons


def find_polygon_convention(samples: Sequence[Sample]) -> str:
    """Return how the polygons of annotations are written: "fractions", "y, x", or an empty text for
    COCO's x, y, ... in pixels."""
    known = [s for s in samples if s.mask_box is not None]
    if len(known) < _MIN_BOXES:
        return ""
    around = np.array([s.mask_box for s in known], dtype=float).T
    boxes = np.array([s.box for s in known], dtype=float).T
    sizes = np.array([s.size for s in known], dtype=float).T
    corners = _corners(around)
    if corners.min() >= -0.01 and corners.max() <= 1.01 and sizes.min() >= _MIN_SIDE:
        return "fractions"
    swapped = around[[1, 0, 3, 2]]
    fits, swapped_fits = (_fit(shape, sizes).mean() for shape in (around, swapped))
    agree, swapped_agree = (boxes_agree(boxes, shape).mean() for shape in (around, swapped))
    by_sizes = fits < _FEW and swapped_fits >= _NEARLY_ALL
    return "y, x" if by_sizes or (agree < 0.5 and swapped_agree >= _AGREE) else ""


def sample_of(annotation: dict[str, Any], size: tuple[float, float]) -> Sample | None:
    """Return the sample of an annotation for :func:`find_conventions`; None if its box is not four
    numbers."""
    box = annotation.get("bbox")
    if not is_box(box):
        return None
    polygons = polygons_of(annotation)
    around = box_of(polygons) if polygons else None
    area = annotation.get("area")
    return Sample(box, size, around, area if is_number(area) and area > 0 else None)


def polygons_of(annotation: dict[str, Any]) -> list[list[float]]:
    """Return the well-formed polygons of an annotation."""
    mask = annotation.get("segmentation")
    if not isinstance(mask, list):
        return []
    return [p for p in mask if are_numbers(p) and len(p) >= 6 and len(p) % 2 == 0]
