# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""PASCAL VOC: the loader, which marks difficult objects, and the evaluation by 11 points."""

import re
from collections.abc import Callable
from pathlib import Path

import check_dataset
import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.data.datasets import load_voc_instances
from detectron2.data.datasets.builtin import register_all_pascal_voc
from detectron2.data.datasets.pascal_voc import CLASS_NAMES
from detectron2.evaluation import PascalVOCDetectionEvaluator
from detectron2.structures import Boxes, BoxMode, Instances
from voc_tree import OBJECTS, Object, write_tree

from vovnet_d2.data.voc import check_voc, load_voc, register_voc
from vovnet_d2.engine import Trainer, detection, lazy, load_config
from vovnet_d2.engine.data_checks import check_data
from vovnet_d2.engine.evaluation import build_evaluator
from vovnet_d2.engine.rehearsal import rehearse_evaluation

pytest_plugins = ["engine_fixtures"]


def test_the_loader_agrees_with_detectron2_and_marks_difficult_objects(tmp_path: Path) -> None:
    root = str(write_tree(tmp_path, OBJECTS, "trainval"))
    records = load_voc(root, "trainval")
    peers = load_voc_instances(root, "trainval", CLASS_NAMES)
    marks = [[a.pop("iscrowd") for a in record["annotations"]] for record in records]
    assert records == peers
    assert marks == [[difficult for _, difficult, _ in found] for found in OBJECTS.values()]


def test_difficult_objects_are_not_trained_on(tmp_path: Path) -> None:
    records = load_voc(str(write_tree(tmp_path, OBJECTS, "trainval")), "trainval")
    mapper = DatasetMapper(True, augmentations=[], image_format="BGR")
    numbers = [len(mapper(record)["instances"]) for record in records]
    assert numbers == [1, 1, 0, 2]


def test_one_image_and_fractions(tmp_path: Path) -> None:
    objects = {"2011_000001": [("sofa", 0, (1.5, 2.25, 45.70000076293945, 50.0))]}
    (record,) = load_voc(str(write_tree(tmp_path, objects, "train")), "train")
    assert record["annotations"][0]["bbox"] == [0.5, 1.25, 45.70000076293945, 50.0]
    assert record["annotations"][0]["bbox_mode"] == BoxMode.XYXY_ABS


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("<name>dog</name>", "<name>dragon</name>", "'dragon', which is not among aeroplane"),
        ("<xmin>1</xmin>", "", "lacks 'bndbox/xmin'"),
    ],
)
def test_broken_annotation(tmp_path: Path, old: str, new: str, message: str) -> None:
    root = write_tree(tmp_path, OBJECTS, "train")
    path = root / "Annotations" / "000001.xml"
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(ValueError, match=message):
        load_voc(str(root), "train")


# Folders of users


@pytest.mark.parametrize(("text", "expected"), [("", 0), ("Unspecified", 0), ("1", 1), (" 0 ", 0)])
def test_ways_to_write_difficult(tmp_path: Path, text: str, expected: int) -> None:
    root = write_tree(tmp_path, OBJECTS, "train")
    path = root / "Annotations" / "000001.xml"
    path.write_text(path.read_text().replace(">0</difficult>", f">{text}</difficult>"))
    assert load_voc(str(root), "train")[0]["annotations"][0]["iscrowd"] == expected
    check_voc(str(root), "train", CLASS_NAMES, by_detectron2=True)


def edit(old: str, new: str) -> Callable[[Path], object]:
    def change(root: Path) -> None:
        path = root / "Annotations" / "000001.xml"
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new))

    return change


