# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""An image of the digits data set is drawn: the background, the glyphs and their outlines.

Pixels are computed in double precision and rounded once, at the end. So machines whose last digits
differ still make the same image.
"""

import math
from collections import defaultdict
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..errors import UserImportError, UserValueError

GLYPH_MARGIN = 2  # pixels around a glyph that belong to no other glyph and lie on the canvas

_CROP_SIDES = (112, 192)  # pixels of the photograph that become one canvas
_INK_THRESHOLD = 0.4  # the share of full ink above which a pixel belongs to the glyph
_FAINTEST_INK = 0.65  # opacity at the threshold; it rises to 1 where the pen pressed hardest
_MAX_BOX_OVERLAP = 0.25  # shared area over the area of the smaller box
_MIN_CONTRAST = 80.0  # grey levels between full ink and 90 % of the background around it
_LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601

_TRIES_PER_DIGIT = 40
_TRIES_PER_IMAGE = 100


class Sources(NamedTuple):
    """The data of scikit-learn: scans (1797, 8, 8) in [0, 1], labels (1797,), RGB photographs."""

    scans: NDArray[np.float64]
    labels: NDArray[np.int64]
    photographs: list[NDArray[np.uint8]]


class Digit(NamedTuple):
    """A digit of an image: box ``XYWH`` in pixels, polygons ``[x0, y0, x1, y1, ...]``.

    All numbers are floats, because Detectron2 would round the numbers of a scaled polygon of
    integers.
    """

    label: int
    box: list[float]
    polygons: list[list[float]]


class _Glyph(NamedTuple):
    """A digit ready to be drawn. Both arrays are (H, W), with ``GLYPH_MARGIN`` on every side."""

    opacity: NDArray[np.float64]
    mask: NDArray[np.bool_]


def load_sources() -> Sources:
    """Read the scans and photographs that come with scikit-learn. Raise ImportError if scikit-learn
    is missing, or Pillow, with which it reads photographs."""
    try:
        from sklearn.datasets import load_digits, load_sample_images
    except ImportError as error:
        raise UserImportError(
            "The digits data set is made of scikit-learn's data: pip install scikit-learn"
        ) from error
    digits = load_digits()
    return Sources(digits.images / 16.0, digits.target, list(load_sample_images().images))


def make_image(
    sources: Sources,
    digits: NDArray[np.int64],
    photo_part: tuple[float, float],
    rng: np.random.Generator,
    *,
    image_size: int,
    digits_per_image: tuple[int, int],
    digit_size: tuple[int, int],
) -> tuple[NDArray[np.uint8], list[Digit]]:
    """Draw digits on a piece of a photograph.

    Args:
        sources: see :func:`load_sources`.
        digits: indices of the scans to choose from.
        photo_part: left and right end of the backgrounds, as fractions of a photograph's width.
        rng: the generator of all choices.
        image_size, digits_per_image, digit_size: see ``build_digits``.

    Returns:
        the pixels (S, S, 3) in RGB, and the digits on them.

    Raises:
        ValueError: the digits do not fit.
    """
    count = int(rng.integers(digits_per_image[0], digits_per_image[1] + 1))
    low, high = digit_size
    for _ in range(_TRIES_PER_IMAGE):
        labels = [int(label) for label in rng.integers(10, size=count)]
        chosen = [rng.choice(digits[sources.labels[digits] == label]) for label in labels]
        # Large glyphs come first, while there is most room.
        heights = np.sort(np.exp(rng.uniform(math.log(low), math.log(high), count)))[::-1]
        glyphs = [
            _make_glyph(sources.scans[digit], label, height, rng)
            for digit, label, height in zip(chosen, labels, heights, strict=True)
        ]
        canvas = _make_background(sources.photographs, photo_part, image_size, rng)
        masks = _draw(canvas, glyphs, rng)
        if masks is not None:
            return np.rint(canvas).astype(np.uint8), [
                Digit(label, [float(side) for side in _box(mask)], _trace_outlines(mask))
                for label, mask in zip(labels, masks, strict=True)
            ]
    raise UserValueError(
        f"{count} digits of {low} to {high} pixels do not fit on an image of {image_size} pixels: "
        "lower digits_per_image or digit_size, or raise image_size."
    )


def _make_background(
    photographs: list[NDArray[np.uint8]],
    photo_part: tuple[float, float],
    image_size: int,
    rng: np.random.Generator,
) -> NDArray[np.float64]:
    """Return a piece of a photograph (S, S, 3) in [0, 255], perhaps mirrored, with less
    contrast."""
    from PIL import Image

    photo = photographs[rng.integers(len(photographs))]
    height, width, _ = photo.shape
    left, right = (round(fraction * width) for fraction in photo_part)
    side = int(rng.integers(_CROP_SIDES[0], _CROP_SIDES[1] + 1))
    x, y = rng.integers(left, right - side + 1), rng.integers(height - side + 1)
    # The crop comes before the resizing, because its filter would reach beyond the crop.
    crop = Image.fromarray(photo[y : y + side, x : x + side])
    pixels = np.asarray(crop.resize((image_size, image_size), Image.Resampling.BICUBIC), float)
    if rng.random() < 0.5:
        pixels = pixels[:, ::-1]
    mean = pixels.mean()
    brightness = np.clip(mean + rng.uniform(-60.0, 60.0), 60.0, 190.0)
    return np.clip(brightness + rng.uniform(0.4, 0.8) * (pixels - mean), 0.0, 255.0)


def _make_glyph(
    scan: NDArray[np.float64], label: int, height: float, rng: np.random.Generator
) -> _Glyph:
    """Enlarge a scan (8, 8) to a glyph of about ``height`` pixels, slightly deformed."""
    from scipy import ndimage

    # A cell is the mean ink over its surface; sharpening opens narrow loops again.
    cells = np.pad(scan, 1)
    cells = cells + 1.5 * (cells - ndimage.gaussian_filter(cells, 0.8, mode="constant"))
    angle = rng.uniform(-0.2, 0.2)
    shear = rng.uniform(-0.15, 0.15)
    # The scans have all digits at about the same width: most are squeezed, a 1 is stretched.
    widening = rng.uniform(0.6, 0.9) if label == 1 else rng.uniform(1.0, 1.5)
    rotation = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    to_pixels = rotation @ np.array([[1.0, 0.0], [shear, widening]])  # (y, x) of cells to pixels

    coarse = 8.0  # pixels per cell, to measure how high the deformed glyph comes out
    rows = np.flatnonzero((_resample(cells, coarse * to_pixels) >= _INK_THRESHOLD).any(axis=1))
    scale = coarse * height / (rows[-1] - rows[0] + 1)
    return _ink_to_glyph(np.pad(_resample(cells, scale * to_pixels), GLYPH_MARGIN))


def _resample(cells: NDArray[np.float64], to_pixels: NDArray[np.float64]) -> NDArray[np.float64]:
    """Read a cubic spline through ``cells`` (N, N) at the pixels of the deformed grid."""
    from scipy import ndimage

    center = (len(cells) - 1) / 2
    shape = 2 * np.ceil(center * np.abs(to_pixels).sum(axis=1)).astype(int)
    to_cells = np.linalg.inv(to_pixels)
    offset = center - to_cells @ ((shape - 1) / 2)
    return ndimage.affine_transform(cells, to_cells, offset, tuple(shape), order=3)


def _ink_to_glyph(ink: NDArray[np.float64]) -> _Glyph:
    """Return opacity and filled mask of an amount of ink (H, W), cropped to the glyph."""
    from scipy import ndimage

    square = np.ones((3, 3))
    parts, count = ndimage.label(ink >= _INK_THRESHOLD, structure=square)
    sizes = np.bincount(parts.ravel(), minlength=count + 1)[1:]
    glyph = np.isin(parts, 1 + np.flatnonzero(sizes >= 0.1 * sizes.max()))  # without specks
    left, top, width, height = _box(glyph)
    window = (
        slice(top - GLYPH_MARGIN, top + height + GLYPH_MARGIN),
        slice(left - GLYPH_MARGIN, left + width + GLYPH_MARGIN),
    )
    ink, glyph = ink[window], glyph[window]
    excess = ink - _INK_THRESHOLD
    slope = np.maximum(np.hypot(*np.gradient(ink)), 1e-6)
    edge = np.clip(0.5 + excess / slope, 0.0, 1.0)  # anti-aliased: one pixel wide
    pressure = np.clip(excess / (0.9 - _INK_THRESHOLD), 0.0, 1.0)
    tone = _FAINTEST_INK + (1.0 - _FAINTEST_INK) * pressure
    opacity = edge * tone * ndimage.binary_dilation(glyph, square)
    return _Glyph(opacity, ndimage.binary_fill_holes(glyph))


def _draw(
    canvas: NDArray[np.float64], glyphs: list[_Glyph], rng: np.random.Generator
) -> list[NDArray[np.bool_]] | None:
    """Draw the glyphs on ``canvas`` in place. Return their masks (S, S), or None if one does not
    fit."""
    from scipy import ndimage

    background = canvas.copy()
    taken = np.zeros(canvas.shape[:2], dtype=bool)  # masks and the margins around them
    masks: list[NDArray[np.bool_]] = []
    for glyph in glyphs:
        height, width = glyph.mask.shape
        if max(height, width) > len(canvas):
            return None
        for _ in range(_TRIES_PER_DIGIT):
            y, x = rng.integers(len(canvas) - np.array([height, width]) + 1)
            window = (slice(y, y + height), slice(x, x + width))
            if (taken[window] & glyph.mask).any():
                continue
            mask = np.zeros_like(taken)
            mask[window] = glyph.mask
            if any(_box_overlap(_box(mask), _box(other)) > _MAX_BOX_OVERLAP for other in masks):
                continue
            color = _choose_ink(background[window], rng)
            if color is None:
                continue
            canvas[window] += glyph.opacity[..., None] * (color - canvas[window])
            # The margin of the glyph has room for the dilation.
            square = np.ones((3, 3))
            taken[window] |= ndimage.binary_dilation(glyph.mask, square, iterations=GLYPH_MARGIN)
            masks.append(mask)
            break
        else:
            return None
    return masks


def _choose_ink(
    surface: NDArray[np.float64], rng: np.random.Generator
) -> NDArray[np.float64] | None:
    """Return a random colour (3,) that stands out from ``surface`` (H, W, 3); None if none
    would."""
    darkest, brightest = np.percentile(surface @ _LUMA, [5, 95])
    ranges = [(0.0, darkest - _MIN_CONTRAST), (brightest + _MIN_CONTRAST, 255.0)]
    ranges = [(low, high) for low, high in ranges if low < high]
    if not ranges:
        return None
    luma = rng.uniform(*ranges[rng.integers(len(ranges))])
    tint = rng.uniform(-1.0, 1.0, 3)
    tint -= _LUMA @ tint  # changes the hue and leaves the luma alone
    room = np.where(tint > 0, 255.0 - luma, luma) / np.maximum(np.abs(tint), 1e-6)
    return luma + rng.uniform(0.2, 1.0) * room.min() * tint


def _box(mask: NDArray[np.bool_]) -> tuple[int, int, int, int]:
    """Return left, top, width and height of a mask (H, W)."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    left, top = int(columns[0]), int(rows[0])
    return left, top, int(columns[-1]) + 1 - left, int(rows[-1]) + 1 - top


