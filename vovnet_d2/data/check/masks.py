# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Polygons and run-length encodings, checked before pycocotools sees them: malformed ones make it
read beyond its memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
import pycocotools.mask as mask_util

from .problems import Findings
from .values import are_numbers, is_whole

__all__ = [
    "Mask",
    "decode_counts",
    "has_mask",
    "is_box_mask",
    "is_empty_mask",
    "mask_area",
    "mask_box",
    "repair_mask",
]

Mask = list[list[float]] | dict[str, Any]

TOLERANCE = 1.0
"""By how many pixels boxes and polygons may reach beyond the image: roundings do."""


def is_empty_mask(value: Any) -> bool:
    """Whether a ``segmentation`` is there only in name: ``null``, ``[]``, ``[[]]``, ``{}``, ..."""
    if isinstance(value, list):
        return all(isinstance(polygon, list) and not polygon for polygon in value)
    return value is None or value in ({}, "")


def has_mask(annotation: Mapping[str, Any]) -> bool:
    """Whether Detectron2 finds a mask in an annotation: RLE, or a polygon of three points."""
    mask = annotation.get("segmentation")
    if isinstance(mask, Mapping):
        return bool(mask)
    if isinstance(mask, np.ndarray) and mask.ndim == 2:  # pixels, as Detectron2 takes them
        return True
    if not isinstance(mask, Sequence | np.ndarray):
        return False
    return any(
        isinstance(p, list | tuple | np.ndarray) and len(p) >= 6 and len(p) % 2 == 0 for p in mask
    )


def is_box_mask(mask: Any, box: Sequence[float]) -> bool:
    """Return whether a mask, polygons or RLE, is a rectangle and so says no more than its box."""
    if isinstance(mask, Mapping):
        try:
            runs = decode_counts(mask.get("counts"))
        except ValueError:
            return False
        return sum(runs[1::2]) >= round(box[2]) * round(box[3])
    if len(mask) != 1 or not are_numbers(mask[0]) or len(mask[0]) % 2:
        return False
    xs, ys = mask[0][::2], mask[0][1::2]
    corners = set(zip(xs, ys, strict=True))
    return len(corners) == 4 and len(set(xs)) == 2 and len(set(ys)) == 2


def repair_mask(value: Any, height: int, width: int, where: str, findings: Findings) -> Mask | None:
    """
    Args:
        value: an annotation's ``segmentation``, which is there.
        where: the annotation, in words.

    Returns:
        what of it is a mask of that image; None if nothing is.
    """
    if isinstance(value, dict):
        return _repair_rle(value, height, width, where, findings)
    if not isinstance(value, list):
        findings.add("segmentation", f"{where}: a {type(value).__name__}")
        return None
    if are_numbers(value):
        findings.add("flat_polygon", where)
        value = [value]
    else:
        polygons = [value] if _are_points(value) else value
        if any(map(_are_points, polygons)):
            findings.add("flat_polygon", f"{where}: points in lists of their own")
            value = [list(chain(*p)) if _are_points(p) else p for p in polygons]
    polygons = [p for p in value if _is_polygon(p, where, findings)]
    clipped = [_clip(p, height, width) for p in polygons]
    reach = [np.abs(np.subtract(p, c)).max() for p, c in zip(polygons, clipped, strict=True)]
    if any(distance > TOLERANCE for distance in reach):
        findings.add("polygon_outside", f"{where}: by {max(reach):.1f} pixels")
    else:
        clipped = polygons
    kept = [p for p in clipped if min(_box([p])[2:]) > 0]
    if polygons and not kept:
        findings.add("empty_mask", where)
    return kept or None


def _are_points(value: Any) -> bool:
    """Return whether a value is a polygon whose points are lists of two numbers each."""
    return (
        isinstance(value, list)
        and len(value) > 0
        and all(are_numbers(point) and len(point) == 2 for point in value)
    )


def _is_polygon(value: Any, where: str, findings: Findings) -> bool:
    if not are_numbers(value):
        findings.add("polygon_numbers", where)
        return False
    if len(value) % 2 or len(value) < 6:
        findings.add("polygon", f"{where}: {len(value)} numbers")
        return False
    return True


def _clip(polygon: list[float], height: int, width: int) -> list[float]:
    points = np.clip(np.reshape(polygon, (-1, 2)), 0, (width, height))
    return points.reshape(-1).tolist()


def _repair_rle(
    rle: dict[str, Any], height: int, width: int, where: str, findings: Findings
) -> Mask | None:
    size = rle.get("size")
    if not (isinstance(size, list) and len(size) == 2 and all(map(is_whole, size))):
        findings.add("rle", f'{where}: "size" is {size!r:.40}')
        return None
    if size != [height, width]:
        findings.add("rle_size", f"{where}: {size} in an image of {[height, width]}")
        return None
    try:
        counts = decode_counts(rle.get("counts"))
    except ValueError as error:
        findings.add("rle", f"{where}: {error}")
        return None
    if sum(counts) != height * width:
        findings.add("rle", f"{where}: {sum(counts)} pixels in an image of {height * width}")
        return None
    if not any(counts[1::2]):
        findings.add("empty_mask", where)
        return None
    return {"size": size, "counts": rle["counts"]}


def decode_counts(counts: Any) -> list[int]:
    """The runs of an RLE, written as numbers or in COCO's compressed text.

    That text holds each run, from the fourth on its difference to the last but one, in groups of
    five bits from the lowest up: a character is 48 plus the group, plus 32 if more follow; the
    highest bit of the last group is the sign.

    Raises:
        ValueError: it is neither, or a run is negative.
    """
    if isinstance(counts, list):
        if not all(map(is_whole, counts)) or any(run < 0 for run in counts):
            raise ValueError("runs that are no whole numbers from 0 on")
        return counts
    if not isinstance(counts, str):
        raise ValueError(f'"counts" is a {type(counts).__name__}')
    runs: list[int] = []
    value = shift = 0
    for character in counts:
        group = ord(character) - 48
        if not 0 <= group < 64 or shift > 60:
            raise ValueError(f"{character!r} is no part of a compressed RLE")
        value |= (group & 31) << shift
        shift += 5
        if group & 32:
            continue
        if group & 16:
            value -= 1 << shift
        if len(runs) > 2:
            value += runs[-2]
        if value < 0:
            raise ValueError("a run below 0")
        runs.append(value)
        value = shift = 0
    if shift:
        raise ValueError("a compressed RLE that ends within a run")
    return runs


def mask_box(mask: Mask, height: int, width: int) -> list[float]:
    """The tight box as x, y, width, height."""
    if isinstance(mask, list):
        return _box(mask)
    return mask_util.toBbox(_encode(mask, height, width)).tolist()


def mask_area(mask: Mask, height: int, width: int) -> float:
    """The number of pixels."""
    return float(mask_util.area(_encode(mask, height, width)))


def _encode(mask: Mask, height: int, width: int) -> dict[str, Any]:
    if isinstance(mask, list):
        return mask_util.merge(mask_util.frPyObjects(mask, height, width))
    counts = decode_counts(mask["counts"])
    return mask_util.frPyObjects({"size": [height, width], "counts": counts}, height, width)


def _box(polygons: list[list[float]]) -> list[float]:
    xs = [x for polygon in polygons for x in polygon[::2]]
    ys = [y for polygon in polygons for y in polygon[1::2]]
    return [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]
