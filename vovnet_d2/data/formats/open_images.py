# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""CSV of Open Images has a row for each box, in fractions of the image's sides.

Labels are names, or codes ("/m/01g317") whose names are in another file of the same folder
("class-descriptions.csv"). A box around a group of objects (``IsGroupOf``) becomes a crowd.
"""

import csv
import io
from collections.abc import Iterator
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from ...errors import UserFileNotFoundError, UserValueError
from .exact import read_number
from .images import ImageFolder, read_text
from .labelled import Content, LabelledImage, LabelledObject, to_coco
from .notes import Notes, read_each

_SIDES = ("XMin", "XMax", "YMin", "YMax")
_NEEDED = ("ImageID", "LabelName", *_SIDES)
_COLUMNS = ("ImageID", "Source", "LabelName", "Confidence", *_SIDES, "IsGroupOf")
_DESCRIPTIONS = "class-descriptions"
_MOST = 2  # larger numbers are pixels and not fractions


class _Row(NamedTuple):
    """A row of the file: ``box`` has the fractions in the order of :data:`_SIDES`."""

    image: str
    label: str
    box: list[Decimal]
    is_group: bool
    where: str


def is_open_images(path: Path) -> bool:
    """Return True if a path is a CSV file."""
    return path.is_file() and path.suffix.lower() == ".csv"


def find_images(path: Path, part: str | None) -> Path | None:
    """Return None, as the file does not say where its images are."""
    return None


def read(path: Path, images: Path, part: str | None, notes: Notes) -> Content:
    """Read a file of boxes into COCO's format. Raise FileNotFoundError if a file or folder is
    missing, and ValueError if a row is not as Open Images has it."""
    folder = ImageFolder(images)
    rows = read_each(_read_table(path), _read_row, "rows")
    if not rows:
        raise UserValueError(f"{path} has no row below its header: nothing is annotated.")
    first = {row.image: row for row in reversed(rows)}
    files = dict(read_each(first.values(), partial(_find, folder), "images"))
    unique = list(dict.fromkeys(files.values()))
    sizes = zip(unique, folder.sizes(unique), strict=True)
    by_file = {file: LabelledImage(file, size, []) for file, size in sizes}
    names = _read_descriptions(path)
    for row in rows:
        image = by_file[files[row.image]]
        box = _to_pixels(row, image.size, notes)
        name = names.get(row.label, row.label)
        image.objects.append(LabelledObject(name, box, is_crowd=row.is_group))
    return to_coco(by_file.values())


def _read_table(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""), strict=True)
    try:
        columns = [(column or "").strip() for column in reader.fieldnames or []]
        _require_columns(path, columns)
        reader.fieldnames = columns
        for row in reader:
            yield f"{path}, line {reader.line_num}", row
    except csv.Error as error:
        raise UserValueError(f"{path}, line {reader.line_num}, is not CSV: {error}.") from error


def _require_columns(path: Path, columns: list[str]) -> None:
    if missing := [column for column in _NEEDED if column not in columns]:
        raise UserValueError(
            f"{path}, line 1, has no column {', '.join(missing)}: the header of Open Images is "
            f"{','.join(_COLUMNS)}, and {', '.join(_NEEDED)} are needed."
        )


def _read_row(line: tuple[str, dict[str, Any]]) -> _Row:
    where, row = line
    for column in ("ImageID", "LabelName"):
        if not (row[column] or "").strip():
            raise UserValueError(f"{where}, has no {column}: fill it in, or remove the row.")
    box = [read_number(row[side], f"{where}, column {side},") for side in _SIDES]
    if max(map(abs, box)) > _MOST:
        raise UserValueError(
            f"{where}, has {row[_SIDES[0]]}, {row[_SIDES[1]]}, {row[_SIDES[2]]}, {row[_SIDES[3]]} "
            "for a box, which must be fractions of the image's sides, from 0 to 1."
        )
    group = (row.get("IsGroupOf") or "").strip() == "1"
    return _Row(row["ImageID"].strip(), row["LabelName"].strip(), box, group, where)


def _find(folder: ImageFolder, row: _Row) -> tuple[str, str]:
    """Return the name of an image in the table, and the name of its file in the folder."""
    found = folder.find(row.image)
    if found is None:
        raise UserFileNotFoundError(
            f"{row.where}, is of image {row.image!r}, which is missing or ambiguous in "
            f"{folder.root}: the ImageID must be the name of a file, with or without its suffix."
        )
    return row.image, found


def _to_pixels(row: _Row, size: tuple[int, int], notes: Notes) -> list[float]:
    left, right, top, bottom = row.box
    if right < left or bottom < top:
        notes.add("boxes have their corners swapped and are corrected", row.where)
        left, right = sorted((left, right))
        top, bottom = sorted((top, bottom))
    return _pixels((left, right, top, bottom), size)


def _pixels(box: Any, size: tuple[int, int]) -> list[float]:
    """Return a box of fractions of the image as x, y, width and height in pixels."""
    left, right, top, bottom = box
    width, height = size
    parts = left * width, top * height, (right - left) * width, (bottom - top) * height
    return [float(part) for part in parts]


def _read_descriptions(path: Path) -> dict[str, str]:
    """Read the names of labels from the file of descriptions in the folder of the boxes."""
    files = sorted(path.parent.glob(f"*{_DESCRIPTIONS}*.csv"))
    if len(files) > 1:
        raise UserValueError(
            f"{path.parent} has several files of names, such as {files[0].name} and "
            f"{files[1].name}: keep only the one that belongs to the boxes."
        )
    if not files:
        return {}
    rows = csv.reader(io.StringIO(read_text(files[0]), newline=""))
    return {row[0].strip(): row[1].strip() for row in rows if len(row) >= 2 and row[1].strip()}
