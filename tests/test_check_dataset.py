# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""The check of data sets: each fault is found, its repair is clean, and Detectron2 agrees."""

import contextlib
import copy
import hashlib
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
from coco_tree import write_coco_tree
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.data.datasets import load_coco_json, register_coco_instances
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from vovnet_d2.data import build_digits
from vovnet_d2.data.check import PROBLEMS, Severity
from vovnet_d2.data.check.leakage import _ones
from vovnet_d2.data.check.masks import decode_counts

pytest_plugins = ["engine_fixtures"]

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
    """Four small images and their annotations, to be spoilt."""

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
        """Exit status and findings of the tool."""
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


# What is wrong: each fault spoils the content or the files. ``raw`` replaces the whole JSON text.


def setting(section: str, key: str, value: Any) -> Callable[[DataSet], None]:
    def spoil(data: DataSet) -> None:
        data.content[section][0][key] = value

    return spoil


def without(section: str, key: str) -> Callable[[DataSet], None]:
    def spoil(data: DataSet) -> None:
        del data.content[section][0][key]

    return spoil


def adding(section: str, **changes: Any) -> Callable[[DataSet], None]:
    """A copy of the first record, changed."""

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
    """Change the first image's file."""
    return lambda data: make(data.images / NAMES[0])


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
    """The file stays; its name in the annotations changes."""
    return setting("images", "file_name", name)


def image_ids(number: float) -> Callable[[DataSet], None]:
    """The first image has another id, and so have its annotations."""

    def spoil(data: DataSet) -> None:
        data.content["images"][0]["id"] = number
        for annotation in data.content["annotations"][:2]:
            annotation["image_id"] = number

    return spoil


def text_ids(data: DataSet) -> None:
    for image in data.content["images"]:
        image["id"] = f"0{image['id']}"
    for annotation in data.content["annotations"]:
        annotation["image_id"] = f"0{annotation['image_id']}"


def numbers_for_text(data: DataSet) -> None:
    for image in data.content["images"]:
        image["id"] = str(image["id"])


def decompose(data: DataSet) -> None:
    (data.images / "a.jpg").rename(data.images / "\u00e4.jpg")
    data.content["images"][0]["file_name"] = "a\u0308.jpg"


def two_as_near(data: DataSet) -> None:
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


BOX = [4, 6, 16, 20]  # the first annotation's
NAN = float("nan")
# name: (what spoils the set, the problems that are found, notes aside)
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
    "category name twice": (setting("categories", "name", "dog"), {"duplicate_category_name"}),
    # images
    "image without id": (adding("images", id=[1]), {"image_id"}),
    "image id as text": (setting("images", "id", "1"), {"image_id_type"}),
    "image id as a name": (setting("images", "id", "x"), {"image_id_type", "unknown_image"}),
    "image id of many bits": (image_ids(2**60), {"image_id_type"}),
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
    "two files as near": (two_as_near, {"missing_file"}),
    "another split": (other_split, {"missing_file"}),
    "near, of another size": (other_size, {"missing_file"}),
    "a folder for a file": (setting("images", "file_name", "."), {"missing_file"}),
    "truncated image": (file(truncate), {"unreadable_file"}),
    "empty image": (file(lambda p: p.write_bytes(b"")), {"unreadable_file"}),
    "text as image": (file(lambda p: p.write_text("404")), {"unreadable_file"}),
    "wrong size": (setting("images", "height", 47), {"image_size"}),
    "no size": (without("images", "width"), {"image_size"}),
    "size as text": (setting("images", "width", "64"), {"image_size"}),
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
# Nothing is left of these that could be trained on.
HOPELESS = {name for name, (_, problems) in FAULTS.items() if problems & {"json", "empty"}}

