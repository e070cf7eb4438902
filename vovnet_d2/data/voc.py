# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""PASCAL VOC: a loader that trains without difficult objects, and a check of the files.

Detectron2 registers ``voc_2007_trainval`` and so on. Its loader treats difficult objects like all
other objects, as DSOD does. RefineDet is trained without them.
"""

import math
import os
import xml.etree.ElementTree as ElementTree
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from difflib import get_close_matches
from functools import partial
from glob import escape as glob_escape
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.pascal_voc import CLASS_NAMES
from detectron2.structures import BoxMode
from detectron2.utils.file_io import PathManager

from ..errors import UserFileNotFoundError, UserValueError
from ..words import counted, listed
from .image_file import read_header

Record = dict[str, Any]

_OURS = "_no_difficult"  # the end of the names of data sets that this module's loader reads


def load_voc(dirname: str, split: str, class_names: Sequence[str] = CLASS_NAMES) -> list[Record]:
    """Load a split in Detectron2's format. Difficult objects get ``iscrowd`` 1, which excludes them
    from training.

    Args:
        dirname: the folder of "Annotations", "ImageSets" and "JPEGImages".
        split: a file of "ImageSets/Main" without its suffix, such as "trainval".

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the class of an object is not in ``class_names``.
    """
    listing = os.path.join(dirname, "ImageSets", "Main", f"{split}.txt")
    with PathManager.open(listing) as file:
        names = [line.split()[0] for line in file if line.strip()]
    return [_load_image(dirname, name, list(class_names)) for name in names]


def _load_image(dirname: str, name: str, class_names: list[str]) -> Record:
    path = os.path.join(dirname, "Annotations", f"{name}.xml")
    try:
        tree = parse_annotations(path)
        objects = read_objects(tree)
        sizes = {side: int(_number(tree, f"size/{side}")) for side in ("height", "width")}
    except (ElementTree.ParseError, ValueError) as error:
        raise UserValueError(f"{path}: {error}") from error
    annotations = []
    for found in objects:
        if found["name"] not in class_names:
            raise UserValueError(
                f"{path} has an object of class {found['name']!r}, which is not among "
                f"{', '.join(class_names)}."
            )
        left, top, right, bottom = found["bbox"]
        annotations.append(
            {
                "category_id": class_names.index(found["name"]),
                # Pixels are counted from 1 and the last one belongs to the object.
                "bbox": [left - 1, top - 1, right, bottom],
                "bbox_mode": BoxMode.XYXY_ABS,
                "iscrowd": found["difficult"],
            }
        )
    return {
        "file_name": os.path.join(dirname, "JPEGImages", f"{name}.jpg"),
        "image_id": name,
        "annotations": annotations,
        **sizes,
    }


def parse_annotations(path: str) -> ElementTree.Element:
    with PathManager.open(path, "rb") as file:  # the file says its encoding
        return ElementTree.parse(file).getroot()


def read_objects(tree: ElementTree.Element) -> list[Record]:
    """Return the objects of an annotation file as dicts with "name", "difficult" (0 or 1) and
    "bbox" (the four numbers as they are written). Raise ValueError if an object lacks its name or a
    number."""
    return [
        {
            "name": _text(item, "name").strip(),
            "difficult": _flag(item, "difficult"),
            "bbox": [_number(item, f"bndbox/{k}") for k in ("xmin", "ymin", "xmax", "ymax")],
        }
        for item in tree.findall("object")
    ]


def _text(element: ElementTree.Element, path: str) -> str:
    text = element.findtext(path)
    if text is None:
        raise UserValueError(f"An annotation of PASCAL VOC lacks {path!r} in its {element.tag!r}.")
    return text


def _number(element: ElementTree.Element, path: str) -> float:
    text = _text(element, path)
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise UserValueError(
            f"An annotation of PASCAL VOC has {text.strip()!r} for {path!r} in its "
            f"{element.tag!r}, which must be a number."
        )
    return number


def _flag(element: ElementTree.Element, path: str) -> int:
    """Read 0 or 1. A missing or empty element is 0, as labelling tools leave it."""
    text = (element.findtext(path) or "").strip().lower()
    known = {"": 0, "0": 0, "false": 0, "unspecified": 0, "1": 1, "true": 1}
    if text not in known:
        raise UserValueError(
            f"An annotation of PASCAL VOC has {text!r} for {path!r} in its {element.tag!r}, which "
            "must be 0 or 1."
        )
    return known[text]


def is_voc_set(name: str) -> bool:
    """Return True if a data set is registered as a folder in PASCAL VOC's layout."""
    if name not in DatasetCatalog:
        return False
    metadata = MetadataCatalog.get(name)
    is_voc = metadata.get("evaluator_type") == "pascal_voc"
    return is_voc and bool(metadata.get("dirname")) and bool(metadata.get("split"))


