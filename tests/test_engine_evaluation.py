# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""The evaluator of each kind of data set gives 100 % if predictions equal the annotations."""

import copy
import importlib.machinery
import importlib.util
import json
import sys
import types
from pathlib import Path

import numpy as np
import pycocotools.coco
import pycocotools.cocoeval
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import (
    register_coco_instances,
    register_coco_panoptic_separated,
    register_pascal_voc,
)
from detectron2.evaluation import (
    CityscapesInstanceEvaluator,
    CityscapesSemSegEvaluator,
    COCOPanopticEvaluator,
    DatasetEvaluator,
    DatasetEvaluators,
    LVISEvaluator,
    coco_evaluation,
)
from detectron2.structures import Boxes, BoxMode, Instances, polygons_to_bitmask
from PIL import Image

from vovnet_d2.data.cityscapes import provide_cityscapes_scripts
from vovnet_d2.engine import Trainer, build_evaluator, load_config, rehearsal
from vovnet_d2.engine.evaluation import _BUILDERS, check_evaluators, main_metric
from vovnet_d2.engine.old_numpy import old_numpy
from vovnet_d2.engine.rehearsal import rehearse_evaluation

pytest_plugins = ["engine_fixtures"]


def config(tmp_path: Path, *names: str, **model: bool | str) -> CfgNode:
    cfg = load_config("", ["OUTPUT_DIR", str(tmp_path / "out"), "DATASETS.TEST", str(names)])
    cfg.MODEL.merge_from_list([word for item in model.items() for word in item])
    return cfg


def perfect_instances(record: dict) -> Instances:
    annotations = [a for a in record["annotations"] if not a.get("iscrowd")]
    boxes = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in annotations]
    size = (record["height"], record["width"])
    instances = Instances(size)
    instances.pred_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    instances.pred_classes = torch.tensor([a["category_id"] for a in annotations], dtype=torch.long)
    instances.scores = torch.ones(len(annotations))
    if all("segmentation" in a for a in annotations):
        masks = [polygons_to_bitmask(a["segmentation"], *size) for a in annotations]
        instances.pred_masks = torch.as_tensor(np.array(masks).reshape(-1, *size))
    return instances


def perfect_semantics(record: dict, num_classes: int) -> torch.Tensor:
    labels = torch.as_tensor(np.array(Image.open(record["sem_seg_file_name"]), dtype=np.int64))
    return torch.nn.functional.one_hot(labels, num_classes).permute(2, 0, 1).float()


def evaluate_perfection(cfg: CfgNode, name: str) -> dict:
    evaluator = build_evaluator(cfg, name)
    evaluator.reset()
    for record in DatasetCatalog.get(name):
        output = {}
        if "annotations" in record:
            output["instances"] = perfect_instances(record)
        if "sem_seg_file_name" in record:
            count = len(MetadataCatalog.get(name).stuff_classes)
            output["sem_seg"] = perfect_semantics(record, count)
        evaluator.process([record], [output])
    return evaluator.evaluate()


def test_coco(coco: Path, tmp_path: Path) -> None:
    results = evaluate_perfection(config(tmp_path, "coco_2017_val"), "coco_2017_val")
    assert results["bbox"]["AP"] == pytest.approx(100)
    assert results["segm"]["AP"] == pytest.approx(100)
    assert (tmp_path / "out" / "inference" / "coco_instances_results.json").is_file()


def test_several_data_sets_have_a_folder_each(coco: Path, tmp_path: Path) -> None:
    cfg = config(tmp_path, "coco_2017_val", "coco_2017_train")
    for name in cfg.DATASETS.TEST:
        evaluate_perfection(cfg, name)
        assert (tmp_path / "out" / "inference" / name / "coco_instances_results.json").is_file()


