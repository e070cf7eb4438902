# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""The embedded digits data set: a small COCO-format detection set that needs no download.

Real handwritten digits (scikit-learn's ``load_digits``: 1,797 scans of 8x8 cells) are enlarged
smoothly and written over crops of scikit-learn's two photographs. Ten categories, boxes and
masks. It stands in for COCO where COCO is not at hand: to try an installation, a recipe or a
change of code within minutes. It says nothing about a network's accuracy on photographs.

What an annotation means:

* **Mask**: the glyph's outer contour, filled, one polygon per connected part. COCO's polygons
  cannot hold holes, so the inside of a 0, 6, 8 or 9 belongs to the mask. The polygons run along
  the edges of pixels: rasterised by pycocotools they give the mask back exactly.
* **Box**: tight around the mask, ``XYWH``, as ``pycocotools.mask.toBbox`` has it.
* **Area**: the box's, not the mask's. A glyph fills about half of its box, so by the area of
  masks no digit would ever be "large" in COCO's sense and AP by size would lack a third.

Glyphs do not hide one another: every mask is visible as a whole.
"""

import functools
import json
import math
import os
import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["CLASS_NAMES", "build_digits", "digit_split", "register_digits"]

CLASS_NAMES = tuple("0123456789")

# To be raised with every change that alters a pixel or an annotation: it makes users' copies
# rebuild themselves.
_VERSION = 1

_NUM_DIGITS = 1797  # in scikit-learn's load_digits
_NUM_VAL_DIGITS = 360

# The parts of each photograph's width that a split's backgrounds are cut from; the gap between
# them keeps an object at the border out of one of the two.
_PHOTO_REGIONS = {"train": (0.0, 0.66), "val": (0.69, 1.0)}
_CROP_SIDES = (112, 192)  # pixels of the photograph that become one canvas

_INK_THRESHOLD = 0.4  # of a cell's full ink: where paper ends and glyph begins
_FAINTEST_INK = 0.65  # opacity at the threshold; it rises to 1 where the pen pressed hardest
_GLYPH_MARGIN = 2  # pixels around a glyph that no other glyph may enter
_MAX_BOX_IOU = 0.1
_MIN_CONTRAST = 90.0  # grey levels between full ink and 90 % of the background around it
_LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601

_TRIES_PER_DIGIT = 40
_TRIES_PER_IMAGE = 500


class _Sources(NamedTuple):
    """scikit-learn's data: scans (1797, 8, 8) in [0, 1], labels (1797,), RGB photographs."""

    scans: NDArray[np.float64]
    labels: NDArray[np.int64]
    photographs: list[NDArray[np.uint8]]


class _Glyph(NamedTuple):
    """A digit ready to be drawn, both arrays (H, W) with ``_GLYPH_MARGIN`` on every side."""

    opacity: NDArray[np.float64]
    mask: NDArray[np.bool_]


def digit_split() -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Indices into ``sklearn.datasets.load_digits`` of the training and the validation digits.

    The split is random and always the same, whatever the seed of a build, so that a classifier
    trained on the first part has not seen a digit of the validation images.
    """
    order = np.random.default_rng(1797).permutation(_NUM_DIGITS)
    return np.sort(order[_NUM_VAL_DIGITS:]), np.sort(order[:_NUM_VAL_DIGITS])


def build_digits(
    root: str | os.PathLike[str],
    *,
    num_train: int = 1000,
    num_val: int = 200,
    image_size: int = 192,
    digits_per_image: tuple[int, int] = (2, 5),
    digit_size: tuple[int, int] = (16, 112),
    seed: int = 0,
) -> Path:
    """Make the data set under ``root/digits`` unless it is there already.

    It holds ``train/*.png``, ``val/*.png`` and ``annotations/instances_{train,val}.json``. The
    same arguments give the same pixels; image *i* of a split depends on neither the number of
    images nor the other images. A data set made with other arguments is replaced. Several
    processes may call this at once: one builds, the others wait. The folder appears under its
    name only when it is complete.

    Args:
        root: folder of data sets, made if missing.
        num_train, num_val: images per split.
        image_size: side of the square images, in pixels.
        digits_per_image: least and greatest number of digits in an image, drawn uniformly.
        digit_size: least and greatest height of a glyph's box in pixels, drawn log-uniformly.
        seed: of everything but the split of the digits, see :func:`digit_split`.

    Returns:
        ``root/digits``.

    Raises:
        ValueError: an argument is out of range, the digits do not fit on the image, or ``root``
            cannot be written to.
    """
    parameters = {
        "version": _VERSION,
        "num_train": num_train,
        "num_val": num_val,
        "image_size": image_size,
        "digits_per_image": list(digits_per_image),
        "digit_size": list(digit_size),
        "seed": seed,
    }
    _check_parameters(parameters)
    target = Path(root) / "digits"
    if _is_current(target, parameters):
        return target
    from iopath.common.file_io import file_lock

    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with file_lock(str(target)):
            if not _is_current(target, parameters):
                _replace(target, parameters)
    except OSError as error:
        raise ValueError(
            f"Cannot write the digits data set to '{target}' ({error.strerror or error}): "
            "set DETECTRON2_DATASETS to a folder that can be written to."
        ) from error
    return target


def register_digits() -> None:
    """Register ``digits_train`` and ``digits_val`` with Detectron2; a second call does nothing.

    The data set lies under ``$DETECTRON2_DATASETS`` (default ``./datasets``, as for Detectron2's
    own) and is built when one of the two is first loaded.
    """
    from detectron2.data import DatasetCatalog, MetadataCatalog

    root = Path(os.environ.get("DETECTRON2_DATASETS", "datasets")).expanduser()
    for split in _PHOTO_REGIONS:
        name = f"digits_{split}"
        if name in DatasetCatalog:
            continue
        MetadataCatalog.get(name).set(
            thing_classes=list(CLASS_NAMES),
            evaluator_type="coco",
            json_file=str(root / "digits" / "annotations" / f"instances_{split}.json"),
            image_root=str(root / "digits" / split),
        )
        DatasetCatalog.register(name, functools.partial(_load_registered, name, root))


def _load_registered(name: str, root: Path) -> list[dict[str, Any]]:
    from detectron2.data import MetadataCatalog
    from detectron2.data.datasets import load_coco_json

    build_digits(root)
    metadata = MetadataCatalog.get(name)
    return load_coco_json(metadata.json_file, metadata.image_root, name)


# The data set on disk


def _check_parameters(parameters: dict[str, Any]) -> None:
    for name in ("num_train", "num_val"):
        if parameters[name] < 1:
            raise ValueError(f"{name} must be at least 1, not {parameters[name]}.")
    fewest, most = parameters["digits_per_image"]
    if not 1 <= fewest <= most:
        raise ValueError(
            f"digits_per_image must be two numbers (least, greatest) of at least 1, "
            f"not ({fewest}, {most})."
        )
    smallest, largest = parameters["digit_size"]
    limit = parameters["image_size"] - 2 * _GLYPH_MARGIN
    if not 8 <= smallest <= largest <= limit:
        raise ValueError(
            f"digit_size must be two heights (least, greatest) from 8 to {limit} pixels on images "
            f"of {parameters['image_size']} pixels, not ({smallest}, {largest})."
        )


def _is_current(target: Path, parameters: dict[str, Any]) -> bool:
    try:
        return json.loads((target / "parameters.json").read_text()) == parameters
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError):
        return False


def _replace(target: Path, parameters: dict[str, Any]) -> None:
    """Build beside ``target`` and put the result in its place; the caller holds the lock."""
    partial = target.with_name(".digits.partial")
    shutil.rmtree(partial, ignore_errors=True)  # what a killed build left behind
    try:
        _write(partial, parameters)
        if target.exists():
            # Without this file a folder does not count, should the removal be interrupted.
            (target / "parameters.json").unlink(missing_ok=True)
            shutil.rmtree(target)
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write(folder: Path, parameters: dict[str, Any]) -> None:
    from PIL import Image
    from tqdm import tqdm

    sources = _load_sources()
    counts = {"train": parameters["num_train"], "val": parameters["num_val"]}
    (folder / "annotations").mkdir(parents=True)
    with tqdm(
        total=sum(counts.values()), desc="Building the digits data set", unit="image", delay=2
    ) as progress:
        for split, count in counts.items():
            (folder / split).mkdir()
            images: list[dict[str, Any]] = []
            annotations: list[dict[str, Any]] = []
            for index in range(count):
                pixels, digits = _make_image(sources, split, index, parameters)
                file_name = f"{index:06d}.png"
                Image.fromarray(pixels).save(folder / split / file_name)
                height, width = pixels.shape[:2]
                # Numbers start from 1: pycocotools takes an annotation 0 for a missing one.
                image_id = index + 1
                images.append(
                    {"id": image_id, "file_name": file_name, "height": height, "width": width}
                )
                for digit in digits:
                    annotations.append({"id": len(annotations) + 1, "image_id": image_id, **digit})
                progress.update()
            content = {
                "info": {"description": "Handwritten digits on photographs", "version": _VERSION},
                "licenses": [],
                "categories": [
                    {"id": label + 1, "name": name, "supercategory": "digit"}
                    for label, name in enumerate(CLASS_NAMES)
                ],
                "images": images,
                "annotations": annotations,
            }
            path = folder / "annotations" / f"instances_{split}.json"
            path.write_text(json.dumps(content))
    (folder / "parameters.json").write_text(json.dumps(parameters, indent=2) + "\n")


# One image


def _load_sources() -> _Sources:
    try:
        from sklearn.datasets import load_digits, load_sample_images
    except ImportError as error:
        raise ImportError(
            "The digits data set is made of scikit-learn's data: pip install scikit-learn"
        ) from error
    digits = load_digits()
    return _Sources(digits.images / 16.0, digits.target, list(load_sample_images().images))


def _make_image(
    sources: _Sources, split: str, index: int, parameters: dict[str, Any]
) -> tuple[NDArray[np.uint8], list[dict[str, Any]]]:
    """Pixels (S, S, 3) in RGB and the annotations, ids aside."""
    train_digits, val_digits = digit_split()
    candidates = {"train": train_digits, "val": val_digits}[split]
    rng = np.random.default_rng([parameters["seed"], list(_PHOTO_REGIONS).index(split), index])
    fewest, most = parameters["digits_per_image"]
    count = int(rng.integers(fewest, most + 1))
    smallest, largest = parameters["digit_size"]
    for _ in range(_TRIES_PER_IMAGE):
        chosen = rng.choice(candidates, count)
        # The large ones first: they find a place only while there is room.
        heights = np.sort(np.exp(rng.uniform(math.log(smallest), math.log(largest), count)))[::-1]
        glyphs = [
            _make_glyph(sources.scans[digit], height, rng)
            for digit, height in zip(chosen, heights, strict=True)
        ]
        canvas = _make_background(sources.photographs, split, parameters["image_size"], rng)
        masks = _draw(canvas, glyphs, rng)
        if masks is not None:
            annotations = [
                _annotate(mask, int(sources.labels[digit]))
                for mask, digit in zip(masks, chosen, strict=True)
            ]
            return np.rint(canvas).astype(np.uint8), annotations
    raise ValueError(
        f"{count} digits of {smallest} to {largest} pixels do not fit on an image of "
        f"{parameters['image_size']} pixels: lower digits_per_image or digit_size, or raise "
        "image_size."
    )


def _photo_crop(
    split: str, height: int, width: int, rng: np.random.Generator
) -> tuple[int, int, int]:
    """Left, top and side in pixels of a square within the split's part of a photograph."""
    left, right = (round(fraction * width) for fraction in _PHOTO_REGIONS[split])
    side = int(rng.integers(_CROP_SIDES[0], _CROP_SIDES[1] + 1))
    return (
        int(rng.integers(left, right - side + 1)),
        int(rng.integers(0, height - side + 1)),
        side,
    )


def _make_background(
    photographs: list[NDArray[np.uint8]], split: str, image_size: int, rng: np.random.Generator
) -> NDArray[np.float64]:
    """A piece of a photograph as (S, S, 3) in [0, 255], mirrored at times, paler than the original."""
    from PIL import Image

    photo = photographs[rng.integers(len(photographs))]
    x, y, side = _photo_crop(split, *photo.shape[:2], rng)
    # Cut before the resizing, whose filter would reach beyond the crop.
    crop = Image.fromarray(photo[y : y + side, x : x + side])
    pixels = np.asarray(crop.resize((image_size, image_size), Image.Resampling.BICUBIC), float)
    if rng.random() < 0.5:
        pixels = pixels[:, ::-1]
    mean = pixels.mean()
    return np.clip(
        mean + rng.uniform(-30, 30) + rng.uniform(0.4, 0.8) * (pixels - mean), 0.0, 255.0
    )


def _make_glyph(scan: NDArray[np.float64], height: float, rng: np.random.Generator) -> _Glyph:
    """Enlarge a scan (8, 8) to a glyph about ``height`` pixels high, slightly deformed."""
    from scipy import ndimage

    # A cell of a scan is the mean over its pen stroke; sharpening opens narrow loops again.
    cells = np.pad(scan, 4)
    cells = cells + (cells - ndimage.gaussian_filter(cells, 0.8, mode="constant"))
    angle = rng.uniform(-0.2, 0.2)
    shear = rng.uniform(-0.15, 0.15)
    widening = rng.uniform(1.0, 1.5)  # scans are squeezed: their digits are narrow
    rotation = np.array(
        [[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]]
    )
    to_pixels = rotation @ np.array([[1.0, 0.0], [shear, widening]])  # (y, x) of cells to pixels

    coarse = 8.0  # pixels per cell, to measure how high the deformed glyph comes out
    rows = np.flatnonzero((_resample(cells, coarse * to_pixels) >= _INK_THRESHOLD).any(axis=1))
    scale = coarse * height / (rows[-1] - rows[0] + 1)
    ink = _resample(cells, scale * to_pixels)
    return _ink_to_glyph(ink)


def _resample(cells: NDArray[np.float64], to_pixels: NDArray[np.float64]) -> NDArray[np.float64]:
    """Cubic spline through ``cells`` (N, N), taken at the pixels of the deformed grid."""
    from scipy import ndimage

    center = (len(cells) - 1) / 2
    reach = center * np.abs(to_pixels).sum(axis=1)
    to_cells = np.linalg.inv(to_pixels)
    shape = 2 * np.ceil(reach).astype(int)
    offset = center - to_cells @ ((shape - 1) / 2)
    return ndimage.affine_transform(cells, to_cells, offset, tuple(shape), order=3)


def _ink_to_glyph(ink: NDArray[np.float64]) -> _Glyph:
    from scipy import ndimage

    parts, count = ndimage.label(ink >= _INK_THRESHOLD, structure=np.ones((3, 3)))
    sizes = np.bincount(parts.ravel(), minlength=count + 1)[1:]
    glyph = np.isin(parts, 1 + np.flatnonzero(sizes >= 0.1 * sizes.max()))  # leaves specks out
    (rows, columns), *_ = ndimage.find_objects(glyph.astype(int))
    window = tuple(
        slice(side.start - _GLYPH_MARGIN, side.stop + _GLYPH_MARGIN) for side in (rows, columns)
    )
    ink, glyph = ink[window], glyph[window]
    above = ink - _INK_THRESHOLD
    slope = np.maximum(np.hypot(*np.gradient(ink)), 1e-6)
    edge = np.clip(0.5 + above / slope, 0.0, 1.0)  # anti-aliased: one pixel wide
    pressure = np.clip(above / (0.9 - _INK_THRESHOLD), 0.0, 1.0)
    tone = _FAINTEST_INK + (1.0 - _FAINTEST_INK) * pressure
    opacity = edge * tone * ndimage.binary_dilation(glyph, np.ones((3, 3)))
    return _Glyph(opacity, ndimage.binary_fill_holes(glyph))


def _draw(
    canvas: NDArray[np.float64], glyphs: list[_Glyph], rng: np.random.Generator
) -> list[NDArray[np.bool_]] | None:
    """Write the glyphs on ``canvas`` in place; their masks (S, S), or None if one found no room."""
    from scipy import ndimage

    background = canvas.copy()
    taken = np.zeros(canvas.shape[:2], dtype=bool)
    masks: list[NDArray[np.bool_]] = []
    for glyph in glyphs:
        height, width = glyph.mask.shape
        if height > len(canvas) or width > len(canvas):
            return None
        surroundings = ndimage.binary_dilation(glyph.mask, iterations=_GLYPH_MARGIN)
        for _ in range(_TRIES_PER_DIGIT):
            y = int(rng.integers(len(canvas) - height + 1))
            x = int(rng.integers(len(canvas) - width + 1))
            window = (slice(y, y + height), slice(x, x + width))
            mask = np.zeros_like(taken)
            mask[window] = glyph.mask
            if (taken[window] & surroundings).any():
                continue
            if any(_box_iou(_box(mask), _box(other)) > _MAX_BOX_IOU for other in masks):
                continue
            color = _choose_ink(background[window], rng)
            if color is None:
                continue
            opacity = glyph.opacity[..., None]
            canvas[window] += opacity * (color - canvas[window])
            taken |= mask
            masks.append(mask)
            break
        else:
            return None
    return masks


def _choose_ink(
    surface: NDArray[np.float64], rng: np.random.Generator
) -> NDArray[np.float64] | None:
    """A random colour (3,) that stands out from ``surface`` (H, W, 3); None if none would."""
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
    """Left, top, width and height of a mask (H, W)."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    left, top = int(columns[0]), int(rows[0])
    return left, top, int(columns[-1]) + 1 - left, int(rows[-1]) + 1 - top


def _box_iou(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> float:
    width = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    height = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    shared = max(width, 0) * max(height, 0)
    return shared / (a[2] * a[3] + b[2] * b[3] - shared)


def _annotate(mask: NDArray[np.bool_], label: int) -> dict[str, Any]:
    left, top, width, height = _box(mask)
    return {
        "category_id": label + 1,
        # Floats throughout: Detectron2 scales a polygon of integers in place, in integers.
        "bbox": [float(left), float(top), float(width), float(height)],
        "area": float(width * height),
        "segmentation": _trace_outlines(mask),
        "iscrowd": 0,
    }


def _trace_outlines(mask: NDArray[np.bool_]) -> list[list[float]]:
    """Polygons ``[x0, y0, x1, y1, ...]`` along the pixels' edges around a mask without holes."""
    padded = np.pad(mask, 1)
    steps: dict[tuple[int, int], set[tuple[int, int]]] = defaultdict(set)
    # Each side of a pixel that faces the outside is a step, clockwise around the pixel.
    for (outside_y, outside_x), start, step in (
        ((-1, 0), (0, 0), (1, 0)),
        ((0, 1), (1, 0), (0, 1)),
        ((1, 0), (1, 1), (-1, 0)),
        ((0, -1), (0, 1), (0, -1)),
    ):
        outside = ~np.roll(padded, (-outside_y, -outside_x), (0, 1))[1:-1, 1:-1]
        for y, x in np.argwhere(mask & outside).tolist():
            steps[x + start[0], y + start[1]].add(step)

    polygons = []
    while steps:
        first = position = next(iter(steps))
        dx, dy = next(iter(steps[first]))
        corners: list[float] = []
        while position in steps:
            choices = steps[position]
            # Where two pixels touch by a corner, turning right stays with the same pixel.
            step = (-dy, dx) if (-dy, dx) in choices else next(iter(choices))
            choices.remove(step)
            if not choices:
                del steps[position]
            if step != (dx, dy) or not corners:
                corners += [float(position[0]), float(position[1])]
            dx, dy = step
            position = (position[0] + dx, position[1] + dy)
        polygons.append(corners)
    return polygons