def check_voc_set(name: str) -> int:
    """Check all files of a registered data set by :func:`check_voc`, and return the number of
    images."""
    metadata = MetadataCatalog.get(name)
    arguments = metadata.dirname, metadata.split, metadata.thing_classes
    try:
        return check_voc(*arguments, by_detectron2=not name.endswith(_OURS))
    except FileNotFoundError as error:
        raise UserFileNotFoundError(f"Data set {name}: {error}") from error
    except ValueError as error:
        raise UserValueError(f"Data set {name}: {error}") from error


def check_voc(dirname: str, split: str, class_names: Sequence[str], *, by_detectron2: bool) -> int:
    """Check all files of a split before a run, and return the number of images.

    Args:
        dirname, split: see :func:`load_voc`.
        class_names: the classes of the network.
        by_detectron2: True if Detectron2's loader reads the split. That loader cannot take a list
            of one image or sizes with fractions.

    Raises:
        FileNotFoundError: the list of images is missing.
        ValueError: a file has a fault. The message names the first file and its element, counts the
            others, and lists all classes that are unlike those in ``class_names``.
    """
    listing = os.path.join(dirname, "ImageSets", "Main", f"{split}.txt")
    if not os.path.isfile(listing):
        raise UserFileNotFoundError(f"There is no list of images {listing}.")
    try:
        lines = Path(listing).read_bytes().decode("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise UserValueError(
            f"{listing} is not UTF-8: byte {error.start} is not a character."
        ) from error
    names = [line.strip() for line in lines if line.strip()]
    if names and names[0].startswith("\ufeff"):
        raise UserValueError(f"{listing} begins with a byte order mark: save it without one.")
    if not names:
        raise UserValueError(f"{listing} lists no image.")
    if wrong := next((name for name in names if len(name.split()) > 1), None):
        raise UserValueError(
            f"{listing} has the line {wrong!r}: leave the name of the image alone on its line."
        )
    if len(names) == 1 and by_detectron2:
        raise UserValueError(f"{listing} lists one image, which Detectron2's loader cannot take.")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        check = partial(_find_problem, dirname, set(class_names), by_detectron2)
        problems = [problem for problem in pool.map(check, names) if problem]
    if problems:
        more = len(problems) - 1
        others = f" {counted(more, 'more images')} {'have' if more > 1 else 'has'} problems."
        foreign = _describe_foreign_classes(dirname, names, set(class_names))
        raise UserValueError(f"{problems[0].rstrip('.')}.{others if more else ''}{foreign}")
    return len(names)


def _describe_foreign_classes(dirname: str, names: Sequence[str], classes: set[str]) -> str:
    """Return a sentence that names the classes of a folder that are not misspelt ``classes``, and
    says what to do. Return an empty string if there are none."""
    found: set[str] = set()
    for name in names:
        with suppress(ElementTree.ParseError, OSError):
            tree = parse_annotations(os.path.join(dirname, "Annotations", f"{name}.xml"))
            found |= {item.findtext("name", "").strip() for item in tree.findall("object")}
    foreign = sorted(name for name in found - classes - {""} if not _find_close(name, classes))
    if not foreign:
        return ""
    return (
        f" The folder has {counted(len(foreign), 'other classes')} ({listed(foreign, most=10)}): "
        f"for a custom data set give --train-annotations {dirname} and --val-annotations "
        f"{dirname}, and no name of PASCAL VOC."
    )