def list_as(text: str) -> Callable[[Path], object]:
    return lambda root: (root / "ImageSets" / "Main" / "train.txt").write_text(text)


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "class": (
        edit("dog", "Dog"),
        r"1\.xml: object 0 is of class 'Dog' \(close to it: 'dog'\)",
    ),
    "spaces": (edit("<name>dog", "<name> dog"), "'name' has spaces around it"),
    "no number": (edit(">40<", ">forty<"), r"000001\.xml: .* has 'forty' for 'bndbox/xmax'"),
    "nan": (edit(">40<", ">nan<"), "has 'nan' for 'bndbox/xmax'"),
    "empty number": (edit(">40<", "><"), "has '' for 'bndbox/xmax'"),
    "difficult": (edit(">0</difficult>", ">2</difficult>"), "has '2' for 'difficult'"),
    "no size": (edit("<size>", "<sizes>"), r"000001\.xml: mismatched tag"),
    "fraction": (edit("<width>80<", "<width>80.0<"), "'size' must be whole numbers"),
    "other size": (edit("<width>80<", "<width>81<"), "81 x 60, but the image is 80 x 60"),
    "order": (edit(">40<", ">0<"), r"object 0 has the box .* not above its minima"),
    "no box": (edit("bndbox", "polygon"), "lacks 'bndbox/xmin' in its 'object'"),
    "no file": (lambda r: (r / "Annotations/000003.xml").unlink(), r"no annotation file .*3\.xml"),
    "no image": (lambda r: (r / "JPEGImages/000003.jpg").unlink(), r"no image .*000003\.jpg\."),
    "suffix": (
        lambda r: (r / "JPEGImages/000003.jpg").rename(r / "JPEGImages/000003.JPG"),
        r"no image .*000003\.jpg, but 000003\.JPG: rename it",
    ),
    "no picture": (lambda r: (r / "JPEGImages/000003.jpg").write_text(""), "is not a picture"),
    "numbers in the list": (list_as("000001  1\n000002 -1\n"), "has the line '000001  1'"),
    "suffix in the list": (list_as("000001.jpg\n000002.jpg"), "leave out the suffix in the list"),
    "empty list": (list_as("\n"), r"train\.txt lists no image"),
    "byte order mark": (list_as("\ufeff000001\n000002\n"), r"train\.txt begins with a byte order"),
    "list of another code": (
        lambda r: (r / "ImageSets/Main/train.txt").write_bytes(b"\xe9"),
        r"train\.txt is not UTF-8: byte 0",
    ),
    "one image": (list_as("000001\n"), "lists one image, which Detectron2's loader cannot take"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_whole_folders_are_checked(tmp_path: Path, name: str) -> None:
    change, message = BROKEN[name]
    root = write_tree(tmp_path, OBJECTS, "train")
    check_voc(str(root), "train", CLASS_NAMES, by_detectron2=True)
    change(root)
    with pytest.raises(ValueError, match=message) as caught:
        check_voc(str(root), "train", CLASS_NAMES, by_detectron2=True)
    assert "\n" not in str(caught.value)


def test_a_run_checks_its_folders(
    register: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    register(OBJECTS)
    cfg = load_config("PascalVOC-Detection/refinedet320_V_39_120k.yaml")
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ("voc_2007_test",)
    check_data(cfg, training=True)
    rehearse_evaluation(cfg, Trainer)
    assert check_dataset.main(["voc_2007_test"]) == 0
    assert "voc_2007_test: 4 images\n  no problem was found" in capsys.readouterr().out
    folder = Path(MetadataCatalog.get("voc_2007_test").dirname)
    for path in sorted((folder / "Annotations").iterdir())[:2]:
        path.write_text(path.read_text().replace(">0</difficult>", ">?</difficult>"))
    sentence = r"voc_2007_test: .*000001\.xml: .* 1 more image has"
    with pytest.raises(ValueError, match=sentence):
        check_data(cfg, training=True)
    assert check_dataset.main(["voc_2007_test"]) == 1
    assert re.search(sentence, capsys.readouterr().out)


def test_a_file_that_the_loader_cannot_take_is_named(tmp_path: Path) -> None:
    for old, new in (("<size>", "<sizes>"), ("<name>dog</name>", ""), (">80</width>", "></width>")):
        root = write_tree(tmp_path, OBJECTS, "train")
        edit(old, new)(root)
        with pytest.raises(ValueError, match=r"Annotations/000001\.xml: "):
            load_voc(str(root), "train")


@pytest.fixture
def register(
    catalogs: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[dict[str, list[Object]]], None]:
    def register_tree(objects: dict[str, list[Object]]) -> None:
        monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
        for split in ("trainval", "test"):
            write_tree(tmp_path / "VOC2007", objects, split)
        register_all_pascal_voc(str(tmp_path))
        register_voc()
        register_voc()

    return register_tree


def test_registered(register: Callable[..., None]) -> None:
    register(OBJECTS)
    for name in load_config("PascalVOC-Detection/refinedet320_V_39_120k.yaml").DATASETS.TRAIN:
        metadata = MetadataCatalog.get(name)
        peer = MetadataCatalog.get(name.removesuffix("_no_difficult"))
        assert metadata.thing_classes == peer.thing_classes
        assert (metadata.dirname, metadata.split, metadata.year, metadata.evaluator_type) == (
            peer.dirname, peer.split, peer.year, peer.evaluator_type
        )  # fmt: skip
    assert len(DatasetCatalog.get("voc_2007_trainval_no_difficult")) == 4


def start_yaml_run(folder: Path) -> None:
    words = ["--config-file", "PascalVOC-Detection/refinedet320_V_39_120k.yaml", "--eval-only"]
    words += ["OUTPUT_DIR", str(folder), "MODEL.WEIGHTS", "x.pth", "DATASETS.TEST", "('none',)"]
    with pytest.raises(KeyError, match=r"'none' of DATASETS\.TEST is not registered"):
        detection.run(detection.argument_parser().parse_args(words))


def start_lazy_run(folder: Path) -> None:
    with pytest.raises(ValueError, match="There is no config"):
        lazy.run(lazy.lazy_argument_parser().parse_args([]))


def start_quantization(folder: Path) -> None:
    from vovnet_d2.engine.quantization import find_images  # this module imports ONNX

    with pytest.raises(KeyError, match="'none' to calibrate on is not registered"):
        find_images(load_config(), "none", 1, 0)


@pytest.mark.parametrize("start", [start_yaml_run, start_lazy_run, start_quantization])
def test_each_run_registers_the_data_sets_of_this_package(
    catalogs: None, fresh_logging: None, tmp_path: Path, start: Callable[[Path], None]
) -> None:
    start(tmp_path)
    names = set(DatasetCatalog.list())
    assert {"digits_val", "voc_2007_test_no_difficult", "voc_2012_val_no_difficult"} <= names
    assert "voc_2012_test_no_difficult" not in names  # this set has no boxes


# Evaluation ---------------------------------------------------------------------------------------


def slow_eleven_point_ap(objects: dict[str, list[Object]], found, label: str) -> float:
    """Return the AP of detections ``(image, score, box)`` of a class by the rules of the devkit."""

    def iou(a, b) -> float:
        w = min(a[2], b[2]) - max(a[0], b[0]) + 1
        h = min(a[3], b[3]) - max(a[1], b[1]) + 1
        area = [(x[2] - x[0] + 1) * (x[3] - x[1] + 1) for x in (a, b)]
        return w * h / (sum(area) - w * h) if w > 0 and h > 0 else 0.0

    total = sum(o[0] == label and not o[1] for each in objects.values() for o in each)
    taken, hits, points = set(), [], []
    for image, _, box in sorted(found, key=lambda d: -d[1]):
        own = [(iou(box, o[2]), i) for i, o in enumerate(objects[image]) if o[0] == label]
        overlap, index = max(own, default=(0.0, -1))
        if overlap > 0.5 and objects[image][index][1]:
            continue  # ignored
        hits.append(overlap > 0.5 and (image, index) not in taken)
        taken.add((image, index))
        points.append((sum(hits) / total, sum(hits) / len(hits)))
    return sum(max((p for r, p in points if r >= t), default=0.0) for t in np.arange(11) / 10) / 11


@pytest.mark.parametrize("fraction", [0.0, 0.3], ids=["whole", "fractions"])
def test_eleven_point_evaluation(register: Callable[..., None], fraction: float) -> None:
    objects = {
        name: [(n, d, tuple(v + fraction for v in box)) for n, d, box in found]
        if fraction
        else found
        for name, found in OBJECTS.items()
    }
    register(objects)
    found = [
        ("000001", 0.9, (2.0, 2.0, 39.0, 29.0)),  # right
        ("000001", 0.8, (1.0, 1.0, 38.0, 30.0)),  # the same dog again
        ("000002", 0.7, (62.0, 20.0, 70.0, 40.0)),  # difficult
        ("000003", 0.6, (10.0, 10.0, 30.0, 30.0)),  # no object there
        ("000004", 0.5, (52.0, 5.0, 79.0, 48.0)),  # right
    ]
    cfg = load_config("PascalVOC-Detection/refinedet320_V_39_120k.yaml")
    evaluator = build_evaluator(cfg, "voc_2007_test")
    evaluator.reset()
    for image, score, box in found:
        left, top, right, bottom = box
        instances = Instances((60, 80))
        instances.pred_boxes = Boxes(torch.tensor([[left - 1, top - 1, right, bottom]]))
        instances.scores = torch.tensor([score])
        instances.pred_classes = torch.tensor([CLASS_NAMES.index("dog")])
        evaluator.process([{"image_id": image}], [{"instances": instances}])
    result = evaluator.evaluate()["bbox"]["AP50"]
    expected = slow_eleven_point_ap(objects, found, "dog")
    assert 0.3 < expected < 1
    # The other class with objects is "cat", and no cat is found.
    assert result == pytest.approx(100 * expected / 2)


def evaluate_perfection(name: str, objects: dict[str, list[Object]]) -> dict[str, float]:
    """Evaluate perfect detections of all objects, and a bird in each image."""
    cfg = load_config("PascalVOC-Detection/refinedet320_V_39_120k.yaml")
    evaluator = build_evaluator(cfg, name)
    evaluator.reset()
    for image, annotated in objects.items():
        found = [*annotated, ("bird", 0, (1, 1, 20, 20))]
        instances = Instances((60, 80))
        boxes = [(box[0] - 1, box[1] - 1, *box[2:]) for _, _, box in found]
        instances.pred_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32))
        instances.scores = torch.linspace(0.9, 0.5, len(found))
        instances.pred_classes = torch.tensor([CLASS_NAMES.index(label) for label, *_ in found])
        evaluator.process([{"image_id": image}], [{"instances": instances}])
    return evaluator.evaluate()["bbox"]


