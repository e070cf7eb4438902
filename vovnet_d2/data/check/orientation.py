# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""The annotations of a picture with an EXIF orientation fit the picture either as the file stores
it or after it is turned. This module finds out which, and turns annotations."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
from numpy.typing import NDArray
from PIL import Image

from ..image_file import TURNS, ImageHeader, read_image
from .masks import decode_counts, find_rle_problem
from .values import are_numbers, is_box

Box = Sequence[float]
_MIN_BOXES = 3
_MIN_SCORE = 3.0  # standard errors by which one reading must be better
_REACH = 2  # pixels to either side of a box's edge


@dataclass(frozen=True, kw_only=True)
class TurnedFile(ImageHeader):
    """A picture whose EXIF orientation is not 1.

    Attributes:
        path: the path of the file.
        given_size: width and height in the annotations; None if they have none.
        boxes: the boxes of objects in the annotations: x, y, width, height in pixels.
    """

    path: str = ""
    given_size: tuple[int, int] | None = None
    boxes: list[Box] = field(default_factory=list)


def judge(files: Iterable[TurnedFile]) -> dict[str, str]:
    """Say for each path whether the annotations are for the "stored" or the "turned" picture, or
    whether that is "unclear".

    If turning changes the size of a picture, the size in the annotations decides, unless only the
    other size holds all boxes. For all other files together, the edges of the boxes are compared
    with the pictures.
    """
    verdicts: dict[str, str] = {}
    silent: list[TurnedFile] = []
    for file in files:
        if file.stored_size != file.size and file.given_size in (file.stored_size, file.size):
            verdicts[file.path] = _judge_by_size(file)
        else:
            silent.append(file)
    readings: list[tuple[str, list[list[Box]]]] = [
        (f.path, [f.boxes, [turn_box(box, f) for box in f.boxes]]) for f in silent
    ]
    better = compare_readings(readings)
    verdict = {None: "unclear", 0: "turned", 1: "stored"}[better]
    return verdicts | {file.path: verdict for file in silent}


def _judge_by_size(file: TurnedFile) -> str:
    in_stored, in_turned = _fit(file.boxes, file.stored_size), _fit(file.boxes, file.size)
    if in_stored != in_turned:
        return "stored" if in_stored else "turned"
    return "stored" if file.given_size == file.stored_size else "turned"


def _fit(boxes: list[Box], size: tuple[int, int]) -> bool:
    width, height = size
    return all(x + w <= width + 1 and y + h <= height + 1 for x, y, w, h in boxes)


def compare_readings(files: Sequence[tuple[str, list[list[Box]]]]) -> int | None:
    """Find the reading of the boxes for which their edges lie where the pictures change.

    Args:
        files: paths, each with several readings of the same boxes.

    Returns:
        the index of the reading that is better than every other one by three standard errors. None
            if there is no such reading, or if there are fewer than three boxes.
    """
    scores: list[list[float]] = []
    for path, readings in files:
        if not readings[0]:
            continue
        try:
            grey = read_image(path, "L")[..., 0].astype(np.float32)
        except (FileNotFoundError, ValueError):
            continue
        for boxes in zip(*readings, strict=True):
            scores.append([_contrast(grey, box) for box in boxes])
    table = np.array(scores)
    if len(table) < _MIN_BOXES:
        return None
    best = int(table.mean(axis=0).argmax())
    for other in range(table.shape[1]):
        difference = table[:, best] - table[:, other]
        error = difference.std(ddof=1) / np.sqrt(len(difference))
        if other != best and not difference.mean() > _MIN_SCORE * error:
            return None
    return best


def _contrast(grey: NDArray[np.float32], box: Box) -> float:
    """Return the mean change of grey across the edges of a box, divided by the picture's own
    changes."""
    height, width = grey.shape
    x, y, w, h = box
    left, right = (int(np.clip(round(v), 0, width)) for v in (x, x + w))
    top, bottom = (int(np.clip(round(v), 0, height)) for v in (y, y + h))
    if right <= left or bottom <= top:
        return 0.0
    changes: list[float] = []
    for at, limit, lines in ((left, width, grey[top:bottom]), (right, width, grey[top:bottom]),
                             (top, height, grey[:, left:right].T),
                             (bottom, height, grey[:, left:right].T)):  # fmt: skip
        if _REACH <= at <= limit - _REACH:  # an edge at the border of the picture tells nothing
            before = lines[:, at - _REACH : at].mean(axis=1)
            changes.append(float(np.abs(lines[:, at : at + _REACH].mean(axis=1) - before).mean()))
    return float(np.mean(changes)) / (float(grey.std()) + 1e-3) if changes else 0.0


# Turning


def turn_box(box: Box, file: TurnedFile) -> list[float]:
    """Turn a box of the picture as it is stored into one of the picture as it is read."""
    x, y, w, h = box
    corners = _turn_points([x, y, x + w, y + h], file, file.stored_size)
    x1, x2 = sorted(corners[::2])
    y1, y2 = sorted(corners[1::2])
    return [x1, y1, x2 - x1, y2 - y1]


def _turn_points(points: list[float], file: TurnedFile, size: tuple[float, float]) -> list[float]:
    width, height = size
    turned: list[float] = []
    for x, y in zip(points[::2], points[1::2], strict=True):
        turned += {
            2: (width - x, y),
            3: (width - x, height - y),
            4: (x, height - y),
            5: (y, x),
            6: (height - y, x),
            7: (height - y, width - x),
            8: (y, width - x),
        }[file.orientation]
    return turned


def turn_annotation(annotation: dict[str, Any], file: TurnedFile) -> dict[str, Any]:
    """Turn an annotation along with its picture. Malformed parts stay as they are."""
    turned = dict(annotation)
    if is_box(box := annotation.get("bbox")):
        turned["bbox"] = turn_box(box, file)
    mask = annotation.get("segmentation")
    if isinstance(mask, list):
        turned["segmentation"] = [
            _turn_points(p, file, file.stored_size) if are_numbers(p) and len(p) % 2 == 0 else p
            for p in mask
        ]
    elif isinstance(mask, dict):
        turned["segmentation"] = _turn_rle(mask, file)
    points = annotation.get("keypoints")
    if are_numbers(points) and len(points) % 3 == 0:
        # Keypoints are indices of pixels.
        last = (file.stored_size[0] - 1, file.stored_size[1] - 1)
        triples = [points[i : i + 3] for i in range(0, len(points), 3)]
        turned["keypoints"] = [
            number
            for x, y, seen in triples
            for number in (*(_turn_points([x, y], file, last) if seen else (x, y)), seen)
        ]
    return turned


def _turn_rle(rle: dict[str, Any], file: TurnedFile) -> dict[str, Any]:
    width, height = file.stored_size
    if find_rle_problem(rle, height, width)[0]:
        return rle
    counts = decode_counts(rle["counts"])
    flat = np.repeat(np.arange(len(counts)) % 2, counts).astype(np.uint8)
    mask = flat.reshape(width, height).T
    turned = np.asarray(Image.fromarray(mask).transpose(TURNS[file.orientation]))
    encoded = mask_util.encode(np.asfortranarray(turned))
    return {"size": list(turned.shape), "counts": encoded["counts"].decode()}
