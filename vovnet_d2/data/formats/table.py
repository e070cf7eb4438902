# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""The formats of annotations are recognised and read.

Three libraries read such files. They were tried in November 2026, and are not used for these
reasons:

- supervision 0.31 (MIT) gives boxes as float32 and polygons as the pixels of a mask, loses VOC's
  "difficult", stops at a byte order mark in Labelme's files, and has no CSV of Open Images.
- globox 2.9 (MIT) gives boxes alone, one pixel off for VOC, refuses a YOLO file that has boxes and
  polygons, and stops at swapped corners and at missing sizes without naming the element.
- datumaro 1.13 (MIT) needs NumPy 2.2 to 2.4 and Pillow 12, rounds coordinates to two decimals,
  makes objects of the parts of VOC's objects, and refuses polygons in YOLO's files.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ...atomic import write_text
from ...errors import UserFileNotFoundError, UserValueError
from ...words import counted, suggest_path
from ..own_files import read_coco
from . import labelme, open_images, voc, yolo
from .labelled import Content
from .notes import Notes


@dataclass(frozen=True)
class Format:
    """Describes a format of annotations that can be converted to COCO's format.

    Attributes:
        title: the name of the format.
        example: the path that a user gives, in words.
        matches: returns True if an existing path has this format.
        find_images: returns the folder of images for a path and a part, or None.
        read: reads a path, with a folder of images and a part, into COCO's format.
    """

    title: str
    example: str
    matches: Callable[[Path], bool]
    find_images: Callable[[Path, str | None], Path | None]
    read: Callable[[Path, Path, str | None, Notes], Content]


class Annotations(NamedTuple):
    """Holds annotations that were converted to COCO's format.

    Attributes:
        content: the annotations in COCO's format.
        images: the folder that file names are relative to.
        title: the name of the format.
        notes: a line for each kind of change or loss in the conversion.
    """

    content: Content
    images: Path
    title: str
    notes: list[str]

    def describe(self) -> str:
        """Return a line with the numbers of images and objects and the order of the categories."""
        counts = [len(self.content[section]) for section in ("images", "annotations")]
        names = ", ".join(f"{c['id']} {c['name']}" for c in self.content["categories"])
        return (
            f"{self.title}, {counted(counts[0], 'images')}, {counted(counts[1], 'objects')}; "
            f"the categories in their order are {names}."
        )


def _is_coco(path: Path) -> bool:
    return path.is_file() and path.suffix.lower() not in (".xml", ".txt")


def _read_coco(path: Path, images: Path, part: str | None, notes: Notes) -> Content:
    return read_coco(str(path))


def write_coco(content: Content, path: Path) -> None:
    """Write a file in COCO's format, whole, or raise FileNotWrittenError."""
    write_text(path, json.dumps(content, ensure_ascii=False))


FORMATS: dict[str, Format] = {
    "voc": Format(
        "PASCAL VOC XML",
        "a folder of .xml files, the folder that holds Annotations, or a list in ImageSets/Main",
        *(voc.is_voc, voc.find_images, voc.read),
    ),
    "labelme": Format(
        "Labelme JSON",
        "a folder of .json files",
        *(labelme.is_labelme, labelme.find_images, labelme.read),
    ),
    "csv": Format(
        "CSV of Open Images",
        "a .csv file",
        *(open_images.is_open_images, open_images.find_images, open_images.read),
    ),
    "yolo": Format(
        "YOLO text",
        "a data.yaml, or a folder of .txt files with classes.txt in it or above it",
        *(yolo.is_yolo, yolo.find_images, yolo.read),
    ),
    "coco": Format(
        "COCO JSON",
        "a .json file",
        *(_is_coco, lambda path, part: None, _read_coco),
    ),
}
"""The formats by their short names. The first format that matches is used. COCO comes last and
matches every other file."""


def describe_formats(separator: str = "; ") -> str:
    """List the formats and the paths to give for them, in words."""
    return separator.join(f"{known.title}: {known.example}" for known in FORMATS.values())


def recognise(path: Path) -> str:
    """Return the format of annotations, a key of :data:`FORMATS`. Raise FileNotFoundError if
    there is no such file or folder, and ValueError if the format is unknown."""
    if not path.exists():
        kind = "file" if path.suffix else "file or folder"
        raise UserFileNotFoundError(f"There is no annotation {kind} {path}.{suggest_path(path)}")
    for key, known in FORMATS.items():
        if known.matches(path):
            return key
    raise UserValueError(f"{path} has no annotations of a known format ({describe_formats()}).")


def read_annotations(path: Path, images: Path | None, part: str | None = None) -> Annotations:
    """Read annotations of any format.

    Args:
        path: a file or folder.
        images: the folder of images; None for the folder that the annotations name.
        part: a part of the annotations, such as "train" or "val"; None for all parts.

    Raises:
        FileNotFoundError: a file or folder is missing.
        ValueError: the format of the annotations is unknown, or they have a fault.
    """
    path = path.absolute()  # some formats look at the folders above
    known, notes = FORMATS[recognise(path)], Notes()
    folder = images or known.find_images(path, part)
    if folder is None:
        raise UserValueError(
            f"{path} is {known.title}, which does not say where its images are: give their folder."
        )
    content = known.read(path, folder, part, notes)
    return Annotations(content, folder, known.title, notes.lines())
