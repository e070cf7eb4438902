# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Labelme has a JSON file for each image, with shapes in pixels.

Shapes with the same label and ``group_id`` are parts of one object, as in Labelme's own converter
to COCO.
"""

import json
import re
from functools import partial
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Any

from ...errors import UserFileNotFoundError, UserValueError
from ..check.records import size_of
from ..check.values import is_number
from .exact import exact
from .images import ImageFolder, last_part, list_files, read_text, slashed
from .labelled import Content, LabelledImage, LabelledObject, box_around, to_coco
from .notes import Notes, read_each

_WITHOUT_AREA = ("point", "points", "line", "linestrip")
_POLYGONS = ("polygon", "oriented_rectangle")
_CROWD = "iscrowd"  # a flag of a shape
_BEGINNING = 1 << 16  # bytes


def is_labelme(path: Path) -> bool:
    """Return True if a path is a JSON file with Labelme's shapes, or a folder of such files."""
    if path.is_dir():
        return any(map(_has_shapes, list_files(path, [".json"])))
    return path.suffix.lower() == ".json" and _has_shapes(path)


def _has_shapes(file: Path) -> bool:
    """Return True if the beginning of a file has shapes. A file of COCO may be too large to read
    whole."""
    with open(file, "rb") as stream:
        beginning = stream.read(_BEGINNING).replace(b"\0", b"")  # UTF-16 has zeros
    return bool(re.search(rb'"shapes"\s*:', beginning))


def find_images(path: Path, part: str | None) -> Path | None:
    """Return the folder of the image that the first file names, or the folder of the files."""
    folder = path if path.is_dir() else path.parent
    first = list_files(path, [".json"])[0] if path.is_dir() else path
    image = first.parent / slashed(str(_load(first).get("imagePath", "")))
    is_inside = image.resolve().is_relative_to(folder.resolve())
    return image.parent if image.is_file() and not is_inside else folder


def read(path: Path, images: Path, part: str | None, notes: Notes) -> Content:
    """Read a file of Labelme, or all such files below a folder, into COCO's format. Raise
    ValueError if a file is not Labelme's, and FileNotFoundError if there is no folder of images."""
    root = path if path.is_dir() else path.parent
    files = list_files(path, [".json"]) if path.is_dir() else [path]
    folder = ImageFolder(images)
    records = read_each(files, partial(_read_image, root, folder, notes))
    folder.fill_sizes(records)
    return to_coco(records)


def _load(file: Path) -> dict[str, Any]:
    text = read_text(file)
    if not text.strip():
        raise UserValueError(f"{file} is empty: remove it, or label its image again.")
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        place = getattr(error, "lineno", 1)
        raise UserValueError(
            f"{file}, line {place}, is not JSON ({getattr(error, 'msg', error)}): fix the file, "
            "or remove it."
        ) from error
    if not isinstance(content, dict) or not isinstance(content.get("shapes"), list):
        raise UserValueError(f'{file} has no list of "shapes", so it is not Labelme\'s: remove it.')
    return content


def _read_image(root: Path, images: ImageFolder, notes: Notes, file: Path) -> LabelledImage:
    content = _load(file)
    objects: dict[Any, LabelledObject] = {}
    for number, shape in enumerate(content["shapes"]):
        where = f"{file}, shapes[{number}]"
        found = _read_shape(shape, where, notes)
        if found is None:
            continue
        group = shape.get("group_id")
        key = number if group is None else (found.name, str(group))
        objects[key] = _join(objects[key], found) if key in objects else found
    sides = {"width": content.get("imageWidth"), "height": content.get("imageHeight")}
    size = size_of(sides) or (0, 0)
    inside = str(content.get("imagePath") or "")
    suffix = PurePosixPath(last_part(inside)).suffix or ".jpg"
    stem = file.relative_to(root).with_suffix("").as_posix()
    meant = f"{stem}{suffix}"
    name = images.find(meant, stem, inside, last_part(inside))
    if name is None:
        if not all(size):
            raise UserFileNotFoundError(
                f"{file} has no image size, and there is no image {meant!r} in {images.root}."
            )
        notes.add("images are not in the folder of images", f"{meant} of {file}")
    return LabelledImage(name or meant, size, list(objects.values()))


def _read_shape(shape: Any, where: str, notes: Notes) -> LabelledObject | None:
    if not isinstance(shape, dict) or not str(shape.get("label") or "").strip():
        raise UserValueError(f"{where} has no label: give the shape a label, or remove it.")
    points = shape.get("points")
    if not isinstance(points, list) or not all(map(_is_point, points)):
        raise UserValueError(f'{where}: "points" is {points!r:.60}, and must be a list of [x, y].')
    kind = shape.get("shape_type") or "polygon"
    name, crowd = str(shape["label"]).strip(), bool((shape.get("flags") or {}).get(_CROWD))
    if kind in _WITHOUT_AREA:
        notes.add(f"shapes of type {kind!r} have no area and are left out", where)
        return None
    if kind in _POLYGONS:
        if len(points) < 3:
            notes.add("polygons of fewer than three points are left out", where)
            return None
        polygon = [float(number) for number in chain(*points)]
        return LabelledObject(name, box_around([polygon]), [polygon], crowd)
    if len(points) != 2 or kind not in ("rectangle", "circle", "mask"):
        raise UserValueError(
            f"{where} is of type {kind!r} with {len(points)} points. Rectangles, circles and masks "
            "have two points, and all other shapes must be polygons: draw it again."
        )
    if kind != "rectangle":
        notes.add(f"shapes of type {kind!r} are read as their boxes", where)
    return LabelledObject(name, _box_of(kind, points), is_crowd=crowd)


def _is_point(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(is_number, value))


def _box_of(kind: str, points: list[list[float]]) -> list[float]:
    if kind != "circle":
        return box_around([list(chain(*points))])
    (x, y), (edge_x, edge_y) = points
    radius = ((edge_x - x) ** 2 + (edge_y - y) ** 2) ** 0.5
    return [x - radius, y - radius, 2 * radius, 2 * radius]


def _join(one: LabelledObject, other: LabelledObject) -> LabelledObject:
    corners = []
    for x, y, width, height in (one.box, other.box):
        corners += [x, y, float(exact(x) + exact(width)), float(exact(y) + exact(height))]
    polygons = one.polygons + other.polygons
    return LabelledObject(one.name, box_around([corners]), polygons, one.is_crowd)