def test_classes_without_objects_are_not_in_the_mean(
    register: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    register(OBJECTS)
    found = evaluate_perfection("voc_2007_test", OBJECTS)
    assert found == pytest.approx({"AP": 100, "AP50": 100, "AP75": 100})
    others = [
        label for label in CLASS_NAMES if label not in ("cat", "dog")
    ]  # "person" is difficult
    assert (
        "voc_2007_test has no object that counts (difficult ones do not) of 18 of the 20 classes: "
        f"they are left out of the mean. They are {', '.join(map(repr, others))}." in caplog.text
    )


def test_a_test_set_of_difficult_objects_has_no_mean(register: Callable[..., None]) -> None:
    objects = {"000001": [("dog", 1, (1, 1, 40, 30))], "000002": []}
    register(objects)
    assert np.isnan(list(evaluate_perfection("voc_2007_test", objects).values())).all()


def test_the_evaluation_of_detectron2_fails_on_fractions(register: Callable[..., None]) -> None:
    """Check the reason for our own evaluation, which can be removed when this test fails."""
    register({"000001": [("dog", 0, (1.5, 1, 40, 30))]})
    path = Path(MetadataCatalog.get("voc_2007_test").dirname) / "Annotations" / "000001.xml"
    extra = "<pose>Left</pose><truncated>0</truncated><difficult>"
    path.write_text(path.read_text().replace("<difficult>", extra))
    evaluator = PascalVOCDetectionEvaluator("voc_2007_test")
    evaluator.reset()
    with pytest.raises(ValueError, match=r"invalid literal for int.*1\.5"):
        evaluator.evaluate()
