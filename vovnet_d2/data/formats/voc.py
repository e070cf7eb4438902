# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""PASCAL VOC: a file of XML for each image, and lists of images in "ImageSets".

Pixels are counted from 1 and the last one belongs to the object, as VOC's definition says and as
Detectron2 reads them. Difficult objects become crowds.
"""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from ..voc import parse_annotations, read_objects
from .exact import exact, plain_text
from .images import ImageFolder, last_part, list_files, read_text, slashed
from .labelled import Content, LabelledImage, LabelledObject, from_coco, to_coco
from .notes import Notes, read_each

__all__ = ["find_images", "is_voc", "read", "write"]

_SUFFIX = ".xml"


class _Files(NamedTuple):
    """
    Attributes:
        folder: holds the files of XML.
        names: of these files, relative to the folder and without their suffix.
    """

    folder: Path
    names: list[str]


def is_voc(path: Path) -> bool:
    """Return whether a path is a folder of XML files, or a list of images in VOC's ImageSets."""
    if path.is_dir():
        return bool(list_files(path, [_SUFFIX]))
    return path.suffix == ".txt" and path.parent.parent.name == "ImageSets"


def find_images(path: Path, part: str | None) -> Path | None:
    """Return VOC's own folder of images, if it is there."""
    root = path.parents[2] if path.is_file() else path
    candidates = (root / "JPEGImages", root.parent / "JPEGImages")
    return next((folder for folder in candidates if folder.is_dir()), None)


def read(path: Path, images: Path, part: str | None, notes: Notes) -> Content:
    """Read a folder or list of VOC's files into COCO's format.

    Args:
        path: a folder of XML files, a folder that holds "Annotations", or a list of "ImageSets".
        images: the folder of images.
        part: which list of "ImageSets/Main" to take, if there are any.
        notes: what is changed or left out is added here.

    Raises:
        FileNotFoundError: a file or folder is missing.
        ValueError: a file is not VOC's.
    """
    files, folder = _find_files(path, part), ImageFolder(images)
    records = read_each(files.names, partial(_read_image, files.folder, folder, notes))
    missing = [index for index, record in enumerate(records) if not all(record.size)]
    if missing:
        sizes = folder.sizes([records[index].file_name for index in missing])
        for index, size in zip(missing, sizes, strict=True):
            records[index].size = size
    return to_coco(records)


def _find_files(path: Path, part: str | None) -> _Files:
    if path.is_file():
        return _read_list(path.parents[2] / "Annotations", path)
    folder = path / "Annotations" if (path / "Annotations").is_dir() else path
    lists = {file.stem: file for file in sorted((path / "ImageSets" / "Main").glob("*.txt"))}
    if part and lists:
        if part not in lists:
            known = ", ".join(lists)
            raise ValueError(
                f"{path} has no list of images {part!r} in ImageSets/Main, but {known}: name the "
                f"file of the one that is meant, such as {next(iter(lists.values()))}."
            )
        return _read_list(folder, lists[part])
    found = [file.relative_to(folder).with_suffix("") for file in list_files(folder, [_SUFFIX])]
    return _Files(folder, [name.as_posix() for name in found])


def _read_list(folder: Path, listing: Path) -> _Files:
    names = [slashed(line) for line in read_text(listing).splitlines() if line.strip()]
    if not names:
        raise ValueError(f"{listing} lists no image.")
    for line, name in enumerate(names, 1):
        first, _, rest = name.partition(" ")
        if rest.strip() in ("-1", "0", "1") and not (folder / f"{name}{_SUFFIX}").is_file():
            raise ValueError(
                f"{listing}, line {line}, is {name!r}: this is VOC's list for one class. Name a "
                f"list that has the names of images alone, {first!r} here."
            )
    return _Files(folder, names)