def _find_close(name: str, classes: Collection[str]) -> list[str]:
    return get_close_matches(name.lower(), classes, n=1, cutoff=0.7)


def _find_problem(dirname: str, classes: set[str], by_detectron2: bool, name: str) -> str:
    path = os.path.join(dirname, "Annotations", f"{name}.xml")
    try:
        tree = parse_annotations(path)
        size = _number(tree, "size/width"), _number(tree, "size/height")
        objects = read_objects(tree)
    except FileNotFoundError:
        hint = ": leave out the suffix in the list" if Path(name).suffix else ""
        return f"There is no annotation file {path}{hint}."
    except (ElementTree.ParseError, OSError, ValueError) as error:
        return f"{path}: {error}"
    if by_detectron2 and any(not _text(tree, f"size/{k}").strip().isdigit() for k in _SIDES):
        return f"{path}: 'size' must be whole numbers for Detectron2's loader."
    names = [item.findtext("name", "") for item in tree.findall("object")]
    if by_detectron2 and any(text != text.strip() for text in names):
        return f"{path}: a 'name' has spaces around it, which Detectron2's loader does not take."
    for index, found in enumerate(objects):
        if problem := _problem_of_object(found, classes):
            return f"{path}: object {index} {problem}"
    return _problem_of_image(dirname, name, size, path)


_SIDES = ("width", "height")


def _problem_of_object(found: Record, classes: set[str]) -> str:
    name = found["name"]
    if name not in classes:
        close = _find_close(name, classes)
        hint = f" (close to it: {close[0]!r})" if close else ""
        return f"is of class {name!r}{hint}, which is not among {', '.join(sorted(classes))}."
    left, top, right, bottom = found["bbox"]
    if right <= left or bottom <= top:
        return f"has the box {found['bbox']}, whose maxima are not above its minima."
    return ""


def _problem_of_image(dirname: str, name: str, size: tuple[float, float], path: str) -> str:
    folder = Path(dirname, "JPEGImages")
    file = folder / f"{name}.jpg"
    if not file.is_file():
        beside = sorted(other.name for other in folder.glob(f"{glob_escape(name)}.*"))
        hint = f", but {', '.join(beside)}: rename it" if beside else ""
        return f"There is no image {file}{hint}."
    try:
        found = read_header(file).size
    except (FileNotFoundError, ValueError):
        return f"{file} is not a picture that can be read."
    if found != size:
        written, read = (f"{w:g} x {h:g}" for w, h in (size, found))
        return f"{path}: 'size' is {written}, but the image is {read} after EXIF turns it."
    return ""


def register_voc() -> None:
    """Register ``voc_{2007,2012}_{train,val,trainval,test}_no_difficult``; a second call does
    nothing. Like Detectron2's data sets, they lie under ``$DETECTRON2_DATASETS``."""
    root = Path(os.environ.get("DETECTRON2_DATASETS", "datasets")).expanduser()
    for year in (2007, 2012):
        dirname = str(root / f"VOC{year}")
        for split in ("train", "val", "trainval", "test"):
            name = f"voc_{year}_{split}{_OURS}"
            # The test split of 2012 has no boxes.
            if name in DatasetCatalog or (year, split) == (2012, "test"):
                continue
            DatasetCatalog.register(name, partial(load_voc, dirname, split))
            MetadataCatalog.get(name).set(
                thing_classes=list(CLASS_NAMES),
                dirname=dirname,
                year=year,
                split=split,
                evaluator_type="pascal_voc",
            )
