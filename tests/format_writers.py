# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Writers of the annotation formats, to test the readers of these formats."""

from __future__ import annotations

import csv
import json
import xml.etree.ElementTree as ElementTree
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from decimal import Decimal
from functools import partial
from itertools import cycle
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import yaml

from vovnet_d2.data.check.masks import is_empty_mask
from vovnet_d2.data.check.values import are_numbers
from vovnet_d2.data.formats.exact import exact
from vovnet_d2.data.formats.labelled import Content, LabelledImage, LabelledObject, box_around
from vovnet_d2.data.formats.labelme import _CROWD
from vovnet_d2.data.formats.notes import Notes
from vovnet_d2.data.formats.open_images import _COLUMNS
from vovnet_d2.data.formats.open_images import _pixels as _pixels_of_csv
from vovnet_d2.data.formats.table import write_coco
from vovnet_d2.data.formats.voc import _SUFFIX
from vovnet_d2.data.formats.yolo import _pixels as _pixels_of_yolo

_HELD = {
    "annotations": ("id", "image_id", "category_id", "bbox", "area", "segmentation", "iscrowd"),
    "images": ("id", "file_name", "height", "width"),
    "categories": ("id", "name"),
}
# Numbers of decimals to try for a fraction of an image's side. Most tools write six.
_DIGITS = (6, 9, 12, 15, 18)


def plain_text(value: Decimal) -> str:
    """Write a decimal without an exponent and without zeros at its end."""
    text = format(value, "f")
    return text.rstrip("0").rstrip(".") if "." in text else text


def fraction_texts(
    fractions: Sequence[Decimal],
    restore: Callable[[Sequence[Decimal]], list[float]],
    wanted: Sequence[float],
) -> list[str]:
    """Write fractions of an image's sides with as few decimals as restore the same pixels.

    Args:
        fractions: the numbers to write.
        restore: computes pixels from the written fractions, as a reader does.
        wanted: the pixels to restore.
    """
    rounded = list(fractions)
    for digits in _DIGITS:
        rounded = [round(fraction, digits) for fraction in fractions]
        if restore(rounded) == list(wanted):
            break
    return [plain_text(fraction) for fraction in rounded]


