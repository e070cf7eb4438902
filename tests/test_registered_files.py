# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Custom data in the files of a data set that Detectron2 has registered."""

import importlib.machinery
import json
import shutil
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import check_dataset
import pytest
from coco_tree import THINGS
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances, register_pascal_voc
from detectron2.data.datasets.builtin import (
    register_all_cityscapes,
    register_all_coco,
    register_all_lvis,
    register_all_pascal_voc,
)
from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES, COCO_PERSON_KEYPOINT_NAMES
from detectron2.data.datasets.lvis_v1_categories import LVIS_CATEGORIES
from engine_runs import FASTER_RCNN, MASK_RCNN, TINY
from PIL import Image
from voc_tree import OBJECTS, write_tree

from vovnet_d2.data.check import registered
from vovnet_d2.data.voc import register_voc
from vovnet_d2.engine import argument_parser, load_config, run
from vovnet_d2.engine.data_checks import check_data

pytest_plugins = ["engine_fixtures"]

Categories = list[dict[str, Any]]

OWN: Categories = [{"id": 1, "name": "nucleus"}]
NUCLEUS = r"has 1 category \('nucleus'\), and the name stands for "
KEYPOINT = "COCO-Keypoints/keypoint_rcnn_V_39_eSE_FPN_1x.yaml"
PERSON = {"id": 1, "name": "person", "keypoints": list(COCO_PERSON_KEYPOINT_NAMES)}
LVIS = [{"id": c["id"], "name": c["name"], "synonyms": c["synonyms"]} for c in LVIS_CATEGORIES]


def write(path: Path, categories: Categories) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"images": [], "annotations": [], "categories": categories}))


def check(name: str, config: str, *options: str) -> None:
    datasets = ["DATASETS.TRAIN", f"('{name}',)", "DATASETS.TEST", "()"]
    check_data(load_config(config, [*datasets, *options]), training=True)


@pytest.fixture
def root(catalogs: None, coco_root: Path, tmp_path: Path) -> Path:
    """Return a folder of data sets with a miniature COCO."""
    shutil.copytree(coco_root / "coco", tmp_path / "coco")
    for folder in ("panoptic_train2017", "panoptic_stuff_train2017"):
        (tmp_path / "coco" / folder).mkdir()
    register_all_coco(str(tmp_path))
    register_all_lvis(str(tmp_path))
    return tmp_path


