# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Small data sets with every fault that the check of data sets finds, and the properties that a
corrected copy must have. Test modules name this file in ``pytest_plugins``."""

import contextlib
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import check_dataset
import numpy as np
import pycocotools.mask as mask_util
import pytest
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from vovnet_d2.data.check import Severity
from vovnet_d2.data.check.masks import decode_counts

Content = dict[str, Any]
SIZE = (48, 64)  # height, width
NAMES = ["a.jpg", "b.png", "c.jpg", "d.png"]


def rle_of(box: list[int], *, compressed: bool) -> dict[str, Any]:
    mask = np.zeros(SIZE, dtype=np.uint8, order="F")
    x, y, w, h = box
    mask[y : y + h, x : x + w] = 1
    encoded = mask_util.encode(mask)
    text = encoded["counts"].decode()
    return {"size": list(SIZE), "counts": text if compressed else decode_counts(text)}


def polygon_of(box: list[float]) -> list[list[float]]:
    x, y, w, h = box
    return [[x, y, x + w, y, x + w, y + h, x, y + h]]


def make_content() -> Content:
    annotations = []
    for image_id in (1, 2, 3, 4):
        for number in range(2):
            box = [4 + 20 * number, 5 + image_id, 16, 20]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": number + 1,
                    "bbox": box,
                    "area": 320,
                    "iscrowd": 0,
                    "segmentation": polygon_of(box),
                }
            )
    return {
        "info": {},
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
        "images": [
            {"id": i + 1, "file_name": name, "height": SIZE[0], "width": SIZE[1]}
            for i, name in enumerate(NAMES)
        ],
        "annotations": annotations,
    }


class DataSet:
    """Four small images and their annotations, for tests to damage."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.images = folder / "images"
        self.json = folder / "a.json"
        self.images.mkdir(parents=True)
        rng = np.random.default_rng(0)
        for name in NAMES:
            small = Image.fromarray(rng.integers(0, 255, (6, 8, 3), dtype=np.uint8))
            small.resize(SIZE[::-1]).save(self.images / name)
        self.content = make_content()

    def check(self, *words: str) -> tuple[int, list[dict[str, Any]]]:
        """Run the tool, and return its exit status and its findings."""
        report = self.folder / "report.json"
        file, images = str(self.json), str(self.images)
        words = ("--json", str(report), "--masks", *words)
        status = check_dataset.main(["--train-json", file, "--train-images", images, *words])
        content = json.loads(report.read_text())
        return status, content["data_sets"][0]["findings"]

    def write(self) -> None:
        self.json.write_text(json.dumps(self.content))


@pytest.fixture
def data(tmp_path: Path) -> DataSet:
    return DataSet(tmp_path / "data")


# Faults. Each one changes the content or the files. ``raw`` replaces the whole JSON text.


def setting(section: str, key: str, value: Any) -> Callable[[DataSet], None]:
    def spoil(data: DataSet) -> None:
        data.content[section][0][key] = value

    return spoil


def without(section: str, key: str) -> Callable[[DataSet], None]:
    def spoil(data: DataSet) -> None:
        del data.content[section][0][key]

    return spoil


def adding(section: str, **changes: Any) -> Callable[[DataSet], None]:
    """Add a copy of the first record of a section, with some changes."""

    def spoil(data: DataSet) -> None:
        data.content[section].append(data.content[section][0] | changes)

    return spoil


def all_annotations(key: str, value: Any) -> Callable[[DataSet], None]:
    def spoil(data: DataSet) -> None:
        for annotation in data.content["annotations"]:
            annotation[key] = value

    return spoil


def raw(make: Callable[[str], bytes]) -> Callable[[DataSet], None]:
    def spoil(data: DataSet) -> None:
        data.content = make(json.dumps(data.content))

    return spoil


def file(make: Callable[[Path], Any]) -> Callable[[DataSet], None]:
    """Change the file of the first image."""
    return lambda data: make(data.images / NAMES[0])


def add_supercategory(data: DataSet) -> None:
    for category in data.content["categories"]:
        category["supercategory"] = "animals"
    data.content["categories"].insert(0, {"id": 7, "name": "animals", "supercategory": "none"})


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:200])


