# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Records in Detectron2's format are checked once before a run. The check finds faults that would
end the run later, fill the memory, or spoil the results silently."""

from collections.abc import Iterable, Mapping
from math import inf, isfinite
from numbers import Real
from typing import Any

import numpy as np
from detectron2.structures import BoxMode
from PIL import Image

from ..errors import UserValueError
from ..words import counted
from .check.conventions import (
    COCO,
    Sample,
    find_conventions,
    find_polygon_convention,
    sample_of,
)
from .check.masks import find_rle_problem, has_mask

# The largest absolute value of a number, as a multiple of the longer side of its image. The memory
# for drawing a mask grows with the numbers of its polygons.
_REACH = 10
_UNKNOWN_SIDE = 100_000  # pixels, where a record does not say its size
_MAX_SAMPLES = 20_000

_HINT = (
    "tools/check_dataset.py lists all that is wrong with annotations in COCO's format, and writes "
    "a corrected copy."
)


def check_records(
    records: Iterable[Mapping[str, Any]],
    name: str,
    *,
    num_classes: int | None = None,
    masks: bool = False,
) -> None:
    """Check all objects of a data set.

    Args:
        records: the records of a data set, in Detectron2's format.
        name: the name of the data set, for messages.
        num_classes: the number of classes of the network; None if the number is not known.
        masks: True if the network learns masks.

    Raises:
        ValueError: a number is absurd or not finite, the network lacks a category, objects lack
            masks, or the boxes or polygons are in another format. The message counts the objects
            and names the first.
    """
    wrong: list[str] = []
    without_mask: list[str] = []
    count = objects = 0
    samples: list[Sample] = []
    for record in records:
        if problem := _absurd_size(record):
            raise UserValueError(f"Data set {name}: {_name_of(record)} has {problem}. {_HINT}")
        for index, annotation in enumerate(record.get("annotations", ())):
            objects += 1
            problem = find_absurd(annotation, record.get("width"), record.get("height"))
            if not problem and num_classes is not None:
                problem = _wrong_category(annotation.get("category_id", 0), num_classes)
            if problem:
                count += 1
                wrong = wrong or [f"object {index} of {_name_of(record)} has {problem}"]
            elif masks and not annotation.get("iscrowd", 0) and not has_mask(annotation):
                without_mask.append(f"object {index} of {_name_of(record)}")
            elif len(samples) < _MAX_SAMPLES and (sample := _sample(annotation, record)):
                samples.append(sample)
    if wrong:
        others = f" {count - 1} more objects have such faults." if count > 1 else ""
        raise UserValueError(f"Data set {name}: {wrong[0]}.{others} {_HINT}")
    if without_mask:
        raise UserValueError(
            f"Data set {name} has {counted(len(without_mask), 'objects')} of {objects} without a "
            f"mask ({without_mask[0]} is the first), and the network learns masks: leave them out "
            "(tools/check_dataset.py --masks --fix), choose a config of Faster R-CNN or RetinaNet, "
            "or set MODEL.MASK_ON False."
        )
    if convention := find_polygon_convention(samples):
        raise UserValueError(
            f"Data set {name}: its polygons are not x, y, ... in pixels, but {convention}. {_HINT}"
        )
    readings = find_conventions(samples)
    if readings != [COCO]:
        raise UserValueError(
            f"Data set {name}: its boxes are not x, y, width, height in pixels, but "
            f"{' or '.join(map(str, readings))} (for example {list(samples[0].box)} in an image "
            f"of {samples[0].size[0]} x {samples[0].size[1]}). {_HINT}"
        )


def _absurd_size(record: Mapping[str, Any]) -> str:
    """Return what is wrong with the size of a picture, or an empty string. Masks of this size are
    made later."""
    sides = [record[side] for side in ("width", "height") if side in record]
    for side in sides:
        whole = isinstance(side, Real) and not isinstance(side, bool) and side == side // 1
        if not whole or not side > 0:
            return f"a width or height of {side!r:.60}"
    most = 2 * (Image.MAX_IMAGE_PIXELS or inf)  # Pillow refuses larger pictures
    if len(sides) == 2 and sides[0] * sides[1] > most:
        return f"a size of {sides[0]:g} x {sides[1]:g} pixels, more than Pillow reads"
    return ""


def _wrong_category(category: Any, num_classes: int) -> str:
    if isinstance(category, int | np.integer) and 0 <= category < num_classes:
        return ""
    return f"category {category!r:.60}, where the network has {num_classes}"


def _name_of(record: Mapping[str, Any]) -> str:
    return str(record.get("file_name", record.get("image_id", "an image")))


def _sample(annotation: Mapping[str, Any], record: Mapping[str, Any]) -> Sample | None:
    in_coco = annotation.get("bbox_mode") == BoxMode.XYWH_ABS
    if not in_coco or "width" not in record or "height" not in record:
        return None
    known = {
        "bbox": list(annotation.get("bbox", ())),
        "segmentation": annotation.get("segmentation"),
    }
    return sample_of(known, (record["width"], record["height"]))


def find_absurd(annotation: Mapping[str, Any], width: int | None, height: int | None) -> str:
    """Return which number of an annotation is not finite, or is absurd for the size of its image.
    Return an empty string if there is no such number."""
    limit = _REACH * max(width or _UNKNOWN_SIDE, height or _UNKNOWN_SIDE)
    mask = annotation.get("segmentation")
    lists = [("bbox", annotation.get("bbox")), ("keypoints", annotation.get("keypoints"))]
    if isinstance(mask, Mapping):
        if width and height and (problem := find_rle_problem(mask, height, width)[1]):
            return f"RLE that cannot be used ({problem})"
    elif isinstance(mask, list | tuple):
        lists += [("a polygon", polygon) for polygon in mask]
    for kind, numbers in lists:
        if numbers is None:
            continue
        try:
            if len(numbers) == 0:
                continue
            total, least, most = float(sum(numbers)), float(min(numbers)), float(max(numbers))
        except (OverflowError, TypeError, ValueError):
            return f"{kind} with a value that is not a number: {numbers!r:.60}"
        if not isfinite(total):
            return f"{kind} with a number that is not finite"
        if not -limit <= least <= most <= limit:
            worst = most if abs(most) >= abs(least) else least
            image = f"an image of {width} x {height}" if width else "any image"
            return f"{kind} with the number {worst:g}, absurd in {image}"
    return ""
