# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Pictures of single images: what is annotated beside what was predicted.

Masks are part of the picture; boxes, keypoints and labels go over it as SVG, which stays sharp and
has every script that the browser has. Detectron2's Visualizer draws all into pixels.
"""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..data.check.masks import has_mask
from ..data.image_file import read_image
from .detections import Detections
from .matching import Annotation, ImageMatches

__all__ = ["Mark", "Picture", "Tile", "draw_tile"]

# The longer side of a picture in its own units, and the height of its labels in them.
_LONG_SIDE, _LABEL = 560, 22
_QUALITY = 82
_OPACITY = 0.4  # of masks

# As in the curves, told apart by those who do not see all colours; the style sheet has them too,
# and labels say the same in words.
_COLORS = {"correct": (0, 158, 115), "confused": (240, 228, 66), "alone": (213, 94, 0)}


@dataclass(frozen=True)
class Mark:
    """An object or a prediction, in the units of its picture.

    Attributes:
        kind: "correct", "confused" (the class is another) or "alone" (without a match).
        box: X, Y, W, H.
        label_place: X, Y of the start of the label's baseline.
        points: visible keypoints, X and Y each.
    """

    kind: str
    label: str
    box: tuple[float, float, float, float]
    label_place: tuple[float, float]
    points: list[tuple[float, float]]


@dataclass(frozen=True)
class Picture:
    """
    Attributes:
        uri: a JPEG picture as a data URI, with masks.
        width, height: of the area that ``marks`` are placed in.
    """

    uri: str
    width: float
    height: float
    marks: list[Mark]


@dataclass(frozen=True)
class Tile:
    """
    Attributes:
        name: of the image's file.
        truth, predicted: None if the image cannot be read.
    """

    name: str
    truth: Picture | None
    predicted: Picture | None
    matches: ImageMatches


def draw_tile(detections: Detections, matches: ImageMatches) -> Tile:
    path = detections.image_files.get(matches.image_id, f"image {matches.image_id}")
    name = os.path.basename(path)
    try:
        image = read_image(path, "RGB")
    except (FileNotFoundError, ValueError):
        return Tile(name, None, None, matches)
    found = dict(matches.pairs)
    sought = {j: i for i, j in matches.pairs}
    truth = _draw(detections, image, matches.objects, found, matches.predictions)
    predicted = _draw(detections, image, matches.predictions, sought, matches.objects)
    return Tile(name, truth, predicted, matches)


def _draw(
    detections: Detections,
    image: NDArray[np.uint8],
    items: Sequence[Annotation],
    partners: dict[int, int],
    others: Sequence[Annotation],
) -> Picture:
    """Items (annotations or predictions) by what their matches among the others are."""
    height, width = image.shape[:2]
    scale = _LONG_SIDE / max(height, width)
    pixels = image.astype(np.float32)
    marks = []
    for k, item in enumerate(items):
        partner = others[partners[k]] if k in partners else None
        mark = _mark(item, partner, detections.class_names, scale, width * scale)
        if has_mask(item):
            mask = detections.truth.annToMask(item).astype(bool)
            if mask.shape == pixels.shape[:2]:  # not so if the image was replaced since
                pixels[mask] += _OPACITY * (np.array(_COLORS[mark.kind]) - pixels[mask])
        marks.append(mark)
    uri = _to_data_uri(Image.fromarray(pixels.astype(np.uint8)), min(scale, 1.0))
    return Picture(uri, width * scale, height * scale, marks)


def _mark(
    item: Annotation,
    partner: Annotation | None,
    names: dict[int, str],
    scale: float,
    width: float,
) -> Mark:
    predicted = "score" in item
    label = names[item["category_id"]] + (f" {item['score']:.0%}" if predicted else "")
    if partner is None:
        kind, label = "alone", f"{label}: {'nothing there' if predicted else 'missed'}"
    elif partner["category_id"] != item["category_id"]:
        verb = "is" if predicted else "taken for"
        kind, label = "confused", f"{label}: {verb} {names[partner['category_id']]}"
    else:
        kind = "correct"
    x, y, w, h = (scale * float(side) for side in item["bbox"])
    # Above the box, or in it at the top of the picture; and not over the right edge.
    place = (
        max(0.0, min(x, width - 0.64 * _LABEL * len(label))),
        y - 5 if y > _LABEL + 5 else y + _LABEL,
    )
    keypoints = np.array(item.get("keypoints") or [], dtype=float).reshape(-1, 3)
    points = [(scale * float(px), scale * float(py)) for px, py, seen in keypoints if seen > 0]
    return Mark(kind, label, (x, y, w, h), place, points)


def _to_data_uri(image: Image.Image, scale: float) -> str:
    if scale < 1:
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        image = image.resize(size, Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, format="JPEG", quality=_QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
