# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""The check of annotations before the first iteration: numbers, categories, masks, conventions."""

import copy
import json
import logging
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from detectron2.data import DatasetCatalog
from detectron2.data.datasets import register_coco_instances
from engine_runs import FASTER_RCNN, MASK_RCNN, launch, tiny_config
from PIL import Image

from vovnet_d2.data.image_file import ORIENTATION
from vovnet_d2.data.record_files import check_files
from vovnet_d2.data.records import check_records, find_absurd
from vovnet_d2.engine import Trainer

pytest_plugins = ["engine_fixtures"]

NAN, INF = float("nan"), float("inf")
POLYGON = [10.0, 10.0, 40.0, 10.0, 40.0, 30.0]
GOOD: dict[str, Any] = {"bbox": [10, 10, 30, 20], "bbox_mode": 1, "category_id": 0}
GOOD["segmentation"] = [POLYGON]
RLE = {"size": [96, 128], "counts": [96 * 128]}
ABSURD: dict[str, tuple[dict, str]] = {
    "NaN in a polygon": ({"segmentation": [[*POLYGON, NAN, 3.0]]}, "polygon .* is not finite"),
    "infinite polygon": ({"segmentation": [[*POLYGON, INF, 3.0]]}, "polygon .* is not finite"),
    "huge polygon": ({"segmentation": [[*POLYGON, 1e9, 3.0]]}, r"the number 1e\+09, absurd in an"),
    "array": ({"segmentation": [np.array([*POLYGON, NAN, 3])]}, "polygon .* is not finite"),
    "text in a polygon": (
        {"segmentation": [["1"] * 6]},
        "with a value that is not a number",
    ),
    "NaN in a box": ({"bbox": [NAN, 1, 2, 3]}, "bbox with a number that is not finite"),
    "far box": ({"bbox": [-99999, 1, 2, 3]}, r"bbox with the number -99999, absurd in an image"),
    "NaN in a keypoint": ({"keypoints": [1, NAN, 2]}, "keypoints .* is not finite"),
    "RLE of another image": (
        {"segmentation": RLE | {"size": [9, 9]}},
        r"cannot be used \(size \[9, 9\]",
    ),
    "RLE of too many": (
        {"segmentation": RLE | {"counts": [9**9]}},
        r"cannot be used \(387420489 pixels",
    ),
    "RLE of rubbish": (
        {"segmentation": RLE | {"counts": b"ooo"}},
        "RLE that cannot be used \\('o' is|RLE that cannot be used \\(a comp",
    ),
    "beyond all numbers": (
        {"segmentation": [[*POLYGON, 10**400, 3]]},
        "with a value that is not a number",
    ),
    "a box beyond all": ({"bbox": [10**400, 1, 2, 3]}, "bbox with a value that is not a number"),
    "a flat polygon": ({"segmentation": POLYGON}, "a polygon with a value that is not a number"),
    "null in a box": (
        {"bbox": [None, 1, 2, 3]},
        r"with a value that is not a number.*\[None, 1",
    ),
    "category": ({"category_id": 3}, "category 3, where the network has 3"),
    "category of text": ({"category_id": "1"}, "category '1', where the network has 3"),
}


def records(*annotations: dict) -> list[dict[str, Any]]:
    record = {"file_name": "a.jpg", "width": 128, "height": 96}
    return [record | {"annotations": list(annotations)}]


@pytest.mark.parametrize("kind", ABSURD)
def test_absurd_numbers_are_named(kind: str) -> None:
    changes, message = ABSURD[kind]
    data = records(GOOD, GOOD | changes, GOOD | changes)
    pattern = rf"^Data set d: object 1 of a\.jpg has .*{message}.* 1 more objects have such"
    tracemalloc.start()
    with pytest.raises(ValueError, match=pattern):
        check_records(data, "d", num_classes=3, masks=True)
    assert tracemalloc.get_traced_memory()[1] < 1e6
    tracemalloc.stop()
    check_records(records(GOOD, GOOD), "d", num_classes=3, masks=True)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ({"width": 10**6, "height": 10**6}, r"a\.jpg has a size of 1e\+06 x 1e\+06 pixels"),
        ({"width": "128"}, "a width or height of '128'"),
        ({"height": 0}, "a width or height of 0"),
        ({"height": NAN}, "a width or height of nan"),
        ({"width": True}, "a width or height of True"),
        ({"width": 127.5}, r"a width or height of 127\.5"),
    ],
)
def test_absurd_sizes_are_named(size: dict, message: str) -> None:
    """Check the sizes of records, because masks have this size."""
    (good,) = records(GOOD)
    check_records([good | {"width": 128.0}], "d")  # JSON files may have such numbers
    with pytest.raises(ValueError, match=f"^Data set d: .*{message}"):
        check_records([good, good | size], "d")


