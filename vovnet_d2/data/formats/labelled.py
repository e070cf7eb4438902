# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Images with their objects: what all formats hold, between each of them and COCO's."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

from ..check.masks import is_empty_mask
from ..check.values import are_numbers
from .exact import exact
from .notes import Notes

__all__ = ["LabelledImage", "LabelledObject", "box_around", "from_coco", "to_coco"]

Content = dict[str, Any]
"""The content of a file in COCO's format is a dictionary of this type."""

_HELD = {
    "annotations": ("id", "image_id", "category_id", "bbox", "area", "segmentation", "iscrowd"),
    "images": ("id", "file_name", "height", "width"),
    "categories": ("id", "name"),
}


@dataclass
class LabelledObject:
    """
    Attributes:
        name: of the class.
        box: x, y, width and height in pixels.
        polygons: x, y, x, y, ... in pixels, each of three points or more; empty for a box alone.
        is_crowd: whether training leaves the object out and evaluation forgives what is found
            there.
    """

    name: str
    box: list[float]
    polygons: list[list[float]] = field(default_factory=list)
    is_crowd: bool = False


@dataclass
class LabelledImage:
    """
    Attributes:
        file_name: relative to the folder of images, with slashes.
        size: width and height in pixels.
        objects: in the order of the file.
    """

    file_name: str
    size: tuple[int, int]
    objects: list[LabelledObject]

    @property
    def stem(self) -> str:
        """The file name without its suffix, by which most formats name their own files."""
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
        images: in any order. The result has them by file name, with ids from 1.
        names: of the classes, in order, whose ids count from 1. By default the classes are those
            that occur, by name.
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


def from_coco(content: Content, notes: Notes) -> tuple[list[LabelledImage], list[str]]:
    """Take images out of COCO's format.

    Args:
        content: of a file, as :func:`to_coco` returns it or with more in it.
        notes: what is lost is added here.

    Returns:
        the images, in their order, and the names of the classes by the order of their ids.

    Raises:
        ValueError: a file name leads out of the folder of images, or two images are told apart by
            their suffixes alone, or two classes have one name.
    """
    _note_unheld(content, notes)
    categories = sorted(content["categories"], key=lambda category: category["id"])
    names = {category["id"]: str(category["name"]) for category in categories}
    if len(set(names.values())) < len(names):
        twice = next(n for n in names.values() if list(names.values()).count(n) > 1)
        raise ValueError(f"Two categories have the name {twice!r}: give each its own.")
    objects: defaultdict[Any, list[LabelledObject]] = defaultdict(list)
    for annotation in content["annotations"]:
        where = f"annotation {annotation['id']}"
        found = LabelledObject(
            names[annotation["category_id"]],
            list(annotation["bbox"]),
            _polygons_of(annotation.get("segmentation"), where, notes),
            bool(annotation.get("iscrowd", 0)),
        )
        objects[annotation["image_id"]].append(found)
    for image_id in objects.keys() - {image["id"] for image in content["images"]}:
        notes.add("images are not listed, and their objects are lost", f"image id {image_id}")
    images = [
        LabelledImage(
            _inside(image["file_name"]), (image["width"], image["height"]), objects[image["id"]]
        )
        for image in content["images"]
    ]
    _require_stems(images)
    return images, list(names.values())


def _require_stems(images: Sequence[LabelledImage]) -> None:
    stems = Counter(image.stem for image in images)
    if twice := [stem for stem, count in stems.items() if count > 1]:
        raise ValueError(
            f"Two images are called {twice[0]!r} but for their suffixes, and the format names "
            "its own files by the rest: rename one."
        )


def _note_unheld(content: Content, notes: Notes) -> None:
    for section, held in _HELD.items():
        for record in content[section]:
            for key, value in record.items():
                if key not in held and value not in (None, "", [], {}):
                    what = f'{section} whose "{key}" is lost'
                    notes.add(what, f"{section} id {record.get('id')}")


def _polygons_of(mask: Any, where: str, notes: Notes) -> list[list[float]]:
    if isinstance(mask, dict) and mask:
        notes.add("RLE masks are lost, and their boxes kept (no such format has RLE)", where)
    if not isinstance(mask, list) or is_empty_mask(mask):
        return []
    kept = [polygon for polygon in mask if _is_polygon(polygon)]
    if len(kept) < len(mask):
        notes.add("objects lose polygons of fewer than three points", where)
    return kept


def _is_polygon(value: Any) -> bool:
    return are_numbers(value) and len(value) >= 6 and len(value) % 2 == 0


def _inside(file_name: str) -> str:
    """Return a file name with slashes: other files are written under names made from it."""
    name = file_name.replace("\\", "/")
    path, drive = PurePosixPath(name), PureWindowsPath(name).drive
    if path.is_absolute() or drive or ".." in path.parts or not path.name:
        raise ValueError(
            f"file_name {file_name!r} leads to no file in the folder of images: write the "
            "names relative to that folder, as tools/check_dataset.py --fix does."
        )
    return str(path)
