# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Pictures of single images: what is annotated, and what was predicted."""

import base64
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from detectron2.data.catalog import Metadata
from detectron2.structures import BoxMode
from numpy.typing import NDArray
from PIL import Image

from ..data.image_file import read_image
from ..drawing.artist import Artist, Shown
from ..drawing.shown import objects
from .detections import Detections
from .matching import Annotation, ImageMatches

_LONG_SIDE = 560  # pixels of the longer side of a picture
_QUALITY = 82

# Colour-blind people can tell these colours apart. The style sheet has them too, and labels say
# the same in words.
_KINDS = ("correct", "confused", "alone")
_ARTIST = Artist(
    Metadata(thing_classes=list(_KINDS), thing_colors=[[0, 158, 115], [240, 228, 66], [213, 94, 0]])
)


@dataclass(frozen=True)
class Tile:
    """Holds two pictures of an image, which the page shows side by side.

    Attributes:
        name: the file name of the image.
        truth: a JPEG picture of the annotations as a data URI; empty if the image cannot be read.
        predicted: a picture of the predictions in the same form.
    """

    name: str
    truth: str
    predicted: str
    matches: ImageMatches


def draw_tile(detections: Detections, matches: ImageMatches) -> Tile:
    path = detections.image_files.get(matches.image_id, f"image {matches.image_id}")
    name = os.path.basename(path)
    try:
        image = read_image(path)
    except (FileNotFoundError, ValueError):
        return Tile(name, "", "", matches)
    given = detections.truth.imgs[matches.image_id]
    if image.shape[:2] != (given["height"], given["width"]):  # replaced since, so masks do not fit
        hidden = [{**item, "segmentation": None} for item in matches.objects]
        shown = [{**item, "segmentation": None} for item in matches.predictions]
        matches = ImageMatches(matches.image_id, hidden, shown, matches.pairs)
    found = {i: matches.predictions[j] for i, j in matches.pairs}
    sought = {j: matches.objects[i] for i, j in matches.pairs}
    names = detections.class_names
    predictions = [found.get(i) for i in range(len(matches.objects))]
    things = [sought.get(j) for j in range(len(matches.predictions))]
    truth = _draw(image, matches.objects, predictions, names)
    return Tile(name, truth, _draw(image, matches.predictions, things, names), matches)


class Judgement(NamedTuple):
    """Says whether an object and its prediction agree.

    Attributes:
        kind: "correct", "confused" (the class is another) or "alone" (without a match).
        label: the class, and what went wrong.
    """

    kind: str
    label: str


def judge(item: Annotation, partner: Annotation | None, names: dict[int, str]) -> Judgement:
    """Say how an object was predicted, or which object a prediction shows.

    Args:
        item: an annotation, or a prediction, which has a "score".
        partner: the match of the item; None without one.
        names: the categories by their ids.
    """
    predicted = "score" in item
    label = names[item["category_id"]] + (f" {item['score']:.0%}" if predicted else "")
    if partner is None:
        return Judgement("alone", f"{label}: {'nothing there' if predicted else 'missed'}")
    if partner["category_id"] != item["category_id"]:
        verb = "is" if predicted else "taken for"
        return Judgement("confused", f"{label}: {verb} {names[partner['category_id']]}")
    return Judgement("correct", label)


def _draw(
    image: NDArray[np.uint8],
    items: Sequence[Annotation],
    partners: Sequence[Annotation | None],
    names: dict[int, str],
) -> str:
    """Draw items, annotations or predictions, in the colours of how they were matched."""
    found = [judge(item, partner, names) for item, partner in zip(items, partners, strict=True)]
    marked = [
        {**item, "category_id": _KINDS.index(kind)}
        for item, (kind, _) in zip(items, found, strict=True)
    ]
    size = image.shape[:2]
    shown = objects(marked, [label for _, label in found], size, BoxMode.XYWH_ABS)
    drawn = _ARTIST.draw(image, Shown(shown), scale=_LONG_SIDE / max(size))
    file = io.BytesIO()
    Image.fromarray(drawn[:, :, ::-1]).save(file, format="JPEG", quality=_QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