# name: (what is done to the set, the note)
NOTES = {
    "image ids as text": (text_ids, "image_ids_text"),
    "category ids with gaps": (adding("categories", id=9, name="fox"), "category_gaps"),
    "a category without annotations": (adding("categories", id=3, name="fox"), "unused_category"),
    "an image without annotations": (
        lambda d: d.content["annotations"].__delitem__(slice(0, 2)),
        "no_annotations",
    ),
    "a crowd": (setting("annotations", "iscrowd", 1), "crowd"),
    "compressed RLE": (
        setting("annotations", "segmentation", rle_of(BOX, compressed=True)),
        "rle_masks",
    ),
    "RLE of numbers": (
        setting("annotations", "segmentation", rle_of(BOX, compressed=False)),
        "rle_masks",
    ),
    "16 bits": (
        lambda d: Image.fromarray(np.full(SIZE, 9999, dtype=np.uint16)).save(d.images / "b.png"),
        "deep_pixels",
    ),
    "a file twice": (
        lambda d: shutil.copy(d.images / "b.png", d.images / "d.png"),
        "same_content",
    ),
    "a tiny box": (
        lambda d: d.content["annotations"][0].update(
            bbox=[4, 6, 0.2, 20], segmentation=polygon_of([4, 6, 0.2, 20])
        ),
        "tiny_box",
    ),
}
BETWEEN = {"leaked_file", "near_duplicate", "same_name", "categories_differ"}  # below
BETWEEN |= {"category_ids_differ"}
# In test_annotation_frames.py.
TOGETHER = {"box_convention", "box_convention_unclear", "polygon_convention", "systematic"}
TOGETHER |= {"turn_unclear", "resized", "dark_pixels"}
ALSO = {"lost_with_image", "box_without_mask"}


def names_of(findings: list[dict], *, notes: bool = False) -> set[str]:
    return {f["problem"] for f in findings if (f["severity"] == Severity.NOTE) == notes}


def spoil(data: DataSet, fault: Callable[[DataSet], None]) -> None:
    fault(data)
    if isinstance(data.content, bytes):
        data.json.write_bytes(data.content)
    else:
        data.write()


def test_every_problem_is_in_a_test() -> None:
    found = set().union(*(problems for _, problems in FAULTS.values()))
    found |= {note for _, note in NOTES.values()} | ALSO | BETWEEN | TOGETHER
    assert found == set(PROBLEMS)


def test_a_good_set(data: DataSet, capsys: pytest.CaptureFixture) -> None:
    data.write()
    assert data.check() == (0, [])
    assert capsys.readouterr().out.endswith("No problems.\n")
    assert data.check("--fix", str(data.folder / "fixed.json")) == (0, [])
    assert json.loads((data.folder / "fixed.json").read_text()) == data.content


def test_images_may_be_links(data: DataSet) -> None:
    """DVC and git-annex link images to one store, which keeps equal files once."""
    shutil.copy(data.images / "b.png", data.images / "d.png")
    store = data.folder / "store"
    store.mkdir()
    for name in NAMES:
        stored = store / hashlib.sha256((data.images / name).read_bytes()).hexdigest()
        (data.images / name).rename(stored)
        (data.images / name).symlink_to(stored)
    data.write()
    fixed = data.folder / "fixed.json"
    status, findings = data.check("--fix", str(fixed))
    assert (status, names_of(findings), names_of(findings, notes=True)) == (
        *(0, set()),
        {"same_content"},
    )
    assert json.loads(fixed.read_text()) == data.content


@pytest.mark.parametrize(("note", "name"), [(v[1], k) for k, v in NOTES.items()], ids=NOTES)
def test_notes_are_no_problems(data: DataSet, note: str, name: str) -> None:
    spoil(data, NOTES[name][0])
    status, findings = data.check()
    assert names_of(findings) == set()
    assert note in names_of(findings, notes=True)
    assert status == 0