def _read_image(folder: Path, images: ImageFolder, notes: Notes, name: str) -> LabelledImage:
    file = folder / f"{name}{_SUFFIX}"
    if not file.is_file():
        raise FileNotFoundError(f"There is no annotation file {file}.")
    try:
        root = parse_annotations(str(file))
        if root.tag != "annotation":
            raise ValueError(f"its root is {root.tag!r}, and VOC's is 'annotation': take it away.")
        found = read_objects(root)
    except (ElementTree.ParseError, ValueError) as error:
        raise ValueError(f"{file}: {_explain(file, error)}") from error
    objects = []
    for number, (item, element) in enumerate(zip(found, root.iterfind("object"), strict=True), 1):
        where = f"{file}, object {number}"
        if (boxes := len(element.findall("bndbox"))) > 1 or not item["name"]:
            wrong = f"{boxes} boxes" if boxes > 1 else "no name"
            raise ValueError(f"{where} has {wrong}: an object has one box and the name of a class.")
        box = _read_box(item["bbox"], where, notes)
        objects.append(LabelledObject(item["name"], box, is_crowd=bool(item["difficult"])))
    if root.find("object/polygon") is not None:
        notes.add("files have polygons, which VOC does not define: the boxes are read", str(file))
    size = _read_size(root)
    meant = _names_of_image(name, root)
    known = images.find(*meant)
    if known is None:
        if not all(size):
            raise FileNotFoundError(
                f"{file} has no size, and there is no image {meant[0]!r} in {images.root}."
            )
        notes.add("images are not in the folder of images", f"{meant[0]} of {file}")
    return LabelledImage(known or meant[0], size, objects)


def _explain(file: Path, error: Exception) -> str:
    if file.stat().st_size == 0:
        return "the file is empty. For an image without objects write <annotation></annotation>."
    if isinstance(error, ElementTree.ParseError):
        return f"this is no XML ({error}). Mend the file, or take it and its image away."
    return str(error.args[0])


def _read_box(corners: list[float], where: str, notes: Notes) -> list[float]:
    left, top, right, bottom = map(exact, corners)
    if right < left - 1 or bottom < top - 1:  # between are boxes of less than a pixel
        notes.add("boxes have their corners swapped and are read the right way round", where)
        left, right = sorted((left, right)) if right < left - 1 else (left, right)
        top, bottom = sorted((top, bottom)) if bottom < top - 1 else (top, bottom)
    if min(left, top) < 1:
        notes.add("boxes begin before pixel 1, where VOC begins to count", where)
    return [float(value) for value in (left - 1, top - 1, right - left + 1, bottom - top + 1)]


def _read_size(root: ElementTree.Element) -> tuple[int, int]:
    """Return width and height; zeros where the file does not say both."""
    texts = [(root.findtext(f"size/{side}") or "").strip() for side in ("width", "height")]
    width, height = (int(text) if text.isdecimal() else 0 for text in texts)
    return (width, height) if width and height else (0, 0)


def _names_of_image(name: str, root: ElementTree.Element) -> list[str]:
    """What the image may be called, the likeliest first: files are often renamed in pairs, and
    the name in the XML stays."""
    inside = root.findtext("filename") or root.findtext("path") or ""
    suffix = PurePosixPath(last_part(inside)).suffix or ".jpg"
    return [f"{name}{suffix}", name, slashed(inside)]


# Writing


def write(folder: Path, parts: Mapping[str, Content], notes: Notes) -> None:
    """Write "Annotations", and for each part a list of "ImageSets/Main"."""
    for part, content in parts.items():
        images, _ = from_coco(content, notes)
        for image in images:
            _write_image(folder / "Annotations" / f"{image.stem}{_SUFFIX}", image, notes)
        listing = folder / "ImageSets" / "Main" / f"{part}.txt"
        listing.parent.mkdir(parents=True, exist_ok=True)
        listing.write_text("".join(f"{i.stem}\n" for i in images), encoding="utf-8")


def _write_image(file: Path, image: LabelledImage, notes: Notes) -> None:
    root = ElementTree.Element("annotation")
    _add(root, "filename", PurePosixPath(image.file_name).name)
    size = _add(root, "size")
    for side, value in zip(("width", "height", "depth"), (*image.size, 3), strict=True):
        _add(size, side, value)
    for number, found in enumerate(image.objects, 1):
        if found.polygons:
            notes.add("masks are lost, and their boxes kept", f"{file.name}, object {number}")
        item = _add(root, "object")
        _add(item, "name", found.name)
        _add(item, "difficult", int(found.is_crowd))
        x, y, width, height = map(exact, found.box)
        corners = {"xmin": x + 1, "ymin": y + 1, "xmax": x + width, "ymax": y + height}
        box = _add(item, "bndbox")
        for key, corner in corners.items():
            _add(box, key, plain_text(corner))
    ElementTree.indent(root)
    file.parent.mkdir(parents=True, exist_ok=True)
    ElementTree.ElementTree(root).write(file, encoding="utf-8")


def _add(parent: ElementTree.Element, tag: str, text: Any = None) -> ElementTree.Element:
    child = ElementTree.SubElement(parent, tag)
    child.text = None if text is None else str(text)
    return child