def _box_overlap(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> float:
    width = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    height = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    return max(width, 0) * max(height, 0) / min(a[2] * a[3], b[2] * b[3])


def _trace_outlines(mask: NDArray[np.bool_]) -> list[list[float]]:
    """Return polygons along the pixel edges around a mask (H, W) without holes."""
    steps = _outline_steps(mask)
    polygons = []
    while steps:
        position = next(iter(steps))
        dx, dy = 0, 0
        polygon: list[float] = []
        while position in steps:
            choices = steps[position]
            # Where two pixels touch by a corner, turning right stays with the same pixel.
            step = (-dy, dx) if (-dy, dx) in choices else next(iter(choices))
            choices.remove(step)
            if not choices:
                del steps[position]
            if step != (dx, dy):
                polygon += [float(position[0]), float(position[1])]
            dx, dy = step
            position = (position[0] + dx, position[1] + dy)
        polygons.append(polygon)
    return polygons


def _outline_steps(mask: NDArray[np.bool_]) -> dict[tuple[int, int], set[tuple[int, int]]]:
    """Return the steps (dx, dy) from corner to corner, clockwise, along the outer edges of a
    mask."""
    inside = np.pad(mask, 1)
    steps = defaultdict(set)
    for neighbor, corner, step in (  # above, right, below, left of a pixel
        (inside[:-2, 1:-1], (0, 0), (1, 0)),
        (inside[1:-1, 2:], (1, 0), (0, 1)),
        (inside[2:, 1:-1], (1, 1), (-1, 0)),
        (inside[1:-1, :-2], (0, 1), (0, -1)),
    ):
        for y, x in np.argwhere(mask & ~neighbor).tolist():
            steps[x + corner[0], y + corner[1]].add(step)
    return steps
