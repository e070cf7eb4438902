# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Mistakes that all annotations of a set share: order or unit of their numbers, image size or
orientation."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import check_dataset
import numpy as np
import pycocotools.mask as mask_util
import pytest
from PIL import Image

from vovnet_d2.data.check.frames import _scale
from vovnet_d2.data.check.names import NearNames
from vovnet_d2.data.check.orientation import TurnedFile, turn_annotation
from vovnet_d2.data.image_file import ORIENTATION, TURNS

Content = dict[str, Any]
SIZE = (60, 90)  # height, width
NUM_IMAGES, PER_IMAGE = 4, 4


def make(folder: Path, *, masks: bool = False, square: bool = False) -> Content:
    """Write images of bright rectangles on a dark background, and return their annotations."""
    (folder / "images").mkdir(parents=True)
    rng = np.random.default_rng(0)
    height, width = (60, 60) if square else SIZE
    images, annotations = [], []
    for index in range(NUM_IMAGES):
        pixels = rng.integers(0, 40, (height, width, 3)).astype(np.uint8)
        for _ in range(PER_IMAGE):
            w, h = rng.integers(8, 20, 2).tolist()
            x, y = int(rng.integers(5, width - w - 3)), int(rng.integers(5, height - h - 3))
            pixels[y : y + h, x : x + w] = rng.integers(120, 255, 3)
            corners = [x, y, x + w, y, x + w, y + h, x, y + h]
            annotations.append(
                {"id": len(annotations) + 1, "image_id": index + 1, "category_id": 1}
                | {"bbox": [x, y, w, h], "area": 5 + w * h // 2, "iscrowd": 0}
                | ({"segmentation": [corners]} if masks else {})
            )
        Image.fromarray(pixels).save(folder / "images" / f"{index}.png")
        images.append({"id": index + 1, "file_name": f"{index}.png", "height": height})
        images[-1]["width"] = width
    categories = [{"id": 1, "name": "box"}]
    return {"info": {}, "categories": categories, "images": images, "annotations": annotations}


def check(folder: Path, content: Content) -> tuple[int, set[str], Content | None]:
    """Return the exit status, the problems, and the corrected copy if there is one."""
    (folder / "a.json").write_text(json.dumps(content))
    (fixed := folder / "fixed.json").unlink(missing_ok=True)
    words = ["--train-json", folder / "a.json", "--train-images", folder / "images"]
    words += ["--json", folder / "report.json", "--fix", fixed]
    try:
        status = check_dataset.main(list(map(str, words)))
    except SystemExit as ended:
        status = int(ended.code or 0)
    findings = json.loads((folder / "report.json").read_text())["data_sets"][0]["findings"]
    problems = {f["problem"] for f in findings if f["severity"] != "note"}
    return status, problems, json.loads(fixed.read_text()) if fixed.exists() else None


def boxes_of(content: Content) -> np.ndarray:
    return np.array([a["bbox"] for a in content["annotations"]], dtype=float)


# Order and unit

W, H = SIZE[1], SIZE[0]
WAYS: dict[str, Callable[[float, float, float, float], list[float]]] = {
    "corners": lambda x, y, w, h: [x, y, x + w, y + h],
    "corners, y first": lambda x, y, w, h: [y, x, y + h, x + w],
    "pairs": lambda x, y, w, h: [x, x + w, y, y + h],
    "fractions": lambda x, y, w, h: [x / W, y / H, w / W, h / H],
    "fractions of corners": lambda x, y, w, h: [x / W, y / H, (x + w) / W, (y + h) / H],
    "YOLO": lambda x, y, w, h: [(x + w / 2) / W, (y + h / 2) / H, w / W, h / H],
    "thousandths of corners, y first": lambda x, y, w, h: [
        y * 1000 / H, x * 1000 / W, (y + h) * 1000 / H, (x + w) * 1000 / W
    ],
}  # fmt: skip


@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_boxes_of_another_order_or_unit(tmp_path: Path, way: str, masks: bool) -> None:
    good = make(tmp_path, masks=masks)
    content = copy.deepcopy(good)
    for annotation in content["annotations"]:
        annotation["bbox"] = WAYS[way](*annotation["bbox"])
    status, problems, fixed = check(tmp_path, content)
    assert (status, problems) == (1, {"box_convention"})
    assert fixed is not None
    assert np.allclose(boxes_of(fixed), boxes_of(good), atol=1e-6)
    assert check(tmp_path, fixed)[:2] == (0, set())


def test_edges_in_images_decide_the_order_of_corners(tmp_path: Path) -> None:
    """Check that edges in the images decide where box corners fit with x first and with y first."""
    good = make(tmp_path, square=True)
    content = copy.deepcopy(good)
    for annotation in content["annotations"]:
        annotation["bbox"] = WAYS["corners, y first"](*annotation["bbox"])
    _, problems, fixed = check(tmp_path, content)
    assert problems == {"box_convention"}
    assert fixed is not None
    assert np.allclose(boxes_of(fixed), boxes_of(good))
    for image in content["images"]:  # blank images have no edges
        Image.new("RGB", (60, 60)).save(tmp_path / "images" / image["file_name"])
    _, problems, fixed = check(tmp_path, content)
    assert problems == {"box_convention_unclear"}
    assert fixed is None


@pytest.mark.parametrize("masks", [False, True])
def test_good_boxes_do_not_change(tmp_path: Path, masks: bool) -> None:
    """Check boxes that would also fit as corners. One of them reaches out of its image a little."""
    content = make(tmp_path)
    for annotation in content["annotations"]:
        annotation["bbox"] = [20, 14, 50, 40]
    content["annotations"][0]["bbox"] = [20, 14, 80, 40]
    _, problems, fixed = check(tmp_path, content)
    assert problems == {"box_outside"} | ({"repeated_annotation"})
    assert fixed is not None
    assert fixed["annotations"][1]["bbox"] == [20, 14, 50, 40]


@pytest.mark.parametrize("way", ["fractions", "y, x"])
def test_polygons_of_another_order_or_unit(tmp_path: Path, way: str) -> None:
    good = make(tmp_path, masks=True)
    content = copy.deepcopy(good)
    for annotation in content["annotations"]:
        points = np.reshape(annotation["segmentation"][0], (-1, 2))
        points = points / (W, H) if way == "fractions" else points[:, ::-1]
        annotation["segmentation"] = [points.reshape(-1).tolist()]
    _, problems, fixed = check(tmp_path, content)
    assert problems == {"polygon_convention"}
    assert fixed is not None
    for found, expected in zip(fixed["annotations"], good["annotations"], strict=True):
        assert np.allclose(found["segmentation"], expected["segmentation"])


def test_a_problem_of_most_annotations_is_not_fixed_one_by_one(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    content = make(tmp_path, masks=True)
    for annotation in content["annotations"]:
        annotation["bbox"][0] += 21
    status, problems, fixed = check(tmp_path, content)
    assert status == 2
    assert problems >= {"systematic", "box_and_mask"}
    assert fixed is None
    assert "the same problem (16 of its 16 annotations" in capsys.readouterr().err


# Size


@pytest.mark.parametrize("factor", [0.5, 2])
def test_pictures_that_were_resized(tmp_path: Path, factor: float) -> None:
    content = make(tmp_path, masks=True)
    before = boxes_of(content)
    for path in (tmp_path / "images").iterdir():
        with Image.open(path) as picture:
            smaller = picture.resize((round(W * factor), round(H * factor)))
        smaller.save(path)
    _, problems, fixed = check(tmp_path, content)
    assert problems == {"resized", "image_size"}
    assert fixed is not None
    assert np.allclose(boxes_of(fixed), before * factor)
    assert check(tmp_path, fixed)[:2] == (0, set())


def test_annotations_that_fit_the_resized_pictures_do_not_change(tmp_path: Path) -> None:
    content = make(tmp_path)
    for path in (tmp_path / "images").iterdir():
        with Image.open(path) as picture:
            smaller = picture.resize((W // 2, H // 2))
        smaller.save(path)
    for annotation in content["annotations"]:
        annotation["bbox"] = [number / 2 for number in annotation["bbox"]]
    corners = boxes_of(content)[:, :2] + boxes_of(content)[:, 2:]
    assert corners[:, 0].max() > H // 2 + 1
    _, problems, fixed = check(tmp_path, content)
    assert problems == {"image_size"}
    assert fixed is not None
    assert np.array_equal(boxes_of(fixed), boxes_of(content))


def test_all_kinds_of_annotations_are_resized() -> None:
    polygon = [10, 20, 40, 20, 40, 60]
    annotation = {"bbox": [10, 20, 30, 40], "area": 100, "segmentation": [polygon], "id": 7}
    assert _scale(annotation | {"keypoints": [10, 20, 2]}, (2, 3)) == {
        "bbox": [20, 60, 60, 120],
        "area": 600,
        "segmentation": [[20, 60, 80, 60, 80, 180]],
        "keypoints": [20, 60, 2],
        "id": 7,
    }


# Orientation


def turn(folder: Path, content: Content, orientation: int, *, annotations: bool) -> Content:
    """Add an EXIF orientation to the images.

    If ``annotations`` is True, turn the annotations, too. Return the annotations that fit the
    images as they are then read.
    """
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    for path in sorted((folder / "images").iterdir()):
        with Image.open(path) as picture:
            picture.load()
        picture.save(path, exif=exif)
    truth = copy.deepcopy(content)
    for image in truth["images"]:
        stored = image["width"], image["height"]
        if orientation >= 5:
            image["width"], image["height"] = stored[::-1]
        file = TurnedFile(stored, orientation)
        for i, annotation in enumerate(truth["annotations"]):
            if annotation["image_id"] == image["id"]:
                truth["annotations"][i] = turn_annotation(annotation, file)
    if annotations:
        content.update(copy.deepcopy(truth))
    return truth


@pytest.mark.parametrize("turned", [False, True], ids=["stored", "turned"])
@pytest.mark.parametrize("orientation", range(2, 9))
def test_orientations(tmp_path: Path, orientation: int, turned: bool) -> None:
    content = make(tmp_path, masks=orientation % 2 == 0)
    truth = turn(tmp_path, content, orientation, annotations=turned)
    status, problems, fixed = check(tmp_path, content)
    assert (status, problems) == ((0, set()) if turned else (1, {"annotations_turned"}))
    assert fixed is not None
    assert np.allclose(boxes_of(fixed), boxes_of(truth))
    assert [i["width"] for i in fixed["images"]] == [i["width"] for i in truth["images"]]
    assert check(tmp_path, fixed)[:2] == (0, set())


def test_annotations_that_fit_with_and_without_a_turn_are_a_warning(tmp_path: Path) -> None:
    content = make(tmp_path)
    for image in content["images"]:
        Image.new("RGB", SIZE[::-1]).save(tmp_path / "images" / image["file_name"])
    turn(tmp_path, content, 3, annotations=False)
    status, problems, fixed = check(tmp_path, content)
    assert (status, problems) == (1, {"turn_unclear"})
    assert fixed is not None
    assert boxes_of(fixed).tolist() == boxes_of(content).tolist()


@pytest.mark.parametrize("orientation", range(2, 9))
def test_annotations_turn_with_the_pixels(orientation: int) -> None:
    """Compare turned masks, boxes, polygons and keypoints with a mask that Pillow turns."""
    mask = np.zeros(SIZE, np.uint8)
    mask[7:20, 30:38] = 1
    rle = mask_util.encode(np.asfortranarray(mask))
    annotation = {
        "bbox": [30, 7, 8, 13],
        "segmentation": {"size": list(SIZE), "counts": rle["counts"].decode()},
        "keypoints": [30, 7, 2, 0, 0, 0],
    }
    file = TurnedFile(SIZE[::-1], orientation)
    expected = np.asarray(Image.fromarray(mask).transpose(TURNS[orientation]))
    found = turn_annotation(annotation, file)
    assert np.array_equal(mask_util.decode(found["segmentation"]), expected)
    assert found["bbox"] == mask_util.toBbox(mask_util.encode(np.asfortranarray(expected))).tolist()
    corner = np.zeros(SIZE, np.uint8)
    corner[7, 30] = 1
    (y,), (x,) = np.nonzero(np.asarray(Image.fromarray(corner).transpose(TURNS[orientation])))
    assert found["keypoints"] == [x, y, 2, 0, 0, 0]
    polygon = {"segmentation": [[30, 7, 38, 7, 38, 20, 30, 20]]}
    (points,) = turn_annotation(polygon, file)["segmentation"]
    drawn = mask_util.decode(mask_util.frPyObjects([points], *expected.shape))[..., 0]
    assert np.array_equal(drawn, expected)


def test_images_that_use_12_of_16_bits_are_reported(tmp_path: Path) -> None:
    content = make(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 4096, SIZE).astype(np.uint16)
    Image.fromarray(pixels).save(tmp_path / "images" / "0.png")
    assert check(tmp_path, content)[1] == {"dark_pixels"}


def test_similar_names_in_another_split_do_not_match(tmp_path: Path) -> None:
    for folder, expected in (("val", None), ("train", "a.jpg"), ("pictures", "a.jpg")):
        root = tmp_path / "data" / folder
        root.mkdir(parents=True)
        (root / "a.jpg").touch()
        assert NearNames(root).find("images/train/a.jpg") == expected