def noisy_instances(record: dict) -> Instances:
    """Return predictions with displaced boxes and some wrong classes, twice as many as objects."""
    instances = perfect_instances(record)
    count = len(instances)
    boxes = instances.pred_boxes.tensor + torch.randn(count, 4) * 2
    noisy = Instances(instances.image_size)
    noisy.pred_boxes = Boxes(torch.cat([boxes, boxes.roll(1, 0)]))
    noisy.pred_classes = torch.cat([instances.pred_classes, instances.pred_classes.flip(0)])
    noisy.scores = torch.rand(2 * count).round(decimals=1)  # some scores are equal
    masks = instances.pred_masks if instances.has("pred_masks") else torch.zeros(count, 1, 1)
    if instances.has("pred_masks"):
        noisy.pred_masks = torch.cat([masks.roll(1, 2), masks.roll(3, 1)])
    if "keypoints" in record["annotations"][0]:
        truth = torch.tensor([a["keypoints"] for a in record["annotations"]]).reshape(count, 17, 3)
        noise = torch.randn(2, count, 17, 3) * torch.tensor([1.0, 1.0, 0.0])
        noisy.pred_keypoints = (truth + noise).flatten(0, 1)
    return noisy


def evaluate_noise(cfg: CfgNode, name: str) -> dict:
    evaluator = build_evaluator(cfg, name)
    evaluator.reset()
    for record in DatasetCatalog.get(name):
        if record["annotations"]:
            output = {"instances": noisy_instances(record)}
            evaluator.process([copy.deepcopy(record)], [output])
    return evaluator.evaluate()