def test_good_masks_of_all_kinds() -> None:
    pixels = np.zeros((96, 128), bool)
    for mask in (RLE, [np.array(POLYGON)], pixels, [POLYGON, POLYGON]):
        assert find_absurd(GOOD | {"segmentation": mask}, 128, 96) == ""
        check_records(records(GOOD | {"segmentation": mask}), "d", masks=True)


def test_objects_without_masks_are_counted() -> None:
    bare = {k: v for k, v in GOOD.items() if k != "segmentation"}
    data = records(GOOD, bare, bare | {"segmentation": [[]]}, bare | {"iscrowd": 1})
    check_records(data, "d")
    with pytest.raises(ValueError, match=r"2 objects of 4 without a mask \(object 1 of a\.jpg"):
        check_records(data, "d", masks=True)


def test_boxes_as_corners_are_refused() -> None:
    rng = np.random.default_rng(0)
    objects = []
    for _ in range(20):
        x, y = rng.integers(20, 60, 2).tolist()
        objects.append({"bbox": [x, y, x + 40, y + 30], "bbox_mode": 1, "category_id": 0})
    with pytest.raises(ValueError, match="but x1, y1, x2, y2 in pixels"):
        check_records(records(*objects), "d")
    check_records(records(*(o | {"bbox_mode": 0} for o in objects)), "d")


@pytest.mark.parametrize(
    ("change", "convention"),
    [
        (lambda points: points / (128, 96), "fractions"),
        (lambda points: points[:, ::-1], "y, x"),
    ],
)
def test_polygons_in_another_unit_or_order_are_refused(
    change: Callable[[np.ndarray], np.ndarray], convention: str
) -> None:
    rng = np.random.default_rng(0)
    good, wrong = [], []
    for _ in range(20):
        x, y = rng.integers(20, 60, 2).tolist()
        points = np.array([[x, y], [x + 40, y], [x + 40, y + 10], [x, y + 10]], float)
        box = {"bbox": [x, y, 40, 10], "bbox_mode": 1, "category_id": 0}
        good.append(box | {"segmentation": [points.reshape(-1).tolist()]})
        wrong.append(box | {"segmentation": [change(points).reshape(-1).tolist()]})
    check_records(records(*good), "d", masks=True)
    with pytest.raises(ValueError, match=f"Data set d: its polygons are not .*, but {convention}"):
        check_records(records(*wrong), "d", masks=True)


# Before a training


def spoil(coco: Path, tmp_path: Path, change: Callable[[dict], Any], name: str = "mine") -> None:
    """Register the miniature COCO with changed annotations."""
    content = json.loads((coco / "coco/annotations/instances_train2017.json").read_text())
    change(content)
    (tmp_path / "a.json").write_text(json.dumps(content))
    register_coco_instances(name, {}, str(tmp_path / "a.json"), str(coco / "coco/train2017"))


def test_a_polygon_with_a_nan_is_found_before_the_training(coco: Path, tmp_path: Path) -> None:
    def change(content: dict) -> None:
        content["annotations"][4]["segmentation"][0][2] = NAN

    spoil(coco, tmp_path, change)
    with pytest.raises(ValueError, match=r"Data set mine: object . of .*polygon .* not finite"):
        launch(MASK_RCNN, tmp_path, "DATASETS.TRAIN", "('mine',)", "DATASETS.TEST", "()")
    cfg = tiny_config(MASK_RCNN, tmp_path, "DATASETS.TEST", "('mine',)")
    with pytest.raises(ValueError, match=r"polygon .* not finite"):
        launch(MASK_RCNN, tmp_path, "DATASETS.TEST", "('mine',)")
    assert cfg.DATASETS.TEST == ("mine",)


def test_nothing_left_to_train_on_is_one_sentence(coco: Path, tmp_path: Path) -> None:
    """Use empty masks. Detectron2's loader drops such objects and raises an AssertionError."""

    def change(content: dict) -> None:
        for annotation in content["annotations"]:
            annotation["segmentation"] = [[]]

    spoil(coco, tmp_path, change)
    with pytest.raises(ValueError, match="No valid data found in mine"):
        launch(FASTER_RCNN, tmp_path, "DATASETS.TRAIN", "('mine',)", "DATASETS.TEST", "()")


# Files


def files(folder: Path, *pictures: Image.Image) -> list[dict[str, Any]]:
    found = []
    for index, picture in enumerate(pictures):
        path = folder / f"{index}.png"
        picture.save(path, format="TIFF" if picture.mode == "F" else "PNG")
        size = {"width": picture.width, "height": picture.height}
        found.append({"file_name": str(path), "annotations": []} | size)
    return found


