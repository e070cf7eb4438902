# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""The picture files of records in Detectron2's format are checked before a run."""

import logging
import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
from detectron2.structures import BoxMode

from ..errors import UserValueError
from .check.files import is_dark
from .check.names import NearNames
from .check.orientation import TurnedFile, judge
from .image_file import ImageHeader, read_header, read_image, why_unreadable

logger = logging.getLogger(__name__)

Record = Mapping[str, Any]
R = TypeVar("R")

# The most names, headers and pictures that are checked; they are spread over a large set.
_MAX_NAMES, _MAX_HEADERS, _MAX_READ = 20_000, 1000, 20


def check_files(
    records: Sequence[Record], name: str, *, roots: Sequence[str] = (), most_unusable: int = 0
) -> None:
    """Look for the picture files, and read the headers of a thousand of them. Warn of pictures that
    EXIF turns if their annotations may be for the picture as it is stored.

    Args:
        records: the records of a data set, in Detectron2's format.
        name: the name of the data set, for messages.
        roots: the folders of the pictures, in which a missing file is looked for by similar names.
        most_unusable: ``DATALOADER.MAX_UNREADABLE`` of a training.

    Raises:
        ValueError: more files are missing, unreadable or of other sizes than ``most_unusable``;
            annotations are for pictures before EXIF turns them; or pictures of 16 bits are black in
            their upper 8.
    """
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        named = [r for r in spread(records, _MAX_NAMES) if _is_local(r)]
        there = list(pool.map(_is_there, named))
        looked_at = [r for r in spread(records, _MAX_HEADERS) if _is_local(r) and _is_there(r)]
        headers = list(pool.map(_header, looked_at))
    unusable = {r["file_name"]: "" for r, found in zip(named, there, strict=True) if not found}
    known = list(zip(looked_at, headers, strict=True))
    unusable |= {r["file_name"]: why for r, header in known if (why := _why_unusable(r, header))}
    if len(unusable) > most_unusable:
        file, reason = next(iter(unusable.items()))
        more = f" {len(unusable) - 1} more cannot be used." if len(unusable) > 1 else ""
        raise UserValueError(
            f"Data set {name}: {file} cannot be used: {reason or _why_missing(file, roots)}.{more} "
            "tools/check_dataset.py lists all such images. DATALOADER.MAX_UNREADABLE is the number "
            "of images that a training may leave out."
        )
    usable = [(r, header) for r, header in known if header and r["file_name"] not in unusable]
    _check_orientations(usable, name, len(records))
    _check_depths([r["file_name"] for r, header in usable if header.bits > 8], name, len(usable))


def has_size_of_file(record: Record) -> bool:
    """Return True if a record's picture can be opened and has the size that the record says."""
    header = _header(record)
    return header is not None and _given_size(record) in (None, header.size)


def spread(records: Sequence[R], most: int) -> list[R]:
    """Choose up to ``most`` records at even distances."""
    count = min(len(records), most)
    return [records[i * len(records) // count] for i in range(count)]


def _is_local(record: Record) -> bool:
    """Return True if a record has a path on this machine, and not an address such as
    s3://bucket/a."""
    return "file_name" in record and not re.match("[a-z0-9]+://", record["file_name"])


def _is_there(record: Record) -> bool:
    return os.path.isfile(record["file_name"])


def _header(record: Record) -> ImageHeader | None:
    try:
        return read_header(record["file_name"])
    except (FileNotFoundError, ValueError):  # a later reading says what is wrong
        return None


def _given_size(record: Record) -> tuple[int, int] | None:
    return (record["width"], record["height"]) if "width" in record and "height" in record else None


def _why_missing(file: str, roots: Sequence[str]) -> str:
    for root in roots:
        near = NearNames(root).find(file.removeprefix(os.path.join(root, "")))
        if near:
            return f"there is no such file, and the one that is meant seems to be {near!r}"
    return "there is no such file"


def _why_unusable(record: Record, header: ImageHeader | None) -> str:
    if header is None or header.bits > 16:
        return why_unreadable(record["file_name"])
    given = _given_size(record)
    if given in (None, header.size):
        return ""
    read, written = (" x ".join(map(str, size)) for size in (header.size, given or ()))
    if given == header.stored_size:
        return (
            f"its EXIF orientation turns it to {read} before the training, but its annotations are "
            f"for the {written} that are stored (tools/check_dataset.py --fix turns them)"
        )
    return f"it has {read} pixels, and its annotations say {written}"


# Orientation


def _check_orientations(
    usable: Sequence[tuple[Record, ImageHeader]], name: str, num_records: int
) -> None:
    turned = [_turned_file(r, header) for r, header in usable if header.orientation != 1]
    verdicts = judge(turned)
    of = f"{len(usable)} pictures" + (" looked at" if len(usable) < num_records else "")
    if stored := [file for file in turned if verdicts[file.path] == "stored"]:
        raise UserValueError(
            f"Data set {name}: {len(stored)} of the {of} are turned by their EXIF orientation "
            f"before the training, for example {stored[0].path}, but their annotations are for the "
            "pictures as they are stored. tools/check_dataset.py --fix turns annotations in COCO's "
            "format; or remove the orientation from the files."
        )
    if unclear := [f for f in turned if verdicts[f.path] == "unclear" and f.boxes]:
        logger.warning(
            "Data set %s: %d of the %s are turned by their EXIF orientation before the training, "
            "for example %s. Check with tools/visualize_data.py that the annotations fit the "
            "turned pictures.",
            *(name, len(unclear), of, unclear[0].path),
        )


def _turned_file(record: Record, header: ImageHeader) -> TurnedFile:
    boxes = [
        BoxMode.convert(list(map(float, a["bbox"])), a["bbox_mode"], BoxMode.XYWH_ABS)
        for a in record.get("annotations", ())
        if "bbox" in a and a.get("bbox_mode") in (BoxMode.XYWH_ABS, BoxMode.XYXY_ABS)
    ]
    boxes = [np.asarray(box).tolist() for box in boxes]
    where = {"path": record["file_name"], "given_size": _given_size(record)}
    return TurnedFile(**vars(header), **where, boxes=boxes)


# Depth


def _check_depths(deep: list[str], name: str, num_files: int) -> None:
    if not deep:
        return
    looked_at = [file for file in deep[:_MAX_READ] if not why_unreadable(file)]
    if looked_at and all(is_dark(read_image(file)) for file in looked_at):
        raise UserValueError(
            f"Data set {name}: the pictures of 16 bits, for example {deep[0]}, use the lower 12 "
            "bits alone. Only the upper 8 bits are read, and there the pictures are almost black: "
            "spread the values to 0 to 65535, or write 8 bits."
        )
    logger.info(
        "Data set %s: %d of %d pictures have 16 bits per channel: the upper 8 are read.",
        *(name, len(deep), num_files),
    )