def rotate(path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(path).save(path, exif=exif)


def upwards_from_a_link(data: DataSet) -> None:
    pool = data.folder / "pool" / "deep"
    pool.mkdir(parents=True)
    shutil.copy(data.images / NAMES[0], pool.parent)
    (data.images / "link").symlink_to(pool)
    data.content["images"][0]["file_name"] = f"link/../{NAMES[0]}"


def rename(name: str) -> Callable[[DataSet], None]:
    """Change the name of the first image in the annotations, and leave its file as it is."""
    return setting("images", "file_name", name)


def image_ids(number: float) -> Callable[[DataSet], None]:
    """Give the first image and its annotations another image id."""

    def spoil(data: DataSet) -> None:
        data.content["images"][0]["id"] = number
        for annotation in data.content["annotations"][:2]:
            annotation["image_id"] = number

    return spoil


def numbers_for_text(data: DataSet) -> None:
    for image in data.content["images"]:
        image["id"] = str(image["id"])


def decompose(data: DataSet) -> None:
    (data.images / "a.jpg").rename(data.images / "\u00e4.jpg")
    data.content["images"][0]["file_name"] = "a\u0308.jpg"


def two_similar_names(data: DataSet) -> None:
    for folder in ("one", "two"):
        (data.images / folder).mkdir()
        shutil.copy(data.images / "a.jpg", data.images / folder)
    (data.images / "a.jpg").unlink()


def other_split(data: DataSet) -> None:
    (data.images / "val").mkdir()
    (data.images / "a.jpg").rename(data.images / "val" / "a.jpg")
    data.content["images"][0]["file_name"] = "train/a.jpg"


def other_size(data: DataSet) -> None:
    Image.new("RGB", (9, 9)).save(data.images / "a.jpg")
    data.content["images"][0]["file_name"] = "images/a.jpg"


def keypoints(*points: float, declared: int = 2, counted: int | None = 2) -> Callable:
    def spoil(data: DataSet) -> None:
        for category in data.content["categories"]:
            category["keypoints"] = [f"k{i}" for i in range(declared)]
        for annotation in data.content["annotations"]:
            annotation |= {"keypoints": [10, 10, 2, 20, 20, 1], "num_keypoints": 2}
        data.content["annotations"][0] |= {"keypoints": list(points), "num_keypoints": counted}

    return spoil


BOX = [4, 6, 16, 20]  # the box of the first annotation
NAN = float("nan")
# name: (function that damages the set, names of the problems that the check finds, without notes)
FAULTS: dict[str, tuple[Callable[[DataSet], None], set[str]]] = {
    "truncated": (raw(lambda text: text[:300].encode()), {"json"}),
    "empty file": (raw(lambda text: b""), {"json"}),
    "a list": (raw(lambda text: b"[1]"), {"json"}),
    "HTML": (raw(lambda text: b"<html>"), {"json"}),
    "latin-1": (raw(lambda text: text.replace("cat", "ä").encode("latin-1")), {"json"}),
    "binary": (raw(lambda text: bytes(range(256))), {"json"}),
    "deep": (raw(lambda text: b"[" * 100_000), {"json"}),
    "huge number": (raw(lambda text: b"1" * 5000), {"json"}),
    "byte order mark": (raw(lambda text: text.encode("utf-8-sig")), {"encoding"}),
    "UTF-16": (raw(lambda text: text.encode("utf-16")), {"encoding"}),
    "no images": (lambda d: d.content.pop("images"), {"section", "unknown_image", "empty"}),
    "images as object": (
        lambda d: d.content.update(images={}),
        {"section", "unknown_image", "empty"},
    ),
    "no categories": (
        lambda d: d.content.pop("categories"),
        {"section", "unknown_category", "empty"},
    ),
    "no annotations": (lambda d: d.content.pop("annotations"), {"section", "empty"}),
    "a number for an image": (lambda d: d.content["images"].append(3), {"record"}),
    "null for an annotation": (lambda d: d.content["annotations"].append(None), {"record"}),
    # categories
    "category without id": (adding("categories", id=None), {"category_id"}),
    "category id as text": (setting("categories", "id", "1"), {"category_id_type"}),
    "category id twice": (adding("categories", name="fox"), {"duplicate_category_id"}),
    "category without name": (without("categories", "name"), {"category_name"}),
    "category name of spaces": (setting("categories", "name", " "), {"category_name"}),
    "half a character": (setting("categories", "name", "\ud800"), {"category_name"}),
    "category name twice": (setting("categories", "name", "dog"), {"duplicate_category_name"}),
    # images
    "image without id": (adding("images", id=[1]), {"image_id"}),
    "image id as text": (setting("images", "id", "1"), {"image_id_type"}),
    "image id as a name": (setting("images", "id", "x"), {"image_id_type", "unknown_image"}),
    "image id of many bits": (image_ids(2**70), {"image_id_type"}),
    "image id with a fraction": (image_ids(0.5), {"image_id_type"}),
    "references as numbers": (numbers_for_text, {"reference_type"}),
    "image id twice": (adding("images", file_name="b.png"), {"duplicate_image_id"}),
    "image twice": (adding("images"), {"repeated_image"}),
    "file twice": (adding("images", id=77), {"duplicate_file_name"}),
    "file twice, by another path": (
        adding("images", id=77, file_name="./a.jpg"),
        {"duplicate_file_name"},
    ),
    "no file name": (without("images", "file_name"), {"file_name"}),
    "file name of a number": (setting("images", "file_name", 3), {"file_name"}),
    "path upwards": (setting("images", "file_name", "../a.json"), {"path_outside"}),
    "absolute path": (setting("images", "file_name", "/etc/hostname"), {"path_outside"}),
    "path with a zero": (setting("images", "file_name", "a\0b"), {"path_outside"}),
    "path upwards from a link": (upwards_from_a_link, {"near_name"}),
    "missing file": (file(Path.unlink), {"missing_file"}),
    "backslashes": (rename(r"images\a.jpg"), {"near_name"}),
    "URL": (rename("https://example.org/data/a.jpg?download=1"), {"near_name"}),
    "prefix": (rename("images/train/a.jpg"), {"near_name"}),
    "absolute path of another machine": (rename("/home/me/images/a.jpg"), {"near_name"}),
    "upper case": (rename("A.JPG"), {"near_name"}),
    "another suffix": (rename("a.png"), {"near_name"}),
    "no suffix": (rename("a"), {"near_name"}),
    "spaces": (rename(" a.jpg "), {"near_name"}),
    "Unicode form": (decompose, {"near_name"}),
    "two files as near": (two_similar_names, {"missing_file"}),
    "another split": (other_split, {"missing_file"}),
    "near, of another size": (other_size, {"missing_file"}),
    "a folder for a file": (setting("images", "file_name", "."), {"missing_file"}),
    "truncated image": (file(truncate), {"unreadable_file"}),
    "empty image": (file(lambda p: p.write_bytes(b"")), {"unreadable_file"}),
    "text as image": (file(lambda p: p.write_text("404")), {"unreadable_file"}),
    "wrong size": (setting("images", "height", 47), {"image_size"}),
    "no size": (without("images", "width"), {"no_size"}),
    "size as text": (setting("images", "width", "64"), {"no_size"}),
    "rotated": (file(rotate), {"annotations_turned"}),
    # annotations
    "annotation without id": (without("annotations", "id"), {"annotation_id"}),
    "annotation id as text": (setting("annotations", "id", "1"), {"annotation_id"}),
    "annotation id twice": (setting("annotations", "id", 2), {"duplicate_annotation_id"}),
    "annotation id 0": (setting("annotations", "id", 0), {"annotation_id_zero"}),
    "unknown image": (setting("annotations", "image_id", 99), {"unknown_image"}),
    "no image": (without("annotations", "image_id"), {"no_image_id"}),
    "image as text": (setting("annotations", "image_id", "1"), {"reference_type"}),
    "unknown category": (setting("annotations", "category_id", 99), {"unknown_category"}),
    "no category": (without("annotations", "category_id"), {"unknown_category"}),
    "category as a list": (setting("annotations", "category_id", [1]), {"unknown_category"}),
    "ignore": (setting("annotations", "ignore", 1), {"ignore"}),
    "no iscrowd": (without("annotations", "iscrowd"), {"iscrowd"}),
    "iscrowd of 2": (setting("annotations", "iscrowd", 2), {"iscrowd"}),
    "annotation repeated": (adding("annotations", id=99), {"repeated_annotation"}),
    # boxes
    "no box": (without("annotations", "bbox"), {"box"}),
    "empty box": (setting("annotations", "bbox", []), {"box"}),
    "box of three": (setting("annotations", "bbox", [1, 2, 3]), {"box"}),
    "box of text": (setting("annotations", "bbox", ["1", "2", "3", "4"]), {"box"}),
    "box of NaN": (setting("annotations", "bbox", [NAN] * 4), {"box"}),
    "infinite box": (setting("annotations", "bbox", [0, 0, 1e999, 5]), {"box"}),
    "width 0": (setting("annotations", "bbox", [4, 5, 0, 20]), {"degenerate_box"}),
    "negative height": (setting("annotations", "bbox", [4, 5, 16, -20]), {"degenerate_box"}),
    "box reaching out": (
        setting("annotations", "bbox", [-9, 6, 29, 20]),
        {"box_outside", "box_and_mask"},
    ),
    "box beyond": (setting("annotations", "bbox", [100, 100, 9, 9]), {"box_beyond"}),
    "box elsewhere": (setting("annotations", "bbox", [40, 20, 16, 20]), {"box_and_mask"}),
    "no area": (without("annotations", "area"), {"area"}),
    "area 0": (setting("annotations", "area", 0), {"area"}),
    # masks
    "mask of text": (setting("annotations", "segmentation", "x"), {"segmentation"}),
    "mask of a number": (setting("annotations", "segmentation", 7), {"segmentation"}),
    "flat polygon": (setting("annotations", "segmentation", polygon_of(BOX)[0]), {"flat_polygon"}),
    "polygon of points": (
        setting("annotations", "segmentation", [[4, 6], [20, 6], [20, 26], [4, 26]]),
        {"flat_polygon"},
    ),
    "polygon of two points": (setting("annotations", "segmentation", [[1, 2, 3, 4]]), {"polygon"}),
    "polygon of odd count": (setting("annotations", "segmentation", [[1] * 7]), {"polygon"}),
    "polygon of NaN": (setting("annotations", "segmentation", [[NAN] * 6]), {"polygon_numbers"}),
    "polygon of text": (setting("annotations", "segmentation", [["1"] * 6]), {"polygon_numbers"}),
    "polygon reaching out": (
        setting("annotations", "segmentation", polygon_of([-9, 6, 29, 20])),
        {"polygon_outside", "box_and_mask"},
    ),
    "polygon beyond": (
        setting("annotations", "segmentation", polygon_of([100, 0, 9, 9])),
        {"polygon_outside", "empty_mask"},
    ),
    "mask missing": (without("annotations", "segmentation"), {"missing_mask"}),
    "RLE of another size": (
        setting("annotations", "segmentation", {"size": [64, 48], "counts": [3072]}),
        {"rle_size"},
    ),
    "RLE without size": (setting("annotations", "segmentation", {"counts": [3072]}), {"rle"}),
    "RLE without counts": (setting("annotations", "segmentation", {"size": [48, 64]}), {"rle"}),
    "RLE too short": (
        setting("annotations", "segmentation", {"size": [48, 64], "counts": [1, 2]}),
        {"rle"},
    ),
    "RLE with a negative run": (
        setting("annotations", "segmentation", {"size": [48, 64], "counts": [-1, 3073]}),
        {"rle"},
    ),
    "RLE of rubbish": (
        setting("annotations", "segmentation", {"size": [48, 64], "counts": "oooooooo"}),
        {"rle"},
    ),
    "RLE cut off": (
        setting(
            "annotations",
            "segmentation",
            {"size": [48, 64], "counts": rle_of(BOX, compressed=True)["counts"][:-1]},
        ),
        {"rle"},
    ),
    "RLE without a pixel": (
        setting("annotations", "segmentation", {"size": [48, 64], "counts": [3072]}),
        {"empty_mask"},
    ),
    "a supercategory as Roboflow writes it": (add_supercategory, {"unused_supercategory"}),
    # keypoints
    "keypoints of the wrong length": (keypoints(1, 2, 2), {"keypoints", "num_keypoints"}),
    "keypoints of NaN": (keypoints(NAN, 2, 2, 1, 1, 1), {"keypoints", "num_keypoints"}),
    "a keypoint outside": (
        keypoints(500, 2, 2, 1, 1, 1),
        {"keypoint_outside", "num_keypoints"},
    ),
    "keypoints miscounted": (keypoints(1, 2, 2, 1, 1, 1, counted=1), {"num_keypoints"}),
    "nothing left": (all_annotations("iscrowd", 1), {"empty"}),
}
# After the repair, nothing is left in these sets that a network could be trained on.
HOPELESS = {name for name, (_, problems) in FAULTS.items() if problems & {"json", "empty"}}


def names_of(findings: list[dict], *, notes: bool = False) -> set[str]:
    return {f["problem"] for f in findings if (f["severity"] == Severity.NOTE) == notes}


def spoil(data: DataSet, fault: Callable[[DataSet], None]) -> None:
    fault(data)
    if isinstance(data.content, bytes):
        data.json.write_bytes(data.content)
    else:
        data.write()


# Properties of a corrected copy


def require_trainable(data: DataSet) -> None:
    """Check that Detectron2 loads and maps every image, and that the ground truth scores 100 AP."""
    name = f"checked {data.folder}"
    register_coco_instances(name, {}, str(data.json), str(data.images))
    try:
        records = DatasetCatalog.get(name)
        content = json.loads(data.json.read_text())
        assert sum(len(r["annotations"]) for r in records) == len(content["annotations"])
        mapper = DatasetMapper(
            is_train=True,
            augmentations=[],
            image_format="BGR",
            use_instance_mask=True,
            instance_mask_format="bitmask",
        )
        for record in records:
            objects = sum(not a["iscrowd"] for a in record["annotations"])
            assert len(mapper(record)["instances"]) == objects
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    assert evaluate_the_truth(data.json) == pytest.approx(1)


def evaluate_the_truth(path: Path, kind: str = "bbox") -> float:
    """Return COCO's AP when the annotations are used as predictions."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(path))
        found = [
            {k: a[k] for k in ("image_id", "category_id", "bbox")} | {"score": 1.0}
            for a in truth.dataset["annotations"]
            if not a["iscrowd"]
        ]
        evaluation = COCOeval(truth, truth.loadRes(found), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats[0]