def test_files_that_cannot_be_used_are_counted(tmp_path: Path) -> None:
    grey = Image.new("L", (20, 10))
    data = files(tmp_path, grey, grey, grey, Image.new("F", (20, 10)), grey)
    Path(data[0]["file_name"]).rename(tmp_path / "0.PNG")
    Path(data[1]["file_name"]).write_text("404")
    data[2]["width"] = 21
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    grey.save(data[4]["file_name"], exif=exif)
    data.append({"file_name": "s3://bucket/a.png"})  # PathManager may find it
    reasons = [
        r"0\.png cannot be used: there is no such file, and the one that is meant .* '0\.PNG'",
        r"1\.png cannot be used: of no known format",
        r"2\.png cannot be used: it has 20 x 10 pixels, and its annotations say 21 x 10",
        r"3\.png cannot be used: it has 32 bits per pixel",
        r"4\.png cannot be used: its EXIF .* turns it to 10 x 20 .* the 20 x 10 that are stored",
    ]
    for first, reason in enumerate(reasons):
        others = len(reasons) - 1 - first
        counted = rf"\. {others} more cannot be used\. " if others else r"\. tools"
        with pytest.raises(ValueError, match=f"^Data set d: .*{reason}.*{counted}") as caught:
            check_files(data[first:], "d", roots=[str(tmp_path)], most_unusable=others)
        assert "\n" not in str(caught.value)
        check_files(data[first:], "d", most_unusable=others + 1)


def test_depths_of_images_are_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    dark, light = (Image.fromarray(np.full((9, 9), n, np.uint16)) for n in (4095, 4096))
    with caplog.at_level(logging.INFO):
        check_files(files(tmp_path, dark, light, Image.new("L", (9, 9))), "d")
    assert "Data set d: 2 of 3 pictures have 16 bits per channel" in caplog.text
    with pytest.raises(ValueError, match=r"16 bits, for example .*0\.png, use the lower 12"):
        check_files(files(tmp_path, dark, dark), "d")


def test_missing_files_are_found_before_the_run(coco: Path, tmp_path: Path) -> None:
    """Check that missing files are found before the first iteration, also those for evaluation."""
    images = tmp_path / "images"
    images.mkdir()
    for path in (coco / "coco/train2017").iterdir():
        (images / path.name).write_bytes(path.read_bytes())
    source = coco / "coco/annotations/instances_train2017.json"
    register_coco_instances("mine", {}, str(source), str(images))
    (gone, *_) = sorted(images.iterdir())
    gone.rename(gone.with_suffix(".JPG"))
    pattern = rf"Data set mine: {gone} cannot be used: .* seems to be '{gone.stem}\.JPG'"
    for key in ("TRAIN", "TEST"):
        with pytest.raises(ValueError, match=pattern):
            launch(FASTER_RCNN, tmp_path / key, f"DATASETS.{key}", "('mine',)")
        assert not (tmp_path / key / "model_final.pth").exists()


# Orientation


def turned(folder: Path, orientation: int, *, stored: bool) -> list[dict[str, Any]]:
    """Write square images with annotations for the stored image or for the turned image."""
    rng = np.random.default_rng(0)
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    found = []
    for index in range(6):
        pixels = rng.integers(0, 30, (80, 80, 3)).astype(np.uint8)
        x, y, w, h = (int(n) for n in (rng.integers(4, 20), rng.integers(4, 20), 22, 14))
        pixels[y : y + h, x : x + w] = 200
        Image.fromarray(pixels).save(folder / f"{index}.png", exif=exif)
        box = [x, y, w, h] if stored else [80 - x - w, 80 - y - h, w, h]
        annotation = {"bbox": box, "bbox_mode": 1, "category_id": 0}
        record = {"file_name": str(folder / f"{index}.png"), "width": 80, "height": 80}
        found.append(record | {"annotations": [annotation]})
    return found


def test_orientations_of_square_images(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    check_files(turned(tmp_path, 3, stored=False), "d")
    assert not caplog.records
    with pytest.raises(ValueError, match=r"6 of the 6 pictures are turned .* as they are stored"):
        check_files(turned(tmp_path, 3, stored=True), "d")
    unclear = turned(tmp_path, 3, stored=True)
    for record in unclear:
        exif = Image.Exif()
        exif[ORIENTATION] = 3
        Image.new("RGB", (80, 80)).save(record["file_name"], exif=exif)
    with caplog.at_level(logging.WARNING):
        check_files(unclear, "d")
    assert "Data set d: 6 of the 6 pictures are turned by their EXIF orientation" in caplog.text


def test_the_trainer_checks_orientations(
    catalogs: None, fresh_logging: None, tmp_path: Path
) -> None:
    data = turned(tmp_path, 4, stored=True)
    for record in data:  # turned by 180 degrees
        for annotation in record["annotations"]:
            assert annotation["bbox"][1] < 40
    DatasetCatalog.register("turned", lambda: copy.deepcopy(data))
    cfg = tiny_config(FASTER_RCNN, tmp_path, "DATASETS.TRAIN", "('turned',)")
    with pytest.raises(ValueError, match="turned by their EXIF orientation"):
        Trainer.build_train_loader(cfg)