def test_annotations_that_go_with_their_image_are_counted(data: DataSet) -> None:
    spoil(data, file(Path.unlink))
    first = data.content["images"][0]["id"]
    expected = sum(a["image_id"] == first for a in data.content["annotations"])
    _, findings = data.check()
    counts = {f["problem"]: f["count"] for f in findings}
    assert counts["missing_file"] == 1
    assert counts["lost_with_image"] == expected > 0


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_found_and_mended(data: DataSet, name: str) -> None:
    fault, problems = FAULTS[name]
    spoil(data, fault)
    fixed = data.folder / "fixed.json"
    if name in HOPELESS:
        status, findings = data.check()
        arguments = ["--train-json", data.json, "--train-images", data.images, "--fix", fixed]
        with pytest.raises(SystemExit, match="2"):
            check_dataset.main(list(map(str, arguments)))
        assert not fixed.exists()
    else:
        status, findings = data.check("--fix", str(fixed))
    assert names_of(findings) == problems
    assert status == 1
    if name not in HOPELESS:
        data.json = fixed
        status, findings = data.check()
        assert (status, names_of(findings)) == (0, set())
        require_trainable(data)


def require_trainable(data: DataSet) -> None:
    """Detectron2 loads and maps every image of the set, and evaluation of the truth gives 100."""
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
    """COCO's AP of the annotations taken for predictions."""
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


NO_MASKS = {"[[]]": [[]], "[]": [], "null": None, "two points": [[1, 2, 3, 4]], "text": "x"}


@pytest.mark.parametrize("all_of_them", [False, True])
@pytest.mark.parametrize("mask", NO_MASKS)
def test_boxes_need_no_masks(data: DataSet, mask: str, all_of_them: bool) -> None:
    """Objects stay for their boxes, unless the check is for a network that learns masks."""
    for annotation in data.content["annotations"][: None if all_of_them else 3]:
        annotation["segmentation"] = NO_MASKS[mask]
    data.write()
    fixed = data.folder / "fixed.json"
    words = ["--train-json", data.json, "--train-images", data.images, "--fix", fixed]
    assert check_dataset.main(list(map(str, words))) == (mask in ("two points", "text"))
    kept = json.loads(fixed.read_text())["annotations"]
    assert [a["bbox"] for a in kept] == [a["bbox"] for a in data.content["annotations"]]
    if not all_of_them:
        fixed.unlink()
        assert data.check("--fix", str(fixed))[0] == 1
        assert len(json.loads(fixed.read_text())["annotations"]) == 5


# What the severities claim, seen in Detectron2 and pycocotools


STOPS_LOADING = {
    *["byte order mark", "UTF-16", "no categories", "a number for an image"],
    *["null for an annotation", "category without name", "no file name", "no size"],
    *["annotation without id", "annotation id twice", "no image", "unknown category"],
    *["no category", "category as a list", "ignore", "empty box", "image without id"],
    *["mask of a number", "flat polygon", "RLE without size"],
    *["RLE without counts", "truncated", "empty file", "a list", "HTML", "latin-1", "binary"],
    *["deep", "huge number", "category id as text", "image id as text", "image id as a name"],
    *["category without id"],
}


@pytest.mark.parametrize("name", sorted(STOPS_LOADING))
def test_detectron2_stops_at_these(data: DataSet, name: str) -> None:
    spoil(data, FAULTS[name][0])
    register_coco_instances("spoilt", {}, str(data.json), str(data.images))
    try:
        with pytest.raises(Exception):  # noqa: B017, PT011
            DatasetCatalog.get("spoilt")
    finally:
        DatasetCatalog.remove("spoilt")
        MetadataCatalog.remove("spoilt")
    errors = {p for p in FAULTS[name][1] if PROBLEMS[p].severity == Severity.ERROR}
    assert errors


@pytest.mark.parametrize("name", ["no area", "no iscrowd"])
def test_evaluation_stops_at_these(data: DataSet, name: str) -> None:
    spoil(data, FAULTS[name][0])
    with pytest.raises(KeyError):
        evaluate_the_truth(data.json)


def test_pycocotools_takes_annotation_0_for_no_match(data: DataSet) -> None:
    data.write()
    assert evaluate_the_truth(data.json) == pytest.approx(1)
    spoil(data, FAULTS["annotation id 0"][0])
    assert evaluate_the_truth(data.json) < 0.99