def from_coco(content: Content, notes: Notes) -> tuple[list[LabelledImage], list[str]]:
    """Convert the content of a COCO file to images.

    Args:
        content: the content of a file, as :func:`to_coco` returns it, possibly with more keys.
        notes: notes about lost information are added here.

    Returns:
        the images, in their order, and the names of the classes by the order of their ids.

    Raises:
        ValueError: a file name leads out of the folder of images, the names of two images differ
            only in their suffixes, or two classes have the same name.
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
    """Return a file name with slashes. The names of other files are derived from it."""
    name = file_name.replace("\\", "/")
    path, drive = PurePosixPath(name), PureWindowsPath(name).drive
    if path.is_absolute() or drive or ".." in path.parts or not path.name:
        raise ValueError(
            f"file_name {file_name!r} leads to no file in the folder of images: write the "
            "names relative to that folder, as tools/check_dataset.py --fix does."
        )
    return str(path)


# voc


def write_voc(folder: Path, parts: Mapping[str, Content], notes: Notes) -> None:
    """Write the folder "Annotations", and a list for each part in "ImageSets/Main"."""
    for part, content in parts.items():
        images, _ = from_coco(content, notes)
        for image in images:
            _write_image_voc(folder / "Annotations" / f"{image.stem}{_SUFFIX}", image, notes)
        listing = folder / "ImageSets" / "Main" / f"{part}.txt"
        listing.parent.mkdir(parents=True, exist_ok=True)
        listing.write_text("".join(f"{i.stem}\n" for i in images), encoding="utf-8")


def _write_image_voc(file: Path, image: LabelledImage, notes: Notes) -> None:
    root = ElementTree.Element("annotation")
    _add_voc(root, "filename", PurePosixPath(image.file_name).name)
    size = _add_voc(root, "size")
    for side, value in zip(("width", "height", "depth"), (*image.size, 3), strict=True):
        _add_voc(size, side, value)
    for number, found in enumerate(image.objects, 1):
        if found.polygons:
            notes.add("masks are lost, and their boxes kept", f"{file.name}, object {number}")
        item = _add_voc(root, "object")
        _add_voc(item, "name", found.name)
        _add_voc(item, "difficult", int(found.is_crowd))
        x, y, width, height = map(exact, found.box)
        corners = {"xmin": x + 1, "ymin": y + 1, "xmax": x + width, "ymax": y + height}
        box = _add_voc(item, "bndbox")
        for key, corner in corners.items():
            _add_voc(box, key, plain_text(corner))
    ElementTree.indent(root)
    file.parent.mkdir(parents=True, exist_ok=True)
    ElementTree.ElementTree(root).write(file, encoding="utf-8")


def _add_voc(parent: ElementTree.Element, tag: str, text: Any = None) -> ElementTree.Element:
    child = ElementTree.SubElement(parent, tag)
    child.text = None if text is None else str(text)
    return child


# labelme


def write_labelme(folder: Path, parts: Mapping[str, Content], notes: Notes) -> None:
    """Write one folder for each part, with one file for each image."""
    for part, content in parts.items():
        for image in from_coco(content, notes)[0]:
            _write_image_labelme(folder / part / f"{image.stem}.json", image, notes)


def _write_image_labelme(file: Path, image: LabelledImage, notes: Notes) -> None:
    shapes = []
    for number, found in enumerate(image.objects):
        where = f"{file.name}, object {number}"
        if found.polygons and box_around(found.polygons) != found.box:
            notes.add("boxes that are not those of their polygons are lost", where)
        group = number if len(found.polygons) > 1 else None
        x, y, width, height = map(exact, found.box)
        corners = [x, y, x + width, y + height]
        for polygon in found.polygons or [list(map(float, corners))]:
            points = [polygon[i : i + 2] for i in range(0, len(polygon), 2)]
            shapes.append(
                {
                    "label": found.name,
                    "points": points,
                    "group_id": group,
                    "shape_type": "polygon" if found.polygons else "rectangle",
                    "flags": {_CROWD: True} if found.is_crowd else {},
                }
            )
    content: dict[str, Any] = {
        "version": "5.0.0",
        "flags": {},
        "shapes": shapes,
        "imagePath": PurePosixPath(image.file_name).name,
        "imageData": None,
        "imageHeight": image.size[1],
        "imageWidth": image.size[0],
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")


# open_images


def write_open_images(folder: Path, parts: Mapping[str, Content], notes: Notes) -> None:
    """Write one file of boxes for each part, and a file with the names of the classes in order."""
    folder.mkdir(parents=True, exist_ok=True)
    for part, content in parts.items():
        images, names = from_coco(content, notes)
        with open(folder / f"{part}.csv", "w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(_COLUMNS)
            for image in images:
                writer.writerows(_rows_of_open_images(image, notes))
                if not image.objects:
                    notes.add("images without objects are lost", image.file_name)
        used = {found.name for image in images for found in image.objects}
        for name in sorted(set(names) - used):
            notes.add(f"classes without objects in {part} are lost", name)


def _rows_of_open_images(image: LabelledImage, notes: Notes) -> Iterator[list[Any]]:
    for number, found in enumerate(image.objects, 1):
        if found.polygons:
            notes.add("masks are lost, and their boxes kept", f"{image.file_name}, object {number}")
        width, height = map(Decimal, image.size)
        x, y, across, down = map(exact, found.box)
        fractions = x / width, (x + across) / width, y / height, (y + down) / height
        box = fraction_texts(fractions, lambda box: _pixels_of_csv(box, image.size), found.box)
        yield [image.stem, "", found.name, 1, *box, int(found.is_crowd)]


# yolo


def write_yolo(folder: Path, parts: Mapping[str, Content], notes: Notes) -> None:
    """Write data.yaml, the folder "labels", and a list of the images of each part in "images"."""
    described: dict[str, Any] = {"path": "."}
    for part, content in parts.items():
        images, names = from_coco(content, notes)
        numbers = {name: number for number, name in enumerate(names)}
        described |= {part: f"{part}.txt", "names": {n: name for name, n in numbers.items()}}
        folder.mkdir(parents=True, exist_ok=True)
        lines = "".join(f"./images/{image.file_name}\n" for image in images)
        (folder / f"{part}.txt").write_text(lines, encoding="utf-8")
        for image in images:
            file = folder / "labels" / f"{image.stem}.txt"
            file.parent.mkdir(parents=True, exist_ok=True)
            lines = "".join(f"{line}\n" for line in _lines_of_yolo(image, numbers, notes))
            file.write_text(lines, encoding="utf-8")
    text = yaml.safe_dump(described, allow_unicode=True, sort_keys=False)
    (folder / "data.yaml").write_text(text, encoding="utf-8")


def _lines_of_yolo(image: LabelledImage, numbers: Mapping[str, int], notes: Notes) -> Iterator[str]:
    for number, found in enumerate(image.objects, 1):
        where = f"{image.file_name}, object {number}"
        if found.is_crowd:
            notes.add("crowds are left out", where)
            continue
        if found.polygons:
            texts = _polygon_texts_yolo(found, image.size, where, notes)
        else:
            x, y, width, height = map(exact, found.box)
            across, down = map(Decimal, image.size)
            centre = (x + width / 2) / across, (y + height / 2) / down
            fractions = (*centre, width / across, height / down)
            texts = fraction_texts(
                fractions, lambda box: _pixels_of_yolo(box, image.size), found.box
            )
        yield " ".join([str(numbers[found.name]), *texts])


def _polygon_texts_yolo(
    found: LabelledObject, size: tuple[int, int], where: str, notes: Notes
) -> list[str]:
    if box_around(found.polygons) != found.box:
        notes.add("boxes that are not those of their polygons are lost", where)
    joined = list(found.polygons[0])
    if len(found.polygons) > 1:
        notes.add("objects of several polygons become one polygon, joined by lines", where)
        # A line of no width, which goes there and back, connects the polygons.
        for polygon in found.polygons[1:]:
            joined = [*joined, *joined[:2], *polygon, *polygon[:2]]
    texts = []
    for value, side in zip(joined, cycle(size), strict=False):
        restore = partial(_one_pixel_yolo, side)
        texts += fraction_texts([exact(value) / side], restore, [value])
    return texts


def _one_pixel_yolo(side: int, fractions: Sequence[Decimal]) -> list[float]:
    return [float(fractions[0] * side)]


def write_coco_parts(folder: Path, parts: Mapping[str, Content], notes: Notes) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for part, content in parts.items():
        write_coco(content, folder / f"{part}.json")


WRITERS = {
    "voc": write_voc,
    "labelme": write_labelme,
    "csv": write_open_images,
    "yolo": write_yolo,
    "coco": write_coco_parts,
}
