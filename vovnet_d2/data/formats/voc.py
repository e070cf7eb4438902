# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""PASCAL VOC has an XML file for each image, and lists of images in "ImageSets".

Pixels count from 1, and the last pixel belongs to the object, as VOC defines and as Detectron2
reads them. Difficult objects become crowds.
"""

import xml.etree.ElementTree as ElementTree
from functools import partial
from pathlib import Path, PurePosixPath

from ...errors import UserFileNotFoundError, UserValueError
from ..voc import parse_annotations, read_objects
from .exact import exact
from .images import ImageFolder, last_part, list_files, read_text, slashed
from .labelled import Content, LabelledImage, LabelledObject, to_coco
from .notes import Notes, read_each

_SUFFIX = ".xml"


def is_voc(path: Path) -> bool:
    """Return True if a path is a folder of XML files, or a list of images in VOC's ImageSets."""
    if path.is_dir():
        return bool(list_files(path, [_SUFFIX]))
    return path.suffix == ".txt" and path.parent.parent.name == "ImageSets"


def find_images(path: Path, part: str | None) -> Path | None:
    """Return VOC's own folder of images; None if there is none."""
    root = path.parents[2] if path.is_file() else path
    candidates = (root / "JPEGImages", root.parent / "JPEGImages")
    return next((folder for folder in candidates if folder.is_dir()), None)


def read(path: Path, images: Path, part: str | None, notes: Notes) -> Content:
    """Read the files of a folder, or of a list, into COCO's format.

    Args:
        path: a folder of XML files, a folder that holds "Annotations", or a list of "ImageSets".
        images: the folder of images.
        part: the list of "ImageSets/Main" to take, if there are any.
        notes: gets the changes and losses.

    Raises:
        FileNotFoundError: a file or folder is missing.
        ValueError: a file is not VOC's.
    """
    (xml_folder, names), folder = _find_files(path, part), ImageFolder(images)
    records = read_each(names, partial(_read_image, xml_folder, folder, notes))
    folder.fill_sizes(records)
    return to_coco(records)


def _find_files(path: Path, part: str | None) -> tuple[Path, list[str]]:
    """Return the folder of the XML files, and their names in it without the suffix."""
    if path.is_file():
        return _read_list(path.parents[2] / "Annotations", path)
    folder = path / "Annotations" if (path / "Annotations").is_dir() else path
    lists = {file.stem: file for file in sorted((path / "ImageSets" / "Main").glob("*.txt"))}
    if part and lists:
        if part not in lists:
            known = ", ".join(lists)
            raise UserValueError(
                f"{path} has no list of images {part!r} in ImageSets/Main, but {known}: give the "
                f"path of a list, such as {next(iter(lists.values()))}."
            )
        return _read_list(folder, lists[part])
    found = [file.relative_to(folder).with_suffix("") for file in list_files(folder, [_SUFFIX])]
    return folder, [name.as_posix() for name in found]


def _read_list(folder: Path, listing: Path) -> tuple[Path, list[str]]:
    names = [slashed(line) for line in read_text(listing).splitlines() if line.strip()]
    if not names:
        raise UserValueError(f"{listing} lists no image.")
    for line, name in enumerate(names, 1):
        first, _, rest = name.partition(" ")
        if rest.strip() in ("-1", "0", "1") and not (folder / f"{name}{_SUFFIX}").is_file():
            raise UserValueError(
                f"{listing}, line {line}, is {name!r}: this is VOC's list for one class. Give a "
                f"list with the names of images alone, here {first!r}."
            )
    return folder, names


def _read_image(folder: Path, images: ImageFolder, notes: Notes, name: str) -> LabelledImage:
    file = folder / f"{name}{_SUFFIX}"
    if not file.is_file():
        raise UserFileNotFoundError(f"There is no annotation file {file}.")
    try:
        root = parse_annotations(str(file))
        if root.tag != "annotation":
            raise UserValueError(
                f"its root is {root.tag!r}, and VOC's is 'annotation': remove the file."
            )
        found = read_objects(root)
    except (ElementTree.ParseError, ValueError) as error:
        raise UserValueError(f"{file}: {_explain(file, error)}") from error
    objects = []
    for number, (item, element) in enumerate(zip(found, root.iterfind("object"), strict=True), 1):
        where = f"{file}, object {number}"
        if (boxes := len(element.findall("bndbox"))) > 1 or not item["name"]:
            wrong = f"{boxes} boxes" if boxes > 1 else "no name"
            raise UserValueError(
                f"{where} has {wrong}: an object has one box and the name of a class."
            )
        box = _read_box(item["bbox"], where, notes)
        objects.append(LabelledObject(item["name"], box, is_crowd=bool(item["difficult"])))
    if root.find("object/polygon") is not None:
        notes.add("files have polygons, which VOC does not define: the boxes are read", str(file))
    size = _read_size(root)
    meant = _names_of_image(name, root)
    known = images.find(*meant)
    if known is None:
        if not all(size):
            raise UserFileNotFoundError(
                f"{file} has no size, and there is no image {meant[0]!r} in {images.root}."
            )
        notes.add("images are not in the folder of images", f"{meant[0]} of {file}")
    return LabelledImage(known or meant[0], size, objects)


def _explain(file: Path, error: Exception) -> str:
    if file.stat().st_size == 0:
        return "the file is empty. For an image without objects write <annotation></annotation>."
    if isinstance(error, ElementTree.ParseError):
        return f"this is not XML ({error}). Fix the file, or remove it and its image."
    return str(error.args[0])


def _read_box(corners: list[float], where: str, notes: Notes) -> list[float]:
    left, top, right, bottom = map(exact, corners)
    if right < left - 1 or bottom < top - 1:  # a box of less than a pixel is no swapped one
        notes.add("boxes have their corners swapped and are corrected", where)
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
    """Return the possible names of the image, the most likely name first. Images are often renamed
    together with their XML files, in which the old name stays."""
    inside = root.findtext("filename") or root.findtext("path") or ""
    suffix = PurePosixPath(last_part(inside)).suffix or ".jpg"
    return [f"{name}{suffix}", name, slashed(inside)]