@pytest.mark.parametrize("name", ["polygon of two points", "polygon of odd count"])
def test_detectron2_drops_these_without_an_error(data: DataSet, name: str) -> None:
    spoil(data, FAULTS[name][0])
    records = load_coco_json(str(data.json), str(data.images))
    assert sum(len(r["annotations"]) for r in records) == len(data.content["annotations"]) - 1


# Masks against pycocotools


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.lists(st.booleans(), min_size=1, max_size=200), st.integers(1, 20))
def test_compressed_rle_is_decoded_as_pycocotools_encodes(bits: list[bool], stretch: int) -> None:
    mask = np.repeat(np.array(bits, dtype=np.uint8), stretch)[:, None]
    text = mask_util.encode(np.asfortranarray(mask))["counts"].decode()
    counts = decode_counts(text)
    values = np.repeat(np.arange(len(counts)) % 2, counts)
    assert np.array_equal(values, mask[:, 0])


def test_a_missing_area_is_the_masks_or_else_the_boxs(data: DataSet) -> None:
    fixed = data.folder / "fixed.json"
    spoil(data, without("annotations", "area"))
    data.content["annotations"][0]["segmentation"] = [[4, 6, 20, 6, 20, 26]]  # half of its box
    data.write()
    data.check("--fix", str(fixed))
    truth = COCO(str(fixed))
    assert truth.anns[1]["area"] == truth.annToMask(truth.anns[1]).sum() < 200
    for annotation in data.content["annotations"]:
        del annotation["segmentation"]
    data.write()
    fixed.unlink()
    data.check("--fix", str(fixed))
    assert COCO(str(fixed)).anns[1]["area"] == BOX[2] * BOX[3]


# Two sets


def check_two(one: DataSet, other: DataSet, *words: str) -> tuple[int, set[str], dict]:
    report = one.folder / "report.json"
    arguments = ["--train-json", one.json, "--train-images", one.images]
    arguments += ["--val-json", other.json, "--val-images", other.images, "--json", report]
    status = check_dataset.main([*map(str, arguments), *words])
    (between,) = json.loads(report.read_text())["between"]
    return status, {f["problem"] for f in between["findings"]}, between


@pytest.fixture
def other(tmp_path: Path) -> DataSet:
    """Other pictures under other names."""
    other = DataSet(tmp_path / "other")
    rng = np.random.default_rng(1)
    for image in other.content["images"]:
        (other.images / image["file_name"]).unlink()
        image["file_name"] = f"other_{image['file_name']}"
        small = Image.fromarray(rng.integers(0, 255, (6, 8, 3), dtype=np.uint8))
        small.resize(SIZE[::-1]).save(other.images / image["file_name"])
    return other


def test_sets_without_anything_in_common(data: DataSet, other: DataSet) -> None:
    data.write()
    other.write()
    assert check_two(data, other)[:2] == (0, set())


def test_a_leak_is_found_and_dropped_from_training(data: DataSet, other: DataSet) -> None:
    shutil.copy(data.images / "a.jpg", other.images / "other_b.png")
    data.write()
    other.write()
    fixed = [str(d.folder / "fixed.json") for d in (data, other)]
    status, problems, _ = check_two(data, other, "--fix", *fixed)
    assert (status, problems) == (1, {"leaked_file"})
    data.json, other.json = map(Path, fixed)
    assert check_two(data, other)[:2] == (0, set())
    assert [i["file_name"] for i in json.loads(data.json.read_text())["images"]] == NAMES[1:]
    assert len(json.loads(other.json.read_text())["images"]) == 4


def test_bits_are_counted_alike_by_numpy_1_and_2(monkeypatch: pytest.MonkeyPatch) -> None:
    words = np.random.default_rng(0).integers(0, 2**63, (3, 5, 4), dtype=np.uint64)
    expected = [[sum(int(word).bit_count() for word in row) for row in rows] for rows in words]
    for _ in range(2):
        assert _ones(words).sum(axis=-1).tolist() == expected
        monkeypatch.delattr(np, "bitwise_count", raising=False)


