# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Polygons and run-length encodings are checked before pycocotools reads them. pycocotools reads
outside its memory if they are malformed."""

from collections.abc import Mapping, Sequence
from itertools import chain
from numbers import Integral
from typing import Any

import numpy as np
import pycocotools.mask as mask_util

from ...errors import UserValueError
from .problems import Findings
from .values import are_numbers, is_whole

Mask = list[list[float]] | dict[str, Any]

TOLERANCE = 1.0
"""The number of pixels by which rounding may move a box or polygon beyond the image."""


def is_empty_mask(value: Any) -> bool:
    """Return True if a ``segmentation`` is empty: ``null``, ``[]``, ``[[]]``, ``{}``, ..."""
    if isinstance(value, list):
        return all(isinstance(polygon, list) and not polygon for polygon in value)
    return value is None or value in ({}, "")


def has_mask(annotation: Mapping[str, Any]) -> bool:
    """Return True if Detectron2 finds a mask in an annotation: RLE, or a polygon of three
    points."""
    mask = annotation.get("segmentation")
    if isinstance(mask, Mapping):
        return bool(mask)
    if isinstance(mask, np.ndarray) and mask.ndim == 2:  # a bitmask, which Detectron2 takes too
        return True
    if not isinstance(mask, Sequence | np.ndarray):
        return False
    return any(
        isinstance(p, list | tuple | np.ndarray) and len(p) >= 6 and len(p) % 2 == 0 for p in mask
    )


def is_box_mask(mask: Any, box: Sequence[float]) -> bool:
    """Return True if a mask, polygons or RLE, is a rectangle and so tells no more than its box."""
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
    """Repair the "segmentation" of an annotation, which is not empty, and note its problems. Return
    the part of the value that is a mask of the image; None if no part is."""
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
    kept = [p for p in clipped if min(box_of([p])[2:]) > 0]
    if polygons and not kept:
        findings.add("empty_mask", where)
    return kept or None


def _are_points(value: Any) -> bool:
    """Return True if a value is a polygon whose points are lists of two numbers each."""
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
    problem, sentence = find_rle_problem(rle, height, width)
    if problem:
        findings.add(problem, f"{where}: {sentence}")
        return None
    if not any(decode_counts(rle["counts"])[1::2]):
        findings.add("empty_mask", where)
        return None
    return {"size": rle["size"], "counts": rle["counts"]}


def find_rle_problem(rle: Mapping[str, Any], height: int, width: int) -> tuple[str, str]:
    """Return why an RLE cannot be the mask of an object in an image of this size: a key of
    :data:`PROBLEMS`, and the fault in words. Both are empty if the RLE can be used."""
    size = rle.get("size")
    if not (
        isinstance(size, list | tuple)
        and len(size) == 2
        and all(isinstance(n, Integral) for n in size)
    ):
        return "rle", f'"size" is {size!r:.40}'
    if list(size) != [height, width]:
        return "rle_size", f"size {list(size)} in an image of {[height, width]}"
    try:
        pixels = sum(decode_counts(rle.get("counts")))
    except ValueError as error:
        return "rle", str(error)
    if pixels != height * width:
        return "rle", f"{pixels} pixels in an image of {height * width}"
    return "", ""


def decode_counts(counts: Any) -> list[int]:
    """Return the runs of an RLE, which is a list of numbers or COCO's compressed text.

    The text holds the runs one after another. From the fourth run on it holds the difference to the
    run before the previous one. Each number is written in groups of five bits, the lowest first. A
    character is 48 plus the group, plus 32 if more groups follow. The highest bit of the last group
    is the sign.

    Raises:
        ValueError: ``counts`` is neither, or a run is negative.
    """
    if isinstance(counts, bytes):  # as pycocotools gives the text
        counts = counts.decode()
    if isinstance(counts, list):
        if not all(map(is_whole, counts)) or any(run < 0 for run in counts):
            raise UserValueError("runs that are not whole numbers from 0 on")
        return counts
    if not isinstance(counts, str):
        raise UserValueError(f'"counts" is a {type(counts).__name__}')
    runs: list[int] = []
    value = shift = 0
    for character in counts:
        group = ord(character) - 48
        if not 0 <= group < 64 or shift > 60:
            raise UserValueError(f"{character!r} is not part of a compressed RLE")
        value |= (group & 31) << shift
        shift += 5
        if group & 32:
            continue
        if group & 16:
            value -= 1 << shift
        if len(runs) > 2:
            value += runs[-2]
        if value < 0:
            raise UserValueError("a run below 0")
        runs.append(value)
        value = shift = 0
    if shift:
        raise UserValueError("a compressed RLE that ends within a run")
    return runs


def mask_box(mask: Mask, height: int, width: int) -> list[float]:
    """Return the tight box of a mask as x, y, width, height."""
    if isinstance(mask, list):
        return box_of(mask)
    return mask_util.toBbox(_encode(mask, height, width)).tolist()


def mask_area(mask: Mask, height: int, width: int) -> float:
    """Return the number of pixels."""
    return float(mask_util.area(_encode(mask, height, width)))


def _encode(mask: Mask, height: int, width: int) -> dict[str, Any]:
    if isinstance(mask, list):
        return mask_util.merge(mask_util.frPyObjects(mask, height, width))
    counts = decode_counts(mask["counts"])
    return mask_util.frPyObjects({"size": [height, width], "counts": counts}, height, width)


def box_of(polygons: list[list[float]]) -> list[float]:
    """Return the tight box of polygons as x, y, width, height."""
    xs = [x for polygon in polygons for x in polygon[::2]]
    ys = [y for polygon in polygons for y in polygon[1::2]]
    return [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]
