# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""YOLO has a text file for each image, with a line for each box or polygon in fractions of the
image's sides. The names of the classes are in data.yaml or classes.txt.

An image without a text file has no objects, as in Ultralytics' training.
"""

import os
from collections.abc import Sequence
from decimal import Decimal
from functools import partial
from itertools import cycle, takewhile
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import yaml

from ...errors import UserFileNotFoundError, UserValueError, one_line
from ...words import counted
from .exact import read_number
from .images import IMAGE_SUFFIXES, ImageFolder, list_files, read_text, slashed
from .labelled import Content, LabelledImage, LabelledObject, box_around, to_coco
from .notes import Notes, read_each

_YAML = (".yaml", ".yml")
_NAMES = ("classes.txt", "obj.names", "labels.txt", "classes.names")
_NO_LABELS = (*_NAMES, "train.txt", "val.txt", "valid.txt", "test.txt")
_MOST = 2  # larger numbers are pixels and not fractions


class _Classes(NamedTuple):
    """Describes the classes and the number of keypoint values of a YOLO data set.

    Attributes:
        file: the file with the names.
        names: the names of the classes, in the order of their numbers.
        num_keypoint_values: how many numbers follow the box in each line.
    """

    file: Path
    names: list[str]
    num_keypoint_values: int = 0


class _Pair(NamedTuple):
    """An image, relative to the folder of images, and its text file, which may be missing."""

    image: str
    labels: Path


def is_yolo(path: Path) -> bool:
    """Return True if a path is a data.yaml, or a folder with a data.yaml or with text files."""
    if path.is_file():
        return path.suffix.lower() in _YAML
    return path.is_dir() and bool(_find_yaml(path) or list_files(path, [".txt"]))


def find_images(path: Path, part: str | None) -> Path | None:
    """Return the folder of images: the one in data.yaml, or "images" if the labels are in "labels",
    or the folder of the labels."""
    described = path if path.is_file() else _find_yaml(path)
    if described:
        listed = [os.path.dirname(image) for image in _listed_images(described, part)]
        return Path(os.path.commonpath(listed)) if listed else None
    labels = _labels_folder(path, part)
    beside = _swap(labels, "labels", "images")
    return beside if beside and beside.is_dir() else labels


def read(path: Path, images: Path, part: str | None, notes: Notes) -> Content:
    """Read a data set of YOLO into COCO's format. All images of the folder belong to the data set,
    or all images that data.yaml lists.

    Args:
        path: data.yaml, a folder that holds it, or a folder of text files.
        images: the folder of images.
        part: the part of data.yaml to take, or the folder below "labels".
        notes: gets the changes and losses.

    Raises:
        FileNotFoundError: a file or folder is missing.
        ValueError: a file is not YOLO's.
    """
    folder = ImageFolder(images)
    described = path if path.is_file() else _find_yaml(path)
    if described:
        classes = _read_yaml(described)
        pairs = _pairs_of_yaml(described, part, folder)
    else:
        labels = _labels_folder(path, part)
        classes = _find_classes(labels)
        pairs = _pairs_of_folders(labels, folder, part, notes)
    without = [pair for pair in pairs if not pair.labels.is_file()]
    if len(without) == len(pairs):
        where = f", for example {pairs[0].labels}" if pairs else ""
        raise UserFileNotFoundError(
            f"None of the {len(pairs)} images in {images} has a text file{where}: give the folder "
            "of the images that belong to the labels."
        )
    for pair in without:
        notes.add("images have no text file and so no objects", pair.image)
    sizes = folder.sizes([pair.image for pair in pairs])
    parse = partial(_read_image, classes, notes)
    return to_coco(read_each(zip(pairs, sizes, strict=True), parse), classes.names)


# Where the files are


def _find_yaml(folder: Path) -> Path | None:
    """Return the YAML file of a folder that names classes; None if there is none."""
    files = (file for suffix in _YAML for file in sorted(folder.glob(f"*{suffix}")))
    return next(filter(_names_classes, files), None)


def _names_classes(file: Path) -> bool:
    try:
        return "names" in _load_yaml(file)
    except ValueError:  # a broken data.yaml is reported later; another file is of another program
        return file.stem == "data"


def _load_yaml(file: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(read_text(file))
    except yaml.YAMLError as error:
        raise UserValueError(f"{file} is not YAML: {one_line(error)}.") from error
    if not isinstance(content, dict):
        raise UserValueError(
            f"{file} does not describe a data set: write names, and the folders train and val."
        )
    return content


def _listed_images(file: Path, part: str | None, folder: ImageFolder | None = None) -> list[str]:
    """List the paths of the images in a part of data.yaml, or in all parts. Images whose path in
    the file is wrong are looked for in ``folder``."""
    content = _load_yaml(file)
    parts = {key: content[key] for key in ("train", "val", "valid", "test") if content.get(key)}
    parts |= {"val": parts.pop("valid")} if "val" not in parts and "valid" in parts else {}
    parts |= {"all": content["all"]} if content.get("all") else {}
    if part and part not in parts:
        raise UserValueError(
            f"{file} has no {part!r}, but {', '.join(parts) or 'no part at all'}: add it, or give "
            "the folders of the labels and of the images, such as by --train-annotations and "
            "--train-images."
        )
    entries = [parts[part]] if part else list(parts.values())
    flat = [e for entry in entries for e in (entry if isinstance(entry, list) else [entry])]
    base = file.parent / slashed(str(content.get("path") or ""))
    bases = (base, file.parent)
    found = [image for entry in flat for image in _expand(file, str(entry), bases, folder)]
    return list(dict.fromkeys(found))


def _expand(file: Path, entry: str, bases: Sequence[Path], folder: ImageFolder | None) -> list[str]:
    """List the images of an entry: a folder, or a text file that lists images."""
    path = _resolve(entry, bases)
    if path is None and folder and not entry.endswith(".txt"):
        path = folder.root
    if path is None:
        raise UserFileNotFoundError(
            f"{file} names {entry!r}, which does not exist: write the path relative to the file."
        )
    if path.is_dir():
        return [str(image) for image in list_files(path, IMAGE_SUFFIXES)]
    lines = [line.strip() for line in read_text(path).splitlines() if line.strip()]
    found = {line: _resolve(line, (path.parent, *bases)) for line in lines}
    if folder:
        for line in [line for line, image in found.items() if image is None]:
            name = folder.find(line)
            found[line] = folder.root / name if name else None
    if missing := [line for line, image in found.items() if image is None]:
        raise UserFileNotFoundError(
            f"{path} lists {missing[0]!r}, which does not exist ({len(missing)} of {len(lines)} "
            "are missing): give the folder of images, or write the paths relative to the file."
        )
    return [str(image) for image in found.values()]


def _resolve(entry: str, bases: Sequence[Path]) -> Path | None:
    """Find the file or folder of a path that may have been written on another machine. The path is
    tried as it is, then without leading "..", then by its last parts, at least two of them."""
    parts = PurePosixPath(slashed(entry)).parts
    ups = len(list(takewhile("..".__eq__, parts)))
    for start in (0, *range(ups, max(ups + 1, len(parts) - 1))):
        for base in bases:
            path = Path(os.path.normpath(base.joinpath(*parts[start:])))
            if path.exists():
                return path
    return None


def _pairs_of_yaml(file: Path, part: str | None, folder: ImageFolder) -> list[_Pair]:
    root = os.path.abspath(folder.root)
    pairs = []
    for path in _listed_images(file, part, folder):
        name = os.path.relpath(path, root).replace(os.sep, "/")
        if name.startswith("../"):
            raise UserValueError(
                f"{file} lists {path}, which is not in the folder of images {folder.root}: give "
                "the folder that holds all of them, or none."
            )
        image = Path(path)
        swapped = _swap(image.parent, "images", "labels") or image.parent
        places = [swapped / image.name, image, file.parent / "labels" / name]
        candidates = [place.with_suffix(".txt") for place in places]
        pairs.append(_Pair(name, next((c for c in candidates if c.is_file()), candidates[0])))
    return pairs


def _pairs_of_folders(
    labels: Path, folder: ImageFolder, part: str | None, notes: Notes
) -> list[_Pair]:
    files = {f for f in list_files(labels, [".txt"]) if f.name not in _NO_LABELS}
    inside = folder.root
    if part and labels.name == part and (inside / part).is_dir():
        inside = inside / part  # images of other parts have no labels here
    pairs = []
    for image in list_files(inside, IMAGE_SUFFIXES):
        path = image.relative_to(inside).with_suffix(".txt")
        candidates = [labels / path, labels / path.name]
        chosen = next((c for c in candidates if c in files), candidates[0])
        pairs.append(_Pair(image.relative_to(folder.root).as_posix(), chosen))
    for file in sorted(files - {pair.labels for pair in pairs}):
        notes.add("text files have no image and are left out", str(file))
    return pairs


def _labels_folder(path: Path, part: str | None) -> Path:
    folder = path / "labels" if (path / "labels").is_dir() else path
    return folder / part if part and (folder / part).is_dir() else folder


def _swap(path: Path, old: str, new: str) -> Path | None:
    """Replace the last part of a path that equals ``old``; None if there is no such part."""
    parts = list(path.parts)
    if old not in parts:
        return None
    parts[len(parts) - 1 - parts[::-1].index(old)] = new
    return Path(*parts)


# Classes


def _find_classes(labels: Path) -> _Classes:
    for folder in (labels, labels.parent, labels.parent.parent):
        if described := _find_yaml(folder):
            return _read_yaml(described)
        for name in _NAMES:
            if (folder / name).is_file():
                return _read_names(folder / name)
    raise UserFileNotFoundError(
        f"There are no names of classes in {labels} or above it: write them to "
        f"{labels / _NAMES[0]}, one a line in the order of their numbers, or give a data.yaml."
    )


def _read_names(file: Path) -> _Classes:
    names = [line.strip() for line in read_text(file).splitlines()]
    while names and not names[-1]:
        names.pop()
    return _Classes(file, _require_names(file, names))


def _read_yaml(file: Path) -> _Classes:
    content = _load_yaml(file)
    names = content.get("names")
    if isinstance(names, dict):
        numbered = {str(number): name for number, name in names.items()}
        if numbered.keys() != set(map(str, range(len(names)))):
            raise UserValueError(
                f"{file}: names has the numbers {list(names)!r:.60}, which must count from 0."
            )
        names = [numbered[str(number)] for number in range(len(names))]
    if not isinstance(names, list):
        raise UserValueError(f'{file} has no list "names" of classes: add it.')
    if isinstance(count := content.get("nc"), int) and count != len(names):
        raise UserValueError(
            f"{file} has nc {count} and {counted(len(names), 'names')}: make them agree."
        )
    shape = content.get("kpt_shape") or [0]
    if not isinstance(shape, list) or not all(isinstance(n, int) for n in shape):
        raise UserValueError(f"{file}: kpt_shape is {shape!r:.40}, and must be two numbers.")
    values = shape[0] * (shape[1] if len(shape) > 1 else 0)
    return _Classes(file, _require_names(file, [str(name).strip() for name in names]), values)


def _require_names(file: Path, names: list[str]) -> list[str]:
    if not names or not all(names):
        raise UserValueError(
            f"{file} has no name for class {len(names) and names.index('')}: add it."
        )
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserValueError(f"{file} has the name {twice!r} for two classes: give each its own.")
    return names


# Lines


def _read_image(
    classes: _Classes, notes: Notes, item: tuple[_Pair, tuple[int, int]]
) -> LabelledImage:
    (name, labels), size = item
    objects: list[LabelledObject] = []
    if labels.is_file():
        for number, line in enumerate(read_text(labels).splitlines(), 1):
            if line.strip():
                where = f"{labels}, line {number}"
                objects.append(_read_line(line.split(), size, classes, where, notes))
    return LabelledImage(name, size, objects)


def _read_line(
    words: list[str], size: tuple[int, int], classes: _Classes, where: str, notes: Notes
) -> LabelledObject:
    name = _name_of(words[0], classes, where)
    numbers = [read_number(word, where) for word in words[1:]]
    if classes.num_keypoint_values and len(numbers) == 4 + classes.num_keypoint_values:
        notes.add("objects have keypoints, which are not read", where)
        numbers = numbers[:4]
    if len(numbers) != 4 and (len(numbers) < 6 or len(numbers) % 2):
        hint = " (remove the score at the end)" if len(numbers) == 5 else ""
        raise UserValueError(
            f"{where}, has {len(words)} numbers: a box has 5 (class, centre x and y, width and "
            f"height), and a polygon of three points or more has an odd number from 7 on{hint}."
        )
    if max(map(abs, numbers)) > _MOST:
        raise UserValueError(
            f"{where}, has {max(numbers, key=abs)}: the numbers after the class are fractions of "
            "the image's sides, from 0 to 1."
        )
    if len(numbers) > 4:
        polygon = [float(n * side) for n, side in zip(numbers, cycle(size), strict=False)]
        return LabelledObject(name, box_around([polygon]), [polygon])
    if numbers[2] < 0 or numbers[3] < 0:
        notes.add("boxes have a negative width or height, which is taken as positive", where)
        numbers[2:] = map(abs, numbers[2:])
    return LabelledObject(name, _pixels(numbers, size))


def _name_of(word: str, classes: _Classes, where: str) -> str:
    number = read_number(word, where)
    if number != int(number) or not 0 <= number < len(classes.names):
        raise UserValueError(
            f"{where}, is of class {word}, but {classes.file} names "
            f"{counted(len(classes.names), 'classes')}, 0 to {len(classes.names) - 1}: "
            "add the name, or correct the number."
        )
    return classes.names[int(number)]


def _pixels(numbers: Sequence[Decimal], size: tuple[int, int]) -> list[float]:
    x, y, width, height = numbers
    left, top = (x - width / 2) * size[0], (y - height / 2) * size[1]
    return [float(value) for value in (left, top, width * size[0], height * size[1])]