@pytest.mark.parametrize("change", [{"quality": 30}, {"scale": 2}])
def test_a_copy_that_was_saved_again_is_noted(data: DataSet, other: DataSet, change: dict) -> None:
    picture = Image.open(data.images / "b.png")
    scale = change.pop("scale", 1)
    size = (scale * SIZE[1], scale * SIZE[0])
    picture.resize(size).save(other.images / "again.jpg", **change)
    other.content["images"][0] |= {"file_name": "again.jpg", "width": size[0], "height": size[1]}
    data.write()
    other.write()
    status, problems, between = check_two(data, other)
    assert (status, problems) == (0, {"near_duplicate"})
    assert between["findings"][0]["examples"] == ["b.png and again.jpg"]


def test_the_same_names_for_other_pictures_are_noted(data: DataSet, other: DataSet) -> None:
    (other.images / "other_a.jpg").rename(other.images / "a.jpg")
    other.content["images"][0]["file_name"] = "a.jpg"
    data.write()
    other.write()
    assert check_two(data, other)[:2] == (0, {"same_name"})


def test_other_categories(data: DataSet, other: DataSet) -> None:
    other.content["categories"][0]["name"] = "fox"
    data.write()
    other.write()
    assert check_two(data, other)[:2] == (1, {"categories_differ"})


def test_ids_of_the_same_names_are_those_of_the_first_set(data: DataSet, other: DataSet) -> None:
    """Corrected copies have one numbering, so that all tools take them; labels stay by name."""
    ids = {1: 2, 2: 1}
    for category in other.content["categories"]:
        category["id"] = ids[category["id"]]
    for annotation in other.content["annotations"]:
        annotation["category_id"] = ids[annotation["category_id"]]
    data.content["categories"].append({"id": 7, "name": "fox"})
    data.write()
    other.write()
    fixed = [str(d.folder / "fixed.json") for d in (data, other)]
    assert check_two(data, other, "--fix", *fixed)[:2] == (1, {"category_ids_differ"})
    contents = [json.loads(Path(path).read_text()) for path in fixed]
    assert contents[0]["categories"] == contents[1]["categories"]
    before, after = (
        [{c["id"]: c["name"] for c in content["categories"]}[a["category_id"]]
         for a in content["annotations"]]
        for content in (other.content, contents[1])
    )  # fmt: skip
    assert before == after
    data.json, other.json = map(Path, fixed)
    assert check_two(data, other)[:2] == (0, set())


# Real sets and the command line


def test_the_digits_are_clean_by_name(tmp_path: Path, catalogs: None, monkeypatch, capsys) -> None:
    build_digits(tmp_path, num_train=2, num_val=2, image_size=128)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    # Not built anew at its usual size.
    monkeypatch.setattr("vovnet_d2.data.digits.build_digits", lambda root: root)
    assert check_dataset.main(["digits_train", "digits_val"]) == 0
    assert "2 images" in capsys.readouterr().out


