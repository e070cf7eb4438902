# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Kinds of data sets that users have. Each kind is a good data set, changed by one function.

The kinds come from public bug reports. :mod:`test_input_kinds` runs every tool on each of them.
"""

import copy
import json
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

ORIENTATION = 274  # the tag in EXIF
HEIGHT, WIDTH = 64, 80
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (40, 60, 230)}
NAN, INF = float("nan"), float("inf")

Record = dict[str, Any]


class Data:
    """Good data set of coloured rectangles with boxes and polygons, for tests to damage.

    Attributes:
        folder: the folder of both annotation files and of ``images``.
        content: the content of the annotation files, "train" and "val".
        raw: text that is written to a file instead of its content.
    """

    def __init__(self, folder: Path):
        self.folder, self.images = folder, folder / "images"
        self.images.mkdir(parents=True)
        self.raw: dict[str, str] = {}
        self.content = {
            split: self._make(split, seed) for split, seed in (("train", 1), ("val", 2))
        }

    def _make(self, split: str, seed: int) -> Record:
        rng = np.random.default_rng(seed)
        images, annotations = [], []
        for number in range(6 if split == "train" else 3):
            pixels = rng.integers(90, 130, (HEIGHT, WIDTH, 3)).astype(np.uint8)
            image = {"id": 10 * seed + number, "file_name": f"{split}_{number}.png"}
            image |= {"height": HEIGHT, "width": WIDTH}
            for _ in range(3):
                w, h = (int(n) for n in rng.integers(14, 30, 2))
                x, y = int(rng.integers(1, WIDTH - w)), int(rng.integers(1, HEIGHT - h))
                category = int(rng.integers(3))
                pixels[y : y + h, x : x + w] = list(COLOURS.values())[category]
                # One corner is cut off, because the check warns if all masks are rectangles.
                polygon = [x, y + 4, x + 4, y, x + w, y, x + w, y + h, x, y + h]
                annotations.append(
                    {"id": len(annotations) + 1, "image_id": image["id"], "iscrowd": 0}
                    | {"category_id": category + 1, "bbox": [x, y, w, h], "area": w * h - 8}
                    | {"segmentation": [[float(n) for n in polygon]]}
                )
            Image.fromarray(pixels).save(self.images / image["file_name"])
            images.append(image)
        categories = [{"id": i, "name": name} for i, name in enumerate(COLOURS, start=1)]
        return {"images": images, "annotations": annotations, "categories": categories}

    def path(self, split: str) -> Path:
        return self.folder / f"{split}.json"

    def write(self) -> None:
        for split, content in self.content.items():
            text = self.raw.get(split) or json.dumps(content)
            self.path(split).write_text(text, encoding="utf-8", errors="surrogatepass")

    def records(self, section: str) -> list[Record]:
        return [r for content in self.content.values() for r in content[section]]

    def files(self) -> list[Path]:
        return sorted(self.images.iterdir())


Change = Callable[[Data], None]

# Possible outcomes of a tool on a kind of data.
SAME = "as with the good data"
WORKS = "works"
REFUSED = "one sentence, status 2"
FOUND = "problems listed, status 1"


@dataclass(frozen=True)
class Kind:
    """Kind of data set, and the outcome of each tool on it.

    Attributes:
        change: turns the good data set into one of this kind.
        expected: the outcomes by the name of the tool. The outcome of other tools is SAME.
        says: a regular expression that matches the messages of tools that refuse the data.
        masks: True if the networks learn masks.
        options: keys and values of the config for training and evaluation.
    """

    change: Change
    expected: dict[str, str] = field(default_factory=dict)
    says: str = ""
    masks: bool = False
    options: tuple[str, ...] = ()


def each(section: str, change: Callable[[Record], Any]) -> Change:
    """Change all records of a section. ``change`` returns the new values of a record."""

    def apply(data: Data) -> None:
        for record in data.records(section):
            record.update(change(record))

    return apply


def first(section: str, **changes: Any) -> Change:
    """Change the first record of a section in both files."""

    def apply(data: Data) -> None:
        for content in data.content.values():
            content[section][0].update(copy.deepcopy(changes))

    return apply


def without(section: str, key: str) -> Change:
    def apply(data: Data) -> None:
        for record in data.records(section):
            del record[key]

    return apply


# Pictures -----------------------------------------------------------------------------------------


def pictures(*changes: Callable[[Image.Image, Path], None]) -> Change:
    """Save all pictures again by several functions in turn.

    Each function takes the good picture and the path to save to.
    """

    def apply(data: Data) -> None:
        for path, change in zip(data.files(), cycle(changes), strict=False):
            with Image.open(path) as picture:
                picture.load()
            change(picture, path)

    return apply


# How the pixels of a picture are stored for each EXIF orientation.
_STORED = {
    1: lambda p: p,
    2: lambda p: p.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    3: lambda p: p.transpose(Image.Transpose.ROTATE_180),
    4: lambda p: p.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
    5: lambda p: p.transpose(Image.Transpose.TRANSPOSE),
    6: lambda p: p.transpose(Image.Transpose.ROTATE_90),
    7: lambda p: p.transpose(Image.Transpose.TRANSVERSE),
    8: lambda p: p.transpose(Image.Transpose.ROTATE_270),
}


Save = Callable[[Image.Image, Path], None]


def oriented(orientation: int) -> Save:
    """Store turned pixels and the orientation that turns them back.

    The picture that is read stays the same, and so the annotations still fit.
    """

    def save(picture: Image.Image, path: Path) -> None:
        annotated_as_stored(orientation)(_STORED[orientation](picture), path)

    return save


def annotated_as_stored(orientation: int) -> Save:
    """Add an orientation to the good pixels. The annotations fit the stored pixels only."""

    def save(picture: Image.Image, path: Path) -> None:
        exif = Image.Exif()
        exif[ORIENTATION] = orientation
        picture.save(path, exif=exif)

    return save


def converted(mode: str) -> Save:
    return lambda picture, path: picture.convert(mode).save(path)


def spread_to_16_bits(picture: Image.Image, path: Path) -> None:
    grey = np.asarray(picture.convert("L")).astype(np.uint16)
    Image.fromarray(grey * 257).save(path)


def of_12_bits(picture: Image.Image, path: Path) -> None:
    grey = np.asarray(picture.convert("L")).astype(np.uint16)
    Image.fromarray(grey * 16).save(path)


def to_tiff(array: Callable[[np.ndarray], np.ndarray]) -> Change:
    """Turn the files into TIFF files, and keep their names."""

    def save(picture: Image.Image, path: Path) -> None:
        Image.fromarray(array(np.asarray(picture.convert("L")))).save(path, format="TIFF")

    return pictures(save)


def resized(width: int, height: int) -> Change:
    def apply(data: Data) -> None:
        for path in data.files():
            Image.open(path).resize((width, height)).save(path)
        for record in data.records("images"):
            record.update(width=width, height=height)
        polygon = [0.0, 0.0, width, 0.0, width, height, 0.0, height]
        whole = {"bbox": [0, 0, width, height], "area": width * height, "segmentation": [polygon]}
        for content in data.content.values():
            content["annotations"] = [a | whole for a in content["annotations"][::3]]

    return apply


def first_file(change: Callable[[Path], Any]) -> Change:
    def apply(data: Data) -> None:
        for content in data.content.values():
            change(data.images / content["images"][0]["file_name"])

    return apply


# Names --------------------------------------------------------------------------------------------


def named(*changes: Callable[[str], str]) -> Change:
    """Change names in the annotation files by several functions in turn. The files keep theirs."""

    def apply(data: Data) -> None:
        for image, change in zip(data.records("images"), cycle(changes), strict=False):
            image["file_name"] = change(image["file_name"])

    return apply


def in_folders(change: Callable[[str], str]) -> Change:
    """Move the files to a subfolder, and change their names in the annotations as in `named`."""

    def apply(data: Data) -> None:
        (data.images / "sub").mkdir()
        for image in data.records("images"):
            path = data.images / image["file_name"]
            path.rename(data.images / "sub" / path.name)
        named(change)(data)

    return apply


def renamed(change: Callable[[str], str], form: str = "NFC") -> Change:
    """Change the names in the annotations and of the files. File names get a Unicode form."""

    def apply(data: Data) -> None:
        for image in data.records("images"):
            image["file_name"] = change(image["file_name"])
        for path in data.files():
            path.rename(path.with_name(unicodedata.normalize(form, change(path.name))))

    return apply


# Categories ---------------------------------------------------------------------------------------


def renumbered(data: Data) -> None:
    """Give the categories of the validation file other ids, in another order."""
    content = data.content["val"]
    numbers = {1: 30, 2: 7, 3: 12}
    for category in content["categories"]:
        category["id"] = numbers[category["id"]]
    for annotation in content["annotations"]:
        annotation["category_id"] = numbers[annotation["category_id"]]


def categories(*names: Any) -> Change:
    def apply(data: Data) -> None:
        for content in data.content.values():
            for category, name in zip(content["categories"], names, strict=True):
                category["name"] = name

    return apply


# Ids ----------------------------------------------------------------------------------------------


def image_ids(change: Callable[[int], Any]) -> Change:
    def apply(data: Data) -> None:
        for image in data.records("images"):
            image["id"] = change(image["id"])
        for annotation in data.records("annotations"):
            annotation["image_id"] = change(annotation["image_id"])

    return apply


def doubled_image(data: Data) -> None:
    """Give two images the same id, and assign the objects of both images to it."""
    for content in data.content.values():
        (one, other, *_), annotations = content["images"], content["annotations"]
        for annotation in annotations:
            if annotation["image_id"] == one["id"]:
                annotation["image_id"] = other["id"]
        one["id"] = other["id"]


def category_ids(change: Callable[[int], Any]) -> Change:
    def apply(data: Data) -> None:
        for category in data.records("categories"):
            category["id"] = change(category["id"])
        for annotation in data.records("annotations"):
            annotation["category_id"] = change(annotation["category_id"])

    return apply


# Boxes --------------------------------------------------------------------------------------------


def boxes(change: Callable[[float, float, float, float], list[float]]) -> Change:
    """Change the boxes, and remove the masks, which would reveal the convention of the boxes."""

    def apply(data: Data) -> None:
        for annotation in data.records("annotations"):
            del annotation["segmentation"]
            annotation["bbox"] = change(*annotation["bbox"])

    return apply


def polygons(change: Callable[[list[float]], Any]) -> Change:
    return each("annotations", lambda a: {"segmentation": [change(p) for p in a["segmentation"]]})


def in_polygons(*numbers: Any) -> Change:
    """Replace one number in some of the polygons."""

    def apply(data: Data) -> None:
        for content in data.content.values():
            for annotation, number in zip(content["annotations"][4:], numbers, strict=False):
                annotation["segmentation"][0][2] = number

    return apply


def in_boxes(*numbers: Any) -> Change:
    def apply(data: Data) -> None:
        for content in data.content.values():
            for annotation, number in zip(content["annotations"][4:], numbers, strict=False):
                annotation["bbox"][1] = number

    return apply


# The table ----------------------------------------------------------------------------------------

RUNS = ("train", "lazy", "evaluate")
IMAGES = ("demo", "Predictor", "export")  # these read no annotations


def expect(**tools: str) -> dict[str, str]:
    """Return the expected outcomes by tool. ``runs`` and ``images`` stand for several tools."""
    groups = {"runs": RUNS, "images": IMAGES}
    return {tool: what for name, what in tools.items() for tool in groups.get(name, (name,))}


_OTHER_PIXELS = expect(runs=WORKS, fix=WORKS, images=WORKS, export=SAME)
# All tools that train or evaluate refuse the data. In the first case, ``--fix`` restores the good
# data. In the second case, it leaves something out or rounds fractions.
_MENDED = expect(runs=REFUSED, check=FOUND, draw=REFUSED)
_REDUCED = _MENDED | expect(fix=WORKS)
# Detectron2's own loader of registered data sets accepts the data.
_REGISTERED = expect(lazy=SAME)

PICTURES: dict[str, Kind] = {
    "orientations 2 to 8": Kind(pictures(*map(oriented, range(2, 9)))),
    **{
        f"orientations {numbers}, annotated as stored": Kind(
            pictures(*map(annotated_as_stored, numbers)),
            _REDUCED | expect(images=WORKS, export=SAME),
            "EXIF",
        )
        for numbers in ((3,), (6,), tuple(range(2, 9)))
    },
    "modes 1, L, LA, P": Kind(pictures(*map(converted, ("1", "L", "LA", "P"))), _OTHER_PIXELS),
    "mode RGBA": Kind(pictures(converted("RGBA"))),
    "16 bits": Kind(pictures(spread_to_16_bits), _OTHER_PIXELS),
    "12 of 16 bits": Kind(
        pictures(of_12_bits),
        _MENDED | expect(fix=FOUND, images=WORKS, export=SAME),
        "use the lower 12 bits alone",
    ),
    "32 bits": Kind(
        to_tiff(lambda pixels: pixels.astype(np.float32)),
        _MENDED | expect(fix=REFUSED, images=REFUSED, demo=FOUND),
        "32 bits per pixel|Nothing (of|is drawn)|neither can",
    ),
    **{
        name: Kind(
            resized(*size),
            _OTHER_PIXELS | expect(export=REFUSED),  # a backbone alone does not pad images
            "too thin for the part backbone",
            masks=True,
        )
        for name, size in (("3000 x 2", (3000, 2)), ("2 x 3000", (2, 3000)))
    },
    "1 x 1": Kind(resized(1, 1), _OTHER_PIXELS, masks=True),
    "a missing file": Kind(
        first_file(Path.unlink),
        _REDUCED | expect(draw=SAME, images=WORKS, export=SAME),
        "there is no such file",
    ),
    "a truncated file": Kind(
        first_file(lambda path: path.write_bytes(path.read_bytes()[:300])),
        _REDUCED | expect(draw=SAME, images=REFUSED, demo=FOUND),
        "truncated|broken",
    ),
    "all files truncated": Kind(
        lambda data: [path.write_bytes(path.read_bytes()[:300]) for path in data.files()],
        _MENDED | expect(fix=REFUSED, images=REFUSED, demo=FOUND),
        "truncated|broken|Nothing (of|is drawn)",
    ),
}

_LOOKED_FOR = "check_dataset.py lists all"
_NEAR = (_MENDED, "seems to be '")

ANNOTATIONS: dict[str, Kind] = {
    # numbers in boxes and polygons
    "boxes as corners": Kind(
        boxes(lambda x, y, w, h: [x, y, x + w, y + h]), _MENDED, "x1, y1, x2, y2 in pixels"
    ),
    "boxes as rows and columns": Kind(
        boxes(lambda x, y, w, h: [y, x, y + h, x + w]), _MENDED, "y1, x1, y2, x2 in pixels"
    ),
    "boxes as fractions": Kind(
        boxes(lambda x, y, w, h: [x / WIDTH, y / HEIGHT, w / WIDTH, h / HEIGHT]),
        _MENDED,
        "fractions of the size",
    ),
    "centres in percent": Kind(
        boxes(
            lambda x, y, w, h: [
                *(100 * (x + w / 2) / WIDTH, 100 * (y + h / 2) / HEIGHT),
                *(100 * w / WIDTH, 100 * h / HEIGHT),
            ]
        ),
        _MENDED,
        "centre x, centre y, width, height in percent",
    ),
    "polygons as fractions": Kind(
        polygons(lambda p: [n / (HEIGHT if i % 2 else WIDTH) for i, n in enumerate(p)]),
        _MENDED,
        "polygons are not x, y, ... in pixels, but fractions",
        masks=True,
    ),
    "flat polygons": Kind(
        each("annotations", lambda a: {"segmentation": a["segmentation"][0]}),
        _MENDED,
        "without a mask|cannot be loaded",
        masks=True,
    ),
    "polygons of points": Kind(
        polygons(lambda p: [list(point) for point in zip(p[::2], p[1::2], strict=True)]),
        _MENDED,
        "without a mask|cannot be loaded",
        masks=True,
    ),
    "empty segmentations": Kind(
        each("annotations", lambda a: {"segmentation": [[]]}),
        expect(lazy=REFUSED),  # Detectron2's loader drops the objects
        "No valid data found",
    ),
    "empty segmentations for masks": Kind(
        each("annotations", lambda a: {"segmentation": [[]]}),
        _MENDED | expect(fix=REFUSED),
        "without a mask|No valid data|can be trained on",
        masks=True,
    ),
    "absurd numbers in polygons": Kind(
        in_polygons(NAN, INF, 1e9, 10**400), _REDUCED, _LOOKED_FOR, masks=True
    ),
    "absurd numbers in boxes": Kind(in_boxes(NAN, -INF, 10**400, None), _MENDED, _LOOKED_FOR),
    "an absurd size of an image": Kind(
        first("images", width=10**6, height=10**6), _MENDED, r"1e\+06 x 1e\+06", masks=True
    ),
    "a size as text": Kind(first("images", width="80"), _MENDED, "width.* '80'"),
    # the file
    "byte order mark": Kind(
        lambda data: data.raw.update(
            {split: f"\ufeff{json.dumps(content)}" for split, content in data.content.items()}
        ),
        expect(lazy=REFUSED, check=FOUND),  # Detectron2's loader fails
        "UTF-8 BOM",
    ),
    # ids
    "image ids as text": Kind(image_ids(lambda number: f"image {number}")),
    "image ids as fractions": Kind(image_ids(float), _MENDED | _REGISTERED, "(id|image) 1?2?0.0"),
    "image ids below 0": Kind(image_ids(lambda number: number - 1000)),
    "image ids of 60 bits": Kind(image_ids(lambda number: 2**60 + number)),
    "image ids of 70 bits": Kind(image_ids(lambda n: 2**70 + n), _MENDED | _REGISTERED, "63 bits"),
    "image ids of True": Kind(
        image_ids(lambda n: n % 2 == 0),
        _MENDED | expect(fix=REFUSED),
        r"(id|position \d:) (True|False)",
    ),
    "image ids doubled": Kind(doubled_image, _REDUCED, "the id 1?2?1|that share an id"),
    "category ids from 0": Kind(category_ids(lambda number: number - 1)),
    "category ids as text": Kind(category_ids(lambda number: f"c{number}")),
    "annotation ids as text": Kind(
        each("annotations", lambda a: {"id": f"a{a['id']}"}), _MENDED | expect(draw=SAME), "id|'a2'"
    ),
    "annotation ids doubled": Kind(
        each("annotations", lambda a: {"id": 7}), _MENDED | expect(draw=SAME), "id"
    ),
    "annotation ids missing": Kind(without("annotations", "id"), _MENDED | expect(draw=SAME), "id"),
    "iscrowd missing": Kind(
        without("annotations", "iscrowd"), _MENDED | _REGISTERED | expect(draw=SAME), "iscrowd"
    ),
    "areas missing": Kind(
        without("annotations", "area"), _MENDED | _REGISTERED | expect(draw=SAME), "area"
    ),
    "areas of NaN": Kind(
        each("annotations", lambda a: {"area": NAN}), _MENDED | expect(draw=SAME), "area"
    ),
    # categories
    "another numbering": Kind(renumbered, expect(lazy=REFUSED, check=FOUND), "are matched by name"),
    "numbers for names": Kind(
        categories(1, 2, 3),
        expect(train=WORKS, lazy=REFUSED, evaluate=REFUSED, fix=WORKS),
        "has objects of categories that|the name 1, which must be text",
    ),
    "formulas for names": Kind(
        categories("$x^$", "a\nb", "\t|"),
        expect(train=WORKS, lazy=WORKS, evaluate=REFUSED, fix=WORKS),
        "has objects of categories that",
    ),
    "half characters for names": Kind(categories("\ud800", "b", "c"), _REDUCED, "'.ud800'"),
    "no names": Kind(categories("", None, "c"), _REDUCED, "(name|1:) ''"),
    # names of files
    "backslashes": Kind(in_folders(lambda name: f"sub\\{name}"), *_NEAR),
    "names that are almost right": Kind(
        named(
            lambda name: f"https://host/images/{name}?raw=1",
            lambda name: f"images/{name}",
            str.upper,
            lambda name: name.replace(".png", ".jpg"),
            lambda name: f" {name} ",
        ),
        *_NEAR,
    ),
    "another Unicode form": Kind(renamed(lambda name: f"ä{name}", "NFD"), *_NEAR),
    "names without their folder": Kind(in_folders(lambda name: name), *_NEAR),
    "a dot before names": Kind(named(lambda name: f"./{name}")),
    "absolute names": Kind(lambda data: named(lambda name: str(data.images / name))(data)),
    "NUL in names": Kind(
        named(lambda name: f"{name}\0"),
        _MENDED | expect(fix=REFUSED),
        "does not hold the images|cannot be used|can be trained on",
    ),
    "all files missing": Kind(
        lambda data: [path.unlink() for path in data.files()],
        _MENDED | expect(fix=REFUSED),
        "does not hold the images|there is no such file|can be trained on",
    ),
}
