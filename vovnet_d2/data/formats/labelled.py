# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Every format is first read into images with their objects, and then converted to COCO's."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from .exact import exact

Content = dict[str, Any]
"""The content of a file in COCO's format is a dictionary of this type."""


@dataclass
class LabelledObject:
    """Describes an object in the same form for all formats of annotations.

    Attributes:
        name: the name of the class.
        box: x, y, width and height in pixels.
        polygons: x, y, x, y, ... in pixels, each with three points or more; empty for a box alone.
        is_crowd: True if training leaves the object out, and evaluation ignores detections there.
    """

    name: str
    box: list[float]
    polygons: list[list[float]] = field(default_factory=list)
    is_crowd: bool = False


@dataclass
class LabelledImage:
    """Describes an image and its objects in the same form for all formats of annotations.

    Attributes:
        file_name: the path relative to the folder of images, with slashes.
        size: width and height in pixels.
        objects: the objects in the order of the file.
    """

    file_name: str
    size: tuple[int, int]
    objects: list[LabelledObject]

    @property
    def stem(self) -> str:
        """Return the file name without its suffix, by which most formats name their files."""
        return str(PurePosixPath(self.file_name).with_suffix(""))


def box_around(polygons: Sequence[Sequence[float]]) -> list[float]:
    """Return the tight box of polygons as x, y, width, height."""
    xs = [x for polygon in polygons for x in polygon[::2]]
    ys = [y for polygon in polygons for y in polygon[1::2]]
    left, top = min(xs), min(ys)
    width, height = exact(max(xs)) - exact(left), exact(max(ys)) - exact(top)
    return [left, top, float(width), float(height)]


def to_coco(images: Iterable[LabelledImage], names: Sequence[str] | None = None) -> Content:
    """Put images into COCO's format.

    Args:
        images: the images in any order. The result has them in the order of their names, with ids
            from 1.
        names: the names of the classes in the order of their ids, which count from 1. By default
            the names that occur, in alphabetical order.
    """
    ordered = sorted(images, key=lambda image: image.file_name)
    if names is None:
        names = sorted({found.name for image in ordered for found in image.objects})
    ids = {name: number for number, name in enumerate(names, 1)}
    content: Content = {
        "info": {},
        "categories": [{"id": number, "name": name} for name, number in ids.items()],
        "images": [],
        "annotations": [],
    }
    for image_id, image in enumerate(ordered, 1):
        width, height = image.size
        content["images"].append(
            {"id": image_id, "file_name": image.file_name, "width": width, "height": height}
        )
        content["annotations"] += [
            {
                "id": len(content["annotations"]) + number,
                "image_id": image_id,
                "category_id": ids[found.name],
                "bbox": found.box,
                "area": _area(found),
                "iscrowd": int(found.is_crowd),
            }
            | ({"segmentation": found.polygons} if found.polygons else {})
            for number, found in enumerate(image.objects, 1)
        ]
    return content


def _area(found: LabelledObject) -> float:
    if not found.polygons:
        return found.box[2] * found.box[3]
    return sum(map(_polygon_area, found.polygons))


def _polygon_area(polygon: Sequence[float]) -> float:
    """Compute the area from the corners."""
    xs, ys = polygon[::2], polygon[1::2]
    following = zip(xs, ys, [*xs[1:], xs[0]], [*ys[1:], ys[0]], strict=True)
    return abs(sum(x * next_y - next_x * y for x, y, next_x, next_y in following)) / 2