@pytest.fixture
def people(catalogs: None, tmp_path: Path) -> str:
    """Register keypoints of three people in each of four images, and a class without objects."""
    rng = np.random.default_rng(0)
    annotations = []
    for index in range(12):
        x, y = rng.uniform(0, 60, 2)
        keypoints = np.stack([*rng.uniform(0, 40, (2, 17)), np.full(17, 2.0)], axis=1)
        keypoints[:, :2] += (x, y)
        box = {"bbox": [x, y, 40, 40], "area": 1600.0, "iscrowd": 0, "num_keypoints": 17}
        ids = {"id": index + 1, "image_id": index // 3 + 1, "category_id": 1}
        annotations.append(ids | box | {"keypoints": keypoints.ravel().tolist()})
    images = [{"id": i, "file_name": f"{i}.jpg", "height": 100, "width": 100} for i in range(1, 5)]
    categories = [{"id": 1, "name": "person"}, {"id": 2, "name": "ghost"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (tmp_path / "people.json").write_text(json.dumps(content))
    register_coco_instances("people", {}, str(tmp_path / "people.json"), str(tmp_path))
    MetadataCatalog.get("people").evaluator_type = "coco"
    return "people"


@pytest.mark.parametrize("name", ["coco_2017_val", "coco_2017_train", "people"])
def test_faster_coco_eval_gives_the_results_of_pycocotools(
    coco: Path, people: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    caplog.set_level("INFO")
    results = {}
    for api in ("pycocotools", "faster-coco-eval", "auto"):
        torch.manual_seed(0)
        cfg = config(tmp_path / api, name)
        cfg.TEST.COCO_API = api
        caplog.clear()
        results[api] = evaluate_noise(cfg, name)
        used = "pycocotools" if api == "pycocotools" else "faster-coco-eval"
        assert f"{name} is evaluated by {used}, with 100 detections per image." in caplog.text
    expected = results.pop("pycocotools")
    tasks = {"bbox", "keypoints"} if name == "people" else {"bbox", "segm"}
    assert expected.keys() == tasks
    assert 0 < expected["bbox"]["AP"] < 100
    assert sum(metric.startswith("AP-") for metric in expected["bbox"]) in (2, 80)
    for found in results.values():
        assert found.keys() == expected.keys()
        for task in tasks:
            assert found[task] == pytest.approx(expected[task], abs=1e-6, nan_ok=True)


@pytest.mark.parametrize("api", ["pycocotools", "faster-coco-eval"])
def test_sigmas_of_keypoints(people: str, tmp_path: Path, api: str) -> None:
    """Check that an error of two pixels is small for wide sigmas, and large for narrow sigmas."""
    found = []
    for sigma in (0.001, 1.0):
        torch.manual_seed(0)
        cfg = config(tmp_path / str(sigma), people)
        cfg.TEST.COCO_API = api
        cfg.TEST.KEYPOINT_OKS_SIGMAS = [sigma] * 17
        found.append(evaluate_noise(cfg, people)["keypoints"]["AP"])
    assert found[0] < 1
    assert found[1] > 50


def test_detectron2_keeps_pycocotools(coco: Path, tmp_path: Path) -> None:
    before = coco_evaluation.COCO, coco_evaluation.COCOeval_opt
    evaluate_noise(config(tmp_path, "coco_2017_val"), "coco_2017_val")
    assert (coco_evaluation.COCO, coco_evaluation.COCOeval_opt) == before
    assert coco_evaluation.COCO is pycocotools.coco.COCO
    assert issubclass(coco_evaluation.COCOeval_opt, pycocotools.cocoeval.COCOeval)


def test_coco_api_without_faster_coco_eval(
    coco: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    cfg = config(tmp_path, "coco_2017_val")
    evaluate_noise(cfg, "coco_2017_val")
    assert (
        "coco_2017_val is evaluated by pycocotools, with 100 detections per image." in caplog.text
    )
    cfg.TEST.COCO_API = "faster-coco-eval"
    with pytest.raises(ValueError, match=r"needs that package: pip install faster-coco-eval"):
        check_evaluators(cfg)
    cfg.TEST.COCO_API = "fast"
    with pytest.raises(
        ValueError, match=r"TEST.COCO_API is 'fast': choose from 'auto', 'pycocotools'"
    ):
        check_evaluators(cfg)


def test_voc(catalogs: None, tmp_path: Path) -> None:
    root = tmp_path / "VOC2007"
    for folder in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (root / folder).mkdir(parents=True)
    (root / "ImageSets" / "Main" / "test.txt").write_text("000001\n000002\n")
    box = "<xmin>11</xmin><ymin>21</ymin><xmax>40</xmax><ymax>50</ymax>"
    size = "<size><width>80</width><height>60</height></size>"
    cat = (
        "<object><name>cat</name><pose>x</pose><truncated>0</truncated><difficult>0</difficult>"
        f"<bndbox>{box}</bndbox></object>"
    )
    for name, objects in (("000001", cat), ("000002", "")):
        Image.new("RGB", (80, 60)).save(root / "JPEGImages" / f"{name}.jpg")
        xml = f"<annotation>{size}{objects}</annotation>"
        (root / "Annotations" / f"{name}.xml").write_text(xml)
    register_pascal_voc("voc", str(root), "test", 2007, class_names=("cat",))
    MetadataCatalog.get("voc").evaluator_type = "pascal_voc"
    results = evaluate_perfection(config(tmp_path, "voc"), "voc")
    assert results["bbox"] == pytest.approx({"AP": 100, "AP50": 100, "AP75": 100})


def write_semantics(folder: Path, names: list[str]) -> None:
    folder.mkdir(parents=True)
    for name in names:
        labels = np.random.default_rng(0).integers(0, 3, (64, 80)).astype(np.uint8)
        Image.fromarray(labels).save(folder / f"{Path(name).stem}.png")


def test_semantic_segmentation(catalogs: None, tmp_path: Path) -> None:
    write_semantics(tmp_path / "labels", ["a.jpg"])
    record = {"file_name": "a.jpg", "sem_seg_file_name": str(tmp_path / "labels" / "a.png")}
    DatasetCatalog.register("semantic", lambda: [record])
    MetadataCatalog.get("semantic").set(
        stuff_classes=["sky", "sea", "sand"], evaluator_type="sem_seg", ignore_label=255
    )
    results = evaluate_perfection(config(tmp_path, "semantic"), "semantic")
    assert results["sem_seg"]["mIoU"] == pytest.approx(100)


@pytest.fixture
def panoptic(coco: Path, tmp_path: Path) -> str:
    folder = coco / "coco"
    instances = folder / "annotations" / "instances_val2017.json"
    images = json.loads(instances.read_text())["images"]
    write_semantics(tmp_path / "stuff", [image["file_name"] for image in images])
    (tmp_path / "panoptic.json").write_text(json.dumps({"annotations": []}))
    stuff = {"stuff_classes": ["things", "sky", "sea"], "stuff_colors": [[0, 0, 0]] * 3}
    stuff["stuff_dataset_id_to_contiguous_id"] = {0: 0, 92: 1, 93: 2}
    register_coco_panoptic_separated(
        "pan",
        stuff,
        str(folder / "val2017"),
        str(tmp_path),
        str(tmp_path / "panoptic.json"),
        str(tmp_path / "stuff"),
        str(instances),
    )
    return "pan_separated"


def test_panoptic_without_panopticapi(
    panoptic: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cfg = config(tmp_path, panoptic)
    results = evaluate_perfection(cfg, panoptic)
    assert set(results) == {"bbox", "segm", "sem_seg"}
    assert results["segm"]["AP"] == pytest.approx(100)
    assert results["sem_seg"]["mIoU"] == pytest.approx(100)
    assert "No panoptic quality (PQ) for pan_separated without panopticapi" in caplog.text
    assert "cocodataset/panopticapi" in caplog.text


def install(monkeypatch: pytest.MonkeyPatch, name: str, **contents: object) -> None:
    """Install an empty package in place of an optional one."""
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    vars(module).update(contents)
    monkeypatch.setitem(sys.modules, name, module)


def test_panoptic_with_panopticapi(
    panoptic: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, "panopticapi")
    cfg = config(tmp_path, panoptic)
    evaluator = build_evaluator(cfg, panoptic)
    assert isinstance(evaluator, DatasetEvaluators)
    assert isinstance(evaluator._evaluators[-1], COCOPanopticEvaluator)
    assert main_metric(cfg) == "panoptic_seg/PQ"


def evaluate_with_numpy(
    monkeypatch: pytest.MonkeyPatch, evaluator: DatasetEvaluator, base: type
) -> object:
    """Return ``np.float`` as Detectron2's evaluator sees it."""
    monkeypatch.setattr(base, "evaluate", lambda self: vars(np).get("float"))
    return evaluator.evaluate()


class StubLVIS:
    def __init__(self, path: str):
        pass

    def get_ann_ids(self) -> list[int]:
        return [1]


def test_lvis(catalogs: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "lvis", LVIS=StubLVIS)
    MetadataCatalog.get("mine").set(evaluator_type="lvis", json_file="x.json")
    evaluator = build_evaluator(config(tmp_path, "mine"), "mine")
    assert isinstance(evaluator, LVISEvaluator)
    assert evaluate_with_numpy(monkeypatch, evaluator, LVISEvaluator) is float


def test_old_packages_find_removed_names_of_numpy() -> None:
    assert not hasattr(np, "float")
    with old_numpy():
        assert vars(np)["float"] is float
        in1d = vars(np)["in1d"]
        assert in1d(np.array([[1, 2], [3, 1]]), [1]).tolist() == [True, False, False, True]
        assert in1d(np.array([1, 2]), [1], invert=True).tolist() == [False, True]
        assert json.dumps(np.count_nonzero(np.eye(2))) == "2"
        assert np.count_nonzero(np.eye(2), axis=0).tolist() == [1, 1]
    assert not hasattr(np, "float")


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("cityscapes_instance", CityscapesInstanceEvaluator),
        ("cityscapes_sem_seg", CityscapesSemSegEvaluator),
    ],
)
def test_cityscapes(
    catalogs: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, expected: type
) -> None:
    install(monkeypatch, "cityscapesscripts")
    MetadataCatalog.get("city").set(evaluator_type=kind, gt_dir=str(tmp_path))
    evaluator = build_evaluator(config(tmp_path, "city"), "city")
    assert isinstance(evaluator, expected)
    assert evaluate_with_numpy(monkeypatch, evaluator, expected) is float


def test_cityscapes_scripts_are_found_under_their_newer_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "cityscapesscripts" / "helpers"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").touch()
    (package / "__init__.py").touch()
    (package / "labels.py").write_text("labels = ['road']")
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    monkeypatch.syspath_prepend(str(tmp_path))
    name = "deeplearning.projects.cityscapesApi.cityscapesscripts.helpers.labels"
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module(name)
    provide_cityscapes_scripts()
    assert importlib.import_module(name).labels == ["road"]


@pytest.mark.parametrize("kind", [k for k, (package, _) in _BUILDERS.items() if package])
def test_a_missing_package_is_named_with_its_command(
    catalogs: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    package = _BUILDERS[kind][0]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    MetadataCatalog.get("mine").set(evaluator_type=kind)
    with pytest.raises(ValueError, match=rf"mine needs {package}: pip install {package}"):
        check_evaluators(config(tmp_path, "mine"))


@pytest.mark.parametrize("metadata", [{"evaluator_type": "kitti"}, {}])
def test_an_unknown_kind_is_refused(catalogs: None, tmp_path: Path, metadata: dict) -> None:
    MetadataCatalog.get("mine").set(**metadata)
    with pytest.raises(ValueError, match=r"evaluator_type '(kitti)?' .*coco, .*cityscapes_sem_seg"):
        check_evaluators(config(tmp_path, "mine"))


@pytest.mark.parametrize(
    ("kind", "model", "metric"),
    [
        ("coco", {}, "bbox/AP"),
        ("coco", {"MASK_ON": True}, "segm/AP"),
        ("coco", {"KEYPOINT_ON": True}, "keypoints/AP"),
        ("lvis", {"MASK_ON": True}, "segm/AP"),
        ("pascal_voc", {}, "bbox/AP50"),
        ("sem_seg", {}, "sem_seg/mIoU"),
        ("cityscapes_sem_seg", {}, "sem_seg/IoU"),
        ("cityscapes_instance", {"MASK_ON": True}, "segm/AP"),
        ("coco_panoptic_seg", {"MASK_ON": True}, "segm/AP"),
        ("coco", {"META_ARCHITECTURE": "ProposalNetwork"}, "box_proposals/AR@1000"),
    ],
)
def test_main_metric(
    catalogs: None, tmp_path: Path, kind: str, model: dict[str, bool | str], metric: str
) -> None:
    MetadataCatalog.get("mine").set(evaluator_type=kind)
    assert main_metric(config(tmp_path, "mine", **model)) == metric
    assert main_metric(config(tmp_path, "mine", "other", **model)) == f"mine/{metric}"
    assert main_metric(config(tmp_path, **model)) is None


# Kinds of ids, and files of earlier conversions


def write_ids(folder: Path, kind: str) -> str:
    """Write and register three images with one object each. ``kind`` is the kind of their ids."""
    ids = {
        "text": ["a", "b", "c"],
        "digits": ["1", "02", "3"],
        "negative": [-1, 0, 7],
        "large": [2**53 + 1, 2**53 + 3, 2**60],
        "53 bits": [1, 2, 2**53 - 1],
        "54 bits": [1, 2, 2**53],
        "fractions": [0.5, 1.5, 2.5],
    }[kind]
    images, annotations = [], []
    for number, image_id in enumerate(ids):
        name = f"{number}.png"
        Image.new("RGB", (80, 64)).save(folder / name)
        images.append({"id": image_id, "file_name": name, "height": 64, "width": 80})
        annotations.append(
            {"id": number + 1, "image_id": image_id, "category_id": 1, "iscrowd": 0}
            | {"bbox": [10 + number, 10, 30, 20], "area": 600}
        )
    content = {"images": images, "annotations": annotations}
    content["categories"] = [{"id": 1, "name": "box"}]
    (folder / "ids.json").write_text(json.dumps(content))
    register_coco_instances("ids", {}, str(folder / "ids.json"), str(folder))
    MetadataCatalog.get("ids").evaluator_type = "coco"
    DatasetCatalog.get("ids")
    return "ids"


@pytest.mark.parametrize(
    "kind", ["text", "digits", "negative", "large", "53 bits", "54 bits", "fractions"]
)
def test_auto_evaluates_ids_of_every_kind(catalogs: None, tmp_path: Path, kind: str) -> None:
    name = write_ids(tmp_path, kind)
    cfg = config(tmp_path, name)
    assert evaluate_perfection(cfg, name)["bbox"]["AP"] == pytest.approx(100)
    rehearse_evaluation(cfg, Trainer)
    cfg.TEST.COCO_API = "faster-coco-eval"
    if kind in ("text", "54 bits"):
        with pytest.raises(ValueError, match=r"takes? .*: set TEST.COCO_API pycocotools"):
            build_evaluator(cfg, name)
    elif kind == "53 bits":
        assert evaluate_perfection(cfg, name)["bbox"]["AP"] == pytest.approx(100)


def test_pycocotools_takes_over_if_faster_coco_eval_fails(
    coco: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    found = []
    for fails in (False, True):
        if fails:
            path = "vovnet_d2.engine.faster_coco.FasterCOCOeval.evaluate"
            monkeypatch.setattr(path, lambda self: 1 / 0)
        torch.manual_seed(0)
        found.append(evaluate_noise(config(tmp_path, "coco_2017_val"), "coco_2017_val"))
    assert "faster-coco-eval fails (ZeroDivisionError: division by zero)" in caplog.text
    for task in ("bbox", "segm"):
        assert found[1][task] == pytest.approx(found[0][task], abs=1e-6, nan_ok=True)


def test_changed_annotations_are_converted_again(catalogs: None, tmp_path: Path) -> None:
    """Evaluate twice in one folder, with other data under the same name."""
    box = {"bbox": [10, 10, 30, 20], "bbox_mode": 1, "category_id": 0, "iscrowd": 0}
    for left in (10, 40):
        for catalog in (DatasetCatalog, MetadataCatalog):
            catalog.data.clear()
        annotation = box | {"bbox": [left, 10, 30, 20]}
        Image.new("RGB", (80, 64)).save(tmp_path / "a.png")
        record = {"file_name": f"{tmp_path}/a.png", "image_id": 1, "width": 80, "height": 64}
        records = [record | {"annotations": [annotation]}]
        DatasetCatalog.register("mine", lambda records=records: copy.deepcopy(records))
        MetadataCatalog.get("mine").set(thing_classes=["box"], evaluator_type="coco")
        cfg = config(tmp_path, "mine")
        rehearse_evaluation(cfg, Trainer)
        for _ in range(2):  # also twice in one run
            assert evaluate_perfection(cfg, "mine")["bbox"]["AP"] == pytest.approx(100)
    files = sorted(
        path.name for path in (tmp_path / "out" / "inference").glob("*_coco_format.json")
    )
    assert files == ["mine_coco_format.json"]


def test_annotations_that_change_within_a_run_are_converted_again(
    catalogs: None, tmp_path: Path
) -> None:
    """Keep the metadata, which name the file of the earlier conversion."""
    Image.new("RGB", (80, 64)).save(tmp_path / "a.png")
    record = {"file_name": f"{tmp_path}/a.png", "image_id": 1, "width": 80, "height": 64}
    for left in (10, 40):
        box = {"bbox": [left, 10, 30, 20], "bbox_mode": 1, "category_id": 0, "iscrowd": 0}
        records = [record | {"annotations": [box]}]
        DatasetCatalog.data.pop("mine", None)
        DatasetCatalog.register("mine", lambda records=records: copy.deepcopy(records))
        MetadataCatalog.get("mine").set(thing_classes=["box"], evaluator_type="coco")
        found = evaluate_perfection(config(tmp_path, "mine"), "mine")
        assert found["bbox"]["AP"] == pytest.approx(100)


# The rehearsal


def test_the_rehearsal_finds_errors_of_the_evaluation(coco: Path, tmp_path: Path) -> None:
    content = json.loads((coco / "coco/annotations/instances_val2017.json").read_text())
    for annotation in content["annotations"]:
        del annotation["area"]
    (tmp_path / "a.json").write_text(json.dumps(content))
    register_coco_instances("no_area", {}, str(tmp_path / "a.json"), str(coco / "coco/val2017"))
    MetadataCatalog.get("no_area").evaluator_type = "coco"
    cfg = config(tmp_path, "no_area")
    cfg.TEST.COCO_API = "pycocotools"  # faster-coco-eval would compute the areas
    with pytest.raises(
        ValueError, match=r"no_area cannot be evaluated: with perfect .*KeyError: area"
    ):
        rehearse_evaluation(cfg, Trainer)
    assert not (tmp_path / "out" / "inference").exists()


def test_a_lost_connection_is_no_fault_of_the_data(
    coco: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("gloo/transport/tcp/pair.cc: Connection closed by peer")

    monkeypatch.setattr(rehearsal, "_run", fail)
    with pytest.raises(RuntimeError, match="gloo"):
        rehearse_evaluation(config(tmp_path, "coco_2017_val"), Trainer)


def test_perfect_predictions_without_a_perfect_score_are_a_warning(
    catalogs: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    name = write_ids(tmp_path, "negative")
    rehearse_evaluation(config(tmp_path, name), Trainer)
    assert "Perfect predictions" not in caplog.text
    path = tmp_path / "ids.json"
    content = json.loads(path.read_text())
    content["annotations"][0]["id"] = 0
    path.write_text(json.dumps(content))
    rehearse_evaluation(config(tmp_path, name), Trainer)
    assert "Perfect predictions for 3 images of ids score bbox AP" in caplog.text