ANNOTATIONS = "coco/annotations/"
# name of the data set: (its file, config and options, right categories, message on other data)
NAMES: dict[str, tuple[str, list[str], Categories, str]] = {
    "coco_2017_train": (
        f"{ANNOTATIONS}instances_train2017.json",
        [FASTER_RCNN],
        [{"id": c["id"], "name": c["name"]} for c in THINGS],
        r"80 categories \('person', 'bicycle', 'car', ...\)",
    ),
    "keypoints_coco_2017_train": (
        f"{ANNOTATIONS}person_keypoints_train2017.json",
        [KEYPOINT],
        [PERSON],
        r"1 category \('person'\)",
    ),
    "coco_2017_train_panoptic_separated": (
        f"{ANNOTATIONS}panoptic_train2017.json",
        # Another check compares the categories of label maps.
        [FASTER_RCNN],
        [{"id": c["id"], "name": c["name"]} for c in COCO_CATEGORIES],
        "133 categories",
    ),
    "lvis_v1_train": (
        "lvis/lvis_v1_train.json",
        [FASTER_RCNN, "MODEL.ROI_HEADS.NUM_CLASSES", "1203"],
        LVIS,
        r"1,203 categories \('aerosol_can', ",
    ),
}


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_the_file_is_compared_with_the_registered_data_set(
    root: Path, name: str, large: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if large:
        monkeypatch.setattr(registered, "_LARGE", 0)
    file, words, right, stated = NAMES[name]
    path = root / file
    write(path, right)
    check(name, *words)
    write(path, OWN)
    message = f"{name} is not what it is registered as: its file {path} {NUCLEUS}{stated}"
    with pytest.raises(ValueError, match=message):
        check(name, *words)
    # The same number of categories with other names, and the right categories with other ids.
    write(path, [{"id": c["id"], "name": f"n{c['id']}"} for c in right])
    with pytest.raises(ValueError, match=r"'n1'.*and the name stands for"):
        check(name, *words)


def test_the_message_names_the_way_out(root: Path) -> None:
    path = root / ANNOTATIONS / "instances_val2017.json"
    write(path, OWN)
    cfg = load_config(FASTER_RCNN)
    with pytest.raises(
        ValueError, match=rf"give --val-annotations {path} --val-images {root}/coco/val2017\.$"
    ):
        check_data(cfg, training=True)


def test_other_ids_of_the_same_names(root: Path) -> None:
    path = root / ANNOTATIONS / "instances_train2017.json"
    write(path, [{"id": i, "name": c["name"]} for i, c in enumerate(THINGS, 1)])
    with pytest.raises(ValueError, match="has the categories of that name under other ids"):
        check("coco_2017_train", FASTER_RCNN)


def test_other_keypoints_of_the_same_category(root: Path) -> None:
    path = root / ANNOTATIONS / "person_keypoints_train2017.json"
    write(path, [PERSON | {"keypoints": ["head", "tail"]}])
    with pytest.raises(
        ValueError, match=r"has 2 keypoints \('head', 'tail'\), and .* 17 keypoints"
    ):
        check("keypoints_coco_2017_train", KEYPOINT)
    write(path, [PERSON | {"keypoints": [*COCO_PERSON_KEYPOINT_NAMES[::-1]]}])
    with pytest.raises(
        ValueError, match=r"has 17 keypoints \('right_ankle', .* 17 keypoints \('no"
    ):
        check("keypoints_coco_2017_train", KEYPOINT)


def test_a_cut_file(root: Path) -> None:
    path = root / ANNOTATIONS / "instances_train2017.json"
    path.write_text(path.read_text()[:300])
    with pytest.raises(ValueError, match=f"coco_2017_train cannot be loaded: {path} is not JSON"):
        check("coco_2017_train", FASTER_RCNN)


@pytest.mark.parametrize(
    "text",
    [
        '{{"categories": {categories}, "images": [{{"id": 1}}], "annotations": []}}',
        '{{"images": [{{"a": "[1"}}], "annotations": [], "categories": {categories}}}',
        '{{"categories": {categories}, "info": {{"categories": ["a"]}}}}',
        '{{"categories": {categories}, "info": {{"categories": [{{"id": 1}}]}}}}',
    ],
)
def test_large_files_are_only_read_whole_if_they_seem_to_differ(
    root: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    path = root / ANNOTATIONS / "instances_train2017.json"
    categories = json.dumps([{"id": c["id"], "name": c["name"]} for c in THINGS])
    path.write_text(text.format(categories=categories))
    read = []
    original = registered.read_annotation_file
    monkeypatch.setattr(registered, "_LARGE", 0)
    monkeypatch.setattr(
        registered, "read_annotation_file", lambda *args: read.append(1) or original(*args)
    )
    check("coco_2017_train", FASTER_RCNN)
    assert bool(read) == ("info" in text)


def test_data_sets_with_custom_names(root: Path) -> None:
    path, folder = root / "own.json", str(root / "coco" / "train2017")
    write(path, OWN)
    register_coco_instances("said", {"thing_classes": ["cell"]}, str(path), folder)
    one = ["MODEL.ROI_HEADS.NUM_CLASSES", "1"]
    with pytest.raises(ValueError, match=rf"said is not .*{NUCLEUS}1 category \('cell'\)"):
        check("said", FASTER_RCNN, *one)
    # A custom loader may choose and rename categories.
    DatasetCatalog.register("chosen", list)
    MetadataCatalog.get("chosen").set(
        **{"thing_classes": ["cell"], "json_file": str(path), "image_root": folder}
    )
    check("chosen", FASTER_RCNN, *one)


def test_a_training_is_refused_before_it_begins(
    root: Path, fresh_logging: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for split in ("train", "val"):
        write(root / ANNOTATIONS / f"instances_{split}2017.json", OWN)
    options = [*TINY, "MODEL.DEVICE", "cpu", "OUTPUT_DIR", str(tmp_path / "out")]
    with pytest.raises(ValueError, match="coco_2017_train is not what it is registered as"):
        run(argument_parser().parse_args(["--config-file", MASK_RCNN, *options]))


def test_check_dataset_gives_the_same_message(root: Path, capsys: pytest.CaptureFixture) -> None:
    path = root / ANNOTATIONS / "instances_train2017.json"
    assert check_dataset.main(["coco_2017_train"]) == 0
    content = json.loads(path.read_text())
    content["categories"] = [c for c in content["categories"] if c["id"] in (1, 13, 90)]
    path.write_text(json.dumps(content))
    assert check_dataset.main(["coco_2017_train"]) == 1
    out = capsys.readouterr().out
    assert "annotation files of other data than the name says" in out
    assert "has 3 categories ('person', 'stop sign', 'toothbrush'), and the name stands" in out


# PASCAL VOC

CELLS = {
    "000001": [("RBC", 0, (1, 1, 40, 30)), ("WBC", 0, (50, 10, 80, 60))],
    "000002": [("Platelets", 0, (10, 20, 60, 59))],
}


@pytest.mark.parametrize("number", ["3", "20"])
@pytest.mark.parametrize("name", ["voc_2007_trainval", "voc_2007_trainval_no_difficult"])
def test_custom_data_under_the_name_of_voc(
    catalogs: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, number: str
) -> None:
    """Check that the message names the classes first, even if their number is set."""
    folder = write_tree(tmp_path / "VOC2007", CELLS, "trainval")
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    register_all_pascal_voc(str(tmp_path))
    register_voc()
    message = (
        f"Data set {name}: {folder}/Annotations/000001.xml: object 0 is of class 'RBC', which is "
        r"not among aeroplane, .* 1 more image has problems\. The folder has 3 other classes "
        r"\('Platelets', 'RBC', 'WBC'\): for a custom data set give --train-annotations "
    )
    with pytest.raises(ValueError, match=message):
        check(name, FASTER_RCNN, "MODEL.ROI_HEADS.NUM_CLASSES", number)


def test_a_misspelt_class_is_not_custom_data(catalogs: None, tmp_path: Path) -> None:
    objects = OBJECTS | {"000001": [("Dog", 0, (1, 1, 40, 30))]}
    write_tree(tmp_path / "VOC2007", objects, "trainval")
    register_all_pascal_voc(str(tmp_path))
    with pytest.raises(ValueError, match=r"class 'Dog' \(close to it: 'dog'\)") as error:
        check("voc_2007_trainval", FASTER_RCNN, "MODEL.ROI_HEADS.NUM_CLASSES", "20")
    assert "custom data set" not in str(error.value)


def test_a_folder_registered_with_its_own_classes(catalogs: None, tmp_path: Path) -> None:
    folder = str(write_tree(tmp_path / "VOC2007", CELLS, "trainval"))
    register_pascal_voc("cells", folder, "trainval", 2007, ["RBC", "WBC", "Platelets"])
    MetadataCatalog.get("cells").evaluator_type = "pascal_voc"
    check("cells", FASTER_RCNN, "MODEL.ROI_HEADS.NUM_CLASSES", "3")


# Cityscapes


def add_objects(*labels: str, **more: int) -> Callable[[Path], object]:
    def change(root: Path) -> None:
        shape = {"polygon": [[0, 0], [5, 0], [5, 5]], **more}
        objects = [{"label": label, **shape} for label in labels]
        path = root / "gtFine" / "train" / "aachen" / "aachen_000_gtFine_polygons.json"
        path.write_text(json.dumps({"imgHeight": 60, "imgWidth": 80, "objects": objects}))

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (add_objects("car", "persongroup", "sky"), ""),
        (add_objects("scratch", deleted=1), ""),
        (
            add_objects("car", "scratch"),
            "object of class 'scratch', which Cityscapes does not have",
        ),
        (
            lambda root: (root / "leftImg8bit/train/aachen/x.jpg").touch(),
            r"aachen/x.jpg is not a picture of Cityscapes, whose names end in leftImg8bit.png: for",
        ),
        (
            lambda root: (root / "leftImg8bit/train/aachen/b_leftImg8bit.png").touch(),
            "There is no annotation file .*b_gtFine_polygons.json for .*b_leftImg8bit.png",
        ),
        (
            lambda root: (root / "gtFine/train/aachen/aachen_000_gtFine_polygons.json").write_text(
                '{"shapes": []}'
            ),
            "aachen_000_gtFine_polygons.json is not an annotation file of Cityscapes",
        ),
        (lambda root: shutil.rmtree(root / "leftImg8bit/train/aachen"), "has no pictures in"),
    ],
)
def test_custom_data_under_the_name_of_cityscapes(
    catalogs: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Any, message: str
) -> None:
    labels = types.ModuleType("cityscapesscripts.helpers.labels")
    labels.name2label = dict.fromkeys(("car", "person", "sky"))
    package = types.ModuleType("cityscapesscripts")
    package.__spec__ = importlib.machinery.ModuleSpec("cityscapesscripts", None)
    monkeypatch.setitem(sys.modules, "cityscapesscripts", package)
    monkeypatch.setitem(sys.modules, labels.__name__, labels)
    root = tmp_path / "cityscapes"
    for part in ("leftImg8bit", "gtFine"):
        (root / part / "train" / "aachen").mkdir(parents=True)
    picture = root / "leftImg8bit" / "train" / "aachen" / "aachen_000_leftImg8bit.png"
    Image.new("RGB", (80, 60)).save(picture)
    add_objects("car")(root)
    register_all_cityscapes(str(tmp_path))
    change(root)
    eight = ["MODEL.ROI_HEADS.NUM_CLASSES", "8"]
    if not message:
        check("cityscapes_fine_instance_seg_train", MASK_RCNN, *eight)
        return
    with pytest.raises(ValueError, match=f"cityscapes_fine_instance_seg_train: .*{message}"):
        check("cityscapes_fine_instance_seg_train", MASK_RCNN, *eight)