def test_the_miniature_coco_is_clean(tmp_path: Path, capsys) -> None:
    root = write_coco_tree(tmp_path) / "coco"
    files = ["--train-json", root / "annotations" / "instances_train2017.json"]
    files += ["--train-images", root / "train2017"]
    assert check_dataset.main(list(map(str, files))) == 0
    assert "crowds" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "Nothing to check"),
        (["digits_trian"], "'digits_trian' is not registered. Close to it: digits_train"),
        (["voc_2007_val"], "no annotation file in COCO's format: it is a pascal_voc"),
        (["--train-json", "x.json"], "go together"),
        (["--train-json", "x.json", "--train-images", "."], "no annotation file x.json"),
        (["--train-json", "{json}", "--train-images", "nowhere"], "no folder of images nowhere"),
        (
            ["--train-json", "{json}", "--train-images", "{images}", "--fix", "a", "b"],
            "a file for each data set: 1",
        ),
        (
            ["--train-json", "{json}", "--train-images", "{images}", "--fix", "{json}"],
            "exists already",
        ),
        (
            ["--train-json", "{json}", "--train-images", "{images}", "--fix", "no/where"],
            "no folder no",
        ),
        (
            ["--train-json", "{json}", "--train-images", "{images}", "--json", "no/where"],
            "no folder no",
        ),
    ],
)
def test_mistakes(
    data: DataSet, words: list[str], message: str, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    def look(*args: object) -> None:
        pytest.fail("images were read before the arguments were found wrong")

    monkeypatch.setattr("vovnet_d2.data.check.records.inspect_files", look)
    data.write()
    before = data.json.read_bytes()
    words = [word.format(json=data.json, images=data.images) for word in words]
    with pytest.raises(SystemExit, match="2"):
        check_dataset.main(words)
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert data.json.read_bytes() == before


def test_file_names_cannot_write_to_the_terminal(data: DataSet, capsys) -> None:
    spoil(data, setting("images", "file_name", "\x1b[2J\nNo problems."))
    data.check()
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert out.count("\nNo problems.") == 0


# Whatever is done to a set, its corrected copy is clean, and Detectron2 takes it

VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-5, 100),
    st.floats(),
    st.text(max_size=3),
    st.lists(st.one_of(st.integers(-5, 99), st.floats(), st.text(max_size=2)), max_size=9),
    st.lists(st.lists(st.floats(-99, 99), max_size=9), max_size=3),
    st.fixed_dictionaries(
        {}, optional={"size": st.just(list(SIZE)), "counts": st.text("0123PQRop", max_size=6)}
    ),
    st.sampled_from([*NAMES, "../a", *map(str, range(5))]),
)
PLACES = [
    *[("categories", key) for key in ("id", "name", "keypoints")],
    *[("images", key) for key in ("id", "file_name", "height", "width")],
    *[("annotations", key) for key in ("id", "image_id", "category_id", "bbox", "area")],
    *[("annotations", key) for key in ("iscrowd", "segmentation", "keypoints", "ignore")],
]
CHANGES = st.lists(
    st.tuples(st.sampled_from(PLACES), st.integers(0, 7), VALUES), min_size=1, max_size=8
)


@pytest.fixture(scope="module")
def canvas(tmp_path_factory: pytest.TempPathFactory) -> DataSet:
    return DataSet(tmp_path_factory.mktemp("fuzz") / "data")


def change_and_fix(data: DataSet, changes: list) -> None:
    data.json = data.folder / "a.json"
    data.content = copy.deepcopy(make_content())
    for (section, key), index, value in changes:
        records = data.content[section]
        records[index % len(records)][key] = value
    data.write()
    fixed = data.folder / "fixed.json"
    fixed.unlink(missing_ok=True)
    file, images = str(data.json), str(data.images)
    words = ["--train-json", file, "--train-images", images, "--masks", "--fix", str(fixed)]
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            status = check_dataset.main(words)
        except SystemExit as ended:  # nothing that is left could be trained on
            status = ended.code
        assert status in (0, 1) or (status, fixed.exists()) == (2, False)
        if fixed.exists():
            data.json = fixed
            status, findings = data.check()
            assert (status, names_of(findings)) == (0, set())
            require_trainable(data)


FUZZ: dict[str, Any] = {
    "deadline": None,
    "derandomize": True,
    "suppress_health_check": [HealthCheck.function_scoped_fixture],
}


@settings(max_examples=25, **FUZZ)
@given(changes=CHANGES)
def test_corrected_copies_are_clean(canvas: DataSet, changes: list) -> None:
    change_and_fix(canvas, changes)


@pytest.mark.slow
@settings(max_examples=600, **FUZZ)
@given(changes=CHANGES)
def test_many_corrected_copies_are_clean(canvas: DataSet, changes: list) -> None:
    change_and_fix(canvas, changes)
