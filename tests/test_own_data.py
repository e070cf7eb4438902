# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Custom annotation files, from the command line to predictions without these files."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from detectron2.structures import Boxes, BoxMode, Instances
from engine_runs import MASK_RCNN, RETINANET, TINY, data_flags, quick, read_log
from format_writers import WRITERS
from pycocotools.coco import COCO

from vovnet_d2 import Predictor
from vovnet_d2.data import build_digits
from vovnet_d2.data.formats import FORMATS, Notes
from vovnet_d2.data.own import OwnDataSet, register_own_data
from vovnet_d2.data.own_files import read_contents
from vovnet_d2.demo import main as demo
from vovnet_d2.engine import argument_parser, load_config, main_process, own_data, run
from vovnet_d2.engine.data_checks import check_data, check_data_sets
from vovnet_d2.engine.evaluation import build_evaluator
from vovnet_d2.engine.registered_data import register_data
from vovnet_d2.errors import UserValueError
from vovnet_d2.report import write_page
from vovnet_d2.words import counted

pytest_plugins = ["engine_fixtures"]

FASTER_RCNN = "COCO-Detection/faster_rcnn_V_19_slim_eSE_FPN_3x.yaml"
# Category ids of the digits. There is no 7, and the validation file does not list it.
IDS = {"0": 5, "1": 4, "2": 30, "3": 12, "4": 8, "5": 60, "6": 41, "7": 22, "8": 9, "9": 3}
MISSING = "7"
NAMES = sorted(IDS, key=IDS.__getitem__)


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the digits as custom annotation files.

    Ids are shuffled and have gaps. One category does not occur, one image has no annotations, and
    one image has only a crowd.
    """
    root = tmp_path_factory.mktemp("own")
    build_digits(root, num_train=14, num_val=8, image_size=96, digit_size=(16, 48))
    for split in ("train", "val"):
        source = root / "vovnet_d2_digits" / "annotations" / f"instances_{split}.json"
        content = json.loads(source.read_text())
        name = {category["id"]: category["name"] for category in content["categories"]}
        first, second = (image["id"] for image in content["images"][:2])
        kept = []
        for annotation in content["annotations"]:
            label = name[annotation["category_id"]]
            if label == MISSING or annotation["image_id"] == first:
                continue
            if annotation["image_id"] == second:
                annotation["iscrowd"] = 1
                mask = COCO(source).annToRLE(annotation)
                counts = mask["counts"].decode()
                annotation["segmentation"] = {"size": mask["size"], "counts": counts}
            kept.append(annotation | {"category_id": IDS[label]})
        content["annotations"] = kept
        content["categories"] = [
            {"id": number, "name": label}
            for label, number in IDS.items()
            if split == "train" or label != MISSING
        ]
        (root / f"{split}.json").write_text(json.dumps(content))
    return root


def flags(root: Path, *splits: str) -> list[str]:
    return data_flags(root, "vovnet_d2_digits/{split}", *splits)


BOTH = ("train", "val")


def setup(config: str, words: list[str], *options: str, training: bool = True) -> Any:
    """Return the config of a run with these arguments."""
    args = argument_parser().parse_args(["--config-file", config, *words, *options])
    cfg = load_config(config, args.opts)
    register_data(cfg, args, training=training)
    return cfg


# From training to prediction


def launch(config: str, *words: str) -> dict[str, Any]:
    with quick():
        return run(argument_parser().parse_args(["--config-file", config, *words]))


def test_train_then_evaluate_and_predict_without_the_flags(
    catalogs: None,
    fresh_logging: None,
    digits: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(digits)  # the paths are relative
    words = [word.replace(f"{digits}/", "") for word in flags(digits, *BOTH)]
    out = tmp_path / "output"
    options = [*TINY, "MODEL.DEVICE", "cpu", "INPUT.MIN_SIZE_TRAIN", "(96,)"]
    trained = launch(MASK_RCNN, *words, *options, "OUTPUT_DIR", str(out))
    log = read_log(out)
    assert "train.json: 10 categories, 14 images, " in log
    assert "The training leaves out 2 images without objects or with crowds only" in log
    assert "set on the command line: 0.5 epochs" in log

    found = json.loads((out / "inference" / "coco_instances_results.json").read_text())
    assert {result["category_id"] for result in found} <= set(IDS.values())
    assert f"AP-{MISSING}" in trained["segm"]
    assert np.isnan(trained["segm"][f"AP-{MISSING}"])

    monkeypatch.chdir(tmp_path)
    for catalog in (DatasetCatalog, MetadataCatalog):
        catalog.data.clear()
    config, weights = str(out / "config.yaml"), str(out / "model_final.pth")
    evaluated = launch(config, "--eval-only", "MODEL.WEIGHTS", weights)
    assert str(evaluated) == str(trained)

    for catalog in (DatasetCatalog, MetadataCatalog):
        catalog.data.clear()
    assert f"AP-{MISSING}" not in write_page(out).read_text()
    assert "own_val" in write_page(out).read_text()

    # The following runs on a machine that only has the config and the weights.
    for catalog in (DatasetCatalog, MetadataCatalog):
        catalog.data.clear()
    moved = tmp_path / "elsewhere.yaml"
    moved.write_text((out / "config.yaml").read_text().replace(str(digits), "/nowhere"))
    predictor = Predictor(str(moved), weights)
    assert predictor.metadata.thing_classes == NAMES
    image = digits / "vovnet_d2_digits" / "val" / "000003.png"
    instances = predictor(image)["instances"]
    expected = [r for r in found if r["image_id"] == 4]
    scores = sorted(result["score"] for result in expected)
    assert sorted(instances.scores.tolist()) == pytest.approx(scores, abs=1e-5)

    words = ["--config-file", str(moved), "--input", str(image), "--score-threshold", "0"]
    words += ["--json", str(tmp_path / "found.json"), "--opts", "MODEL.WEIGHTS", weights]
    with pytest.raises(SystemExit) as caught:
        demo(words)
    assert caught.value.code == 0
    told = json.loads((tmp_path / "found.json").read_text())
    best = max(expected, key=lambda result: result["score"])
    assert max(told, key=lambda result: result["score"])["category_id"] == best["category_id"]


def test_records_equal_those_of_detectron2(catalogs: None, digits: Path) -> None:
    """Compare records with load_coco_json, which needs all categories in the list."""
    setup(FASTER_RCNN, flags(digits, *BOTH))
    json_file, images = str(digits / "train.json"), str(digits / "vovnet_d2_digits" / "train")
    assert DatasetCatalog.get("own_train") == load_coco_json(json_file, images, "plain")
    own, plain = MetadataCatalog.get("own_train"), MetadataCatalog.get("plain")
    assert own.thing_classes == plain.thing_classes == NAMES
    assert own.thing_dataset_id_to_contiguous_id == plain.thing_dataset_id_to_contiguous_id
    counts = [0] * len(NAMES)
    for record in DatasetCatalog.get("own_val"):
        for annotation in record["annotations"]:
            counts[annotation["category_id"]] += 1
    truth = COCO(digits / "val.json")
    assert counts == [len(truth.getAnnIds(catIds=[IDS[name]])) for name in NAMES]


def test_keypoints_and_order_equal_those_of_detectron2(
    catalogs: None, digits: Path, tmp_path: Path
) -> None:
    content = json.loads((digits / "train.json").read_text())
    content["images"].reverse()
    for number, annotation in enumerate(content["annotations"]):
        annotation["keypoints"] = [number, 20, 2, 30, number + 1, 1, 0, 0, 0]
        annotation["num_keypoints"] = 2
    (tmp_path / "train.json").write_text(json.dumps(content))
    images = str(digits / "vovnet_d2_digits" / "train")
    setup(FASTER_RCNN, ["--train-json", str(tmp_path / "train.json"), "--train-images", images])
    own = DatasetCatalog.get("own_train")
    assert own == load_coco_json(str(tmp_path / "train.json"), images, "plain")
    assert any(annotation["keypoints"] for record in own for annotation in record["annotations"])


@pytest.mark.parametrize("config", [MASK_RCNN, RETINANET])
def test_every_head_has_the_number_of_categories(catalogs: None, digits: Path, config: str) -> None:
    cfg = setup(config, flags(digits, *BOTH))
    nodes = (node for node in cfg.MODEL.values() if isinstance(node, dict))
    counts = [node["NUM_CLASSES"] for node in nodes if "NUM_CLASSES" in node]
    stuff = cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
    assert sorted(counts) == sorted([stuff, *[10] * (len(counts) - 1)])
    check_data(cfg, training=True)
    restored = load_config()
    restored.merge_from_other_cfg(type(cfg)(yaml.safe_load(cfg.dump())))
    assert restored.DATASETS.OWN == cfg.DATASETS.OWN


# Given files


def test_one_process_reads_the_files_for_all_processes(
    catalogs: None, digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    contents = own_data.read_contents(
        str(digits / "train.json"), str(digits / "vovnet_d2_digits" / "train"), evaluated=False
    )
    told: list[Any] = [contents]
    monkeypatch.setattr(own_data, "read_contents", lambda *_, **__: pytest.fail("read twice"))
    monkeypatch.setattr(main_process.comm, "is_main_process", lambda: False)
    monkeypatch.setattr(main_process.comm, "all_gather", lambda value: [told[0], value])
    assert setup(FASTER_RCNN, flags(digits, "train")).MODEL.ROI_HEADS.NUM_CLASSES == 10
    told[0] = UserValueError("What the main process says.")
    with pytest.raises(UserValueError, match="What the main process says"):
        setup(FASTER_RCNN, flags(digits, "train"))


def test_without_validation(
    catalogs: None, digits: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Give only training data. A validation file in the config of an earlier run is ignored."""
    earlier = tmp_path / "config.yaml"
    earlier.write_text(setup(FASTER_RCNN, flags(digits, *BOTH)).dump())
    for config in (FASTER_RCNN, str(earlier)):
        caplog.clear()
        cfg = setup(config, flags(digits, "train"))
        assert cfg.DATASETS.TEST == ()
        assert [entry["name"] for entry in cfg.DATASETS.OWN] == ["own_train"]
        assert "Nothing is evaluated, neither during the training nor" in caplog.text


def test_other_files_to_evaluate_on(catalogs: None, digits: Path, tmp_path: Path) -> None:
    """Evaluate on another file. The categories are those of the training."""
    cfg = setup(FASTER_RCNN, flags(digits, "train"))
    trained = tmp_path / "config.yaml"
    trained.write_text(cfg.dump())
    cfg = setup(str(trained), flags(digits, "val"), training=False)
    assert cfg.DATASETS.TEST == ("own_val",)
    assert MetadataCatalog.get("own_val").thing_classes == NAMES
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == 10


def test_ids_of_another_numbering(catalogs: None, digits: Path, tmp_path: Path) -> None:
    """Use a validation file whose ids count the same names from 0."""
    content = json.loads((digits / "train.json").read_text())
    numbers = {IDS[name]: number for number, name in enumerate(NAMES)}
    for category in content["categories"]:
        category["id"] = numbers[category["id"]]
    for annotation in content["annotations"]:
        annotation["category_id"] = numbers[annotation["category_id"]]
    (tmp_path / "val.json").write_text(json.dumps(content))
    words = [*flags(digits, "train"), "--val-json", str(tmp_path / "val.json")]
    setup(FASTER_RCNN, [*words, "--val-images", str(digits / "vovnet_d2_digits" / "train")])
    labels = [
        [[a["category_id"] for a in record["annotations"]] for record in DatasetCatalog.get(name)]
        for name in ("own_train", "own_val")
    ]
    assert labels[0] == labels[1]


def renumber(content: dict, ids: dict[int, Any]) -> None:
    for category in content["categories"]:
        category["id"] = ids[category["id"]]
    for annotation in content["annotations"]:
        annotation["category_id"] = ids[annotation["category_id"]]


@pytest.mark.parametrize("kind", ["reversed", "text"])
def test_categories_are_matched_by_name(
    catalogs: None, digits: Path, tmp_path: Path, kind: str
) -> None:
    """Use a validation file with other ids, a missing name and an additional name.

    Labels, scores and the names of metrics must still be right.
    """
    content = json.loads((digits / "val.json").read_text())
    old = [category["id"] for category in content["categories"]]
    new = dict(zip(old, [f"c{i}" for i in old] if kind == "text" else old[::-1], strict=True))
    renumber(content, new)
    content["categories"].append({"id": "zz" if kind == "text" else 999, "name": "never"})
    (tmp_path / "val.json").write_text(json.dumps(content))
    words = [*flags(digits, "train"), "--val-json", str(tmp_path / "val.json")]
    words += ["--val-images", str(digits / "vovnet_d2_digits" / "val")]
    cfg = setup(FASTER_RCNN, words, "OUTPUT_DIR", str(tmp_path), training=False)
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == 10
    names = {c["id"]: c["name"] for c in content["categories"]}
    by_image = {i["id"]: [] for i in content["images"]}
    for annotation in content["annotations"]:
        by_image[annotation["image_id"]].append(names[annotation["category_id"]])
    records = DatasetCatalog.get("own_val")
    for record in records:
        found = [NAMES[a["category_id"]] for a in record["annotations"]]
        assert found == by_image[record["image_id"]]
    evaluator = build_evaluator(cfg, "own_val")
    evaluator.reset()
    only = NAMES.index("3")  # all other objects are missed
    for record in records:
        objects = [a for a in record["annotations"] if a["category_id"] == only]
        objects = [a for a in objects if not a["iscrowd"]]
        found = Instances((record["height"], record["width"]))
        boxes = [BoxMode.convert(a["bbox"], 1, 0) for a in objects]
        found.pred_boxes = Boxes(torch.tensor(boxes).reshape(-1, 4))
        found.scores = torch.ones(len(objects))
        found.pred_classes = torch.full((len(objects),), only)
        evaluator.process([record], [{"instances": found}])
    results = evaluator.evaluate()["bbox"]
    assert results["AP-3"] == pytest.approx(100)
    others = [results[f"AP-{n}"] for n in NAMES if n != "3"]
    assert np.nanmax(others) == 0


def test_category_names_that_are_numbers(catalogs: None, digits: Path, tmp_path: Path) -> None:
    """Use names that are whole numbers or fractions. They are read as text everywhere."""
    words = []
    for split in BOTH:
        content = json.loads((digits / f"{split}.json").read_text())
        for category in content["categories"]:
            number = float(category["name"])
            category["name"] = number + 0.5 if number > 8 else int(number)
        (tmp_path / f"{split}.json").write_text(json.dumps(content))
        words += [f"--{split}-json", str(tmp_path / f"{split}.json")]
        words += [f"--{split}-images", str(digits / "vovnet_d2_digits" / split)]
    cfg = setup(FASTER_RCNN, words, "OUTPUT_DIR", str(tmp_path))
    expected = ["9.5" if name == "9" else name for name in NAMES]
    for name in ("own_train", "own_val"):
        assert MetadataCatalog.get(name).thing_classes == expected
        DatasetCatalog.get(name)
    (tmp_path / "config.yaml").write_text(cfg.dump())
    again = load_config(str(tmp_path / "config.yaml"))
    register_own_data(again.DATASETS.OWN)
    assert MetadataCatalog.get("own_val").thing_classes == expected
    evaluator = build_evaluator(cfg, "own_val")
    evaluator.reset()
    record, *_ = DatasetCatalog.get("own_val")
    found = Instances((record["height"], record["width"]))
    found.pred_boxes, found.scores = Boxes(torch.ones(1, 4)), torch.ones(1)
    found.pred_classes = torch.zeros(1, dtype=torch.int64)
    evaluator.process([record], [{"instances": found}])
    assert {f"AP-{name}" for name in expected} <= evaluator.evaluate()["bbox"].keys()


def test_images_that_are_left_out_are_logged(
    catalogs: None, digits: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    content = json.loads((digits / "train.json").read_text())
    used = {a["image_id"] for a in content["annotations"] if not a["iscrowd"]}
    told = []
    for images in (content["images"], [i for i in content["images"] if i["id"] in used]):
        kept = {image["id"] for image in images}
        annotations = [a for a in content["annotations"] if a["image_id"] in kept]
        (tmp_path / "train.json").write_text(
            json.dumps(content | {"images": images, "annotations": annotations})
        )
        words = ["--train-json", str(tmp_path / "train.json")]
        caplog.clear()
        with caplog.at_level(logging.INFO, "vovnet_d2"):
            setup(FASTER_RCNN, [*words, *flags(digits, "train")[2:]])
        told.append([m for m in caplog.messages if "training leaves out" in m])
    assert told[0][0].startswith("The training leaves out 2 images without objects or with crowds")
    assert told[1] == []


def test_other_files_give_other_category_names(catalogs: None, digits: Path) -> None:
    entry = OwnDataSet("own_train", "a.json", "a", ("cat",), (1,)).to_config()
    register_own_data([entry])
    register_own_data([entry])
    assert MetadataCatalog.get("own_train").thing_classes == ["cat"]
    setup(FASTER_RCNN, flags(digits, "train"))
    assert MetadataCatalog.get("own_train").thing_classes == NAMES
    DatasetCatalog.register("theirs", list)
    with pytest.raises(ValueError, match="'theirs', and another data set has this name"):
        register_own_data([entry | {"name": "theirs"}])
    for wrong in (7, {"name": "a"}, entry | {"category_ids": []}):
        with pytest.raises(ValueError, match=r"DATASETS\.OWN has"):
            register_own_data([wrong])


# Mistakes


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--train-json", "{json}"], "--train-annotations and --train-images go together"),
        (["--val-images", "a"], "--val-annotations and --val-images go together"),
        (["--train-json", "a.json", "--train-images", "."], r"no annotation file /.*/a\.json"),
    ],
)
def test_missing_arguments(catalogs: None, digits: Path, words: list[str], message: str) -> None:
    words = [word.format(json=digits / "train.json") for word in words]
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        setup(FASTER_RCNN, words)


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (
            FASTER_RCNN,
            ["DATASETS.TRAIN", "('a',)"],
            "DATASETS.TRAIN follows from the files of --train-annotations and --val-annotations: "
            "remove it from the command",
        ),
        (RETINANET, ["MODEL.RETINANET.NUM_CLASSES", "3"], "MODEL.RETINANET.NUM_CLASSES follows"),
        ("COCO-PanopticSegmentation/panoptic_fpn_V_39_eSE_1x.yaml", [], "PanopticFPN learns from"),
        ("COCO-SemanticSegmentation/semantic_V_39_FPN_1x.yaml", [], "SemanticSegmentor learns"),
        (
            "COCO-Keypoints/keypoint_rcnn_V_39_eSE_FPN_1x.yaml",
            [],
            "train.json cannot be used for keypoints: no category names its keypoints",
        ),
    ],
)
def test_configs_that_contradict_custom_data(
    catalogs: None, digits: Path, config: str, options: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        setup(config, flags(digits, *BOTH), *options)


def _set(section: str, key: str, value: Any) -> Callable[[dict], None]:
    return lambda content: content[section][0].__setitem__(key, value)


SPOILT: dict[str, tuple[Callable[[dict], Any], str]] = {
    "no list": (lambda c: c.pop("images"), r'missing or not lists \("images" is missing\)'),
    "no object": (lambda c: c["images"].append(7), r"entries that are not objects \(images\[14\]"),
    "empty": (lambda c: c["annotations"].clear(), "has no annotations"),
    "no width": (lambda c: c["images"][0].pop("width"), r"\(image 1: None x 96\)"),
    "text for id": (
        _set("annotations", "category_id", "4"),
        r"categories that are not listed|ids that are text where .*category_id is '4'",
    ),
    "no id": (
        _set("annotations", "category_id", 4.5),
        r"not listed \(annotation \d+ of \S+: 4\.5\)",
    ),
    "ids of two kinds": (_set("images", "id", "one"), r"or not all text \(image 'one'\)"),
    "text for a number": (
        _set("annotations", "image_id", "2"),
        "ids that are text where the ids are numbers",
    ),
    "id twice": (_set("images", "id", 2), "different images that share an id"),
    "empty masks": (
        lambda c: [a.update(segmentation=[[]]) for a in c["annotations"] if not a["iscrowd"]],
        r"objects without a mask.*MODEL.MASK_ON False",
    ),
    "three numbers": (
        _set("annotations", "bbox", [1, 2, 3]),
        r"not four numbers \(annotation \d+ of \S+: \[1, 2, 3\]\)",
    ),
    "category": (_set("annotations", "category_id", 7), r"not listed \(annotation \d+ of \S+: 7\)"),
    "one name": (
        _set("categories", "name", "3"),
        r"categories that share a name \(category \d+: '3' and 1 more\)",
    ),
    "encoded mask": (_set("annotations", "iscrowd", 0), r"has 1 mask as RLE, not as polygons"),
    "no segmentation": (
        lambda c: [a.pop("segmentation") for a in c["annotations"] if not a["iscrowd"]],
        r"objects without a mask.*MODEL.MASK_ON False",
    ),
    "crowds only": (
        lambda c: [a.update(iscrowd=1) for a in c["annotations"]],
        "no image with an object that is no crowd",
    ),
    "other folder": (
        lambda c: [i.update(file_name="a.jpg") for i in c["images"]],
        "does not hold the images of .*, for example 'a.jpg'",
    ),
}


@pytest.mark.parametrize("name", SPOILT)
def test_files_that_cannot_be_used(catalogs: None, digits: Path, tmp_path: Path, name: str) -> None:
    spoil, message = SPOILT[name]
    content = json.loads((digits / "train.json").read_text())
    spoil(content)
    (tmp_path / "train.json").write_text(json.dumps(content))
    words = ["--train-json", str(tmp_path / "train.json")]
    with pytest.raises((FileNotFoundError, ValueError), match=message) as caught:
        setup(MASK_RCNN, [*words, "--train-images", str(digits / "vovnet_d2_digits" / "train")])
    assert "\n" not in caught.value.args[0]


@pytest.mark.parametrize("text", ["", "[1]", '{"images":', "GIF89a"])
def test_a_file_that_is_something_else(
    catalogs: None, digits: Path, tmp_path: Path, text: str
) -> None:
    (tmp_path / "train.json").write_text(text)
    words = ["--train-json", str(tmp_path / "train.json"), "--train-images", str(digits)]
    with pytest.raises(ValueError, match=r"train\.json is not in COCO's format.*check_dataset"):
        setup(FASTER_RCNN, words)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_files_that_are_not_plain_utf_8(
    catalogs: None, digits: Path, tmp_path: Path, encoding: str
) -> None:
    """Check that the run writes copies in UTF-8, because pycocotools cannot read other files."""
    for split in BOTH:
        (tmp_path / f"{split}.json").write_text((digits / f"{split}.json").read_text(), encoding)
    words = [w.replace(f"{digits}/{s}.json", f"{tmp_path}/{s}.json")
             for s in BOTH for w in flags(digits, s)]  # fmt: skip
    cfg = setup(FASTER_RCNN, words, "OUTPUT_DIR", str(tmp_path / "out"))
    for entry, split in zip(cfg.DATASETS.OWN, BOTH, strict=True):
        assert Path(entry["json"]).parent == tmp_path / "out"
        assert COCO(entry["json"]).dataset == json.loads((digits / f"{split}.json").read_text())
    found = [labels_of(f"own_{split}") for split in BOTH]
    setup(FASTER_RCNN, flags(digits, *BOTH))
    assert found == [labels_of(f"own_{split}") for split in BOTH]


@pytest.mark.parametrize("key", ["area", "iscrowd"])
def test_keys_that_only_evaluation_needs(digits: Path, tmp_path: Path, key: str) -> None:
    content = json.loads((digits / "train.json").read_text())
    number = content["annotations"][3]["id"]
    del content["annotations"][3][key]
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(content))
    images = str(digits / "vovnet_d2_digits" / "train")
    read_contents(str(path), images, evaluated=False)
    with pytest.raises(
        ValueError, match=rf"{key}.* missing .*\(annotation {number} of \S+: None\)\. "
    ):
        read_contents(str(path), images, evaluated=True)


def test_names_close_to_missing_files_are_told(digits: Path) -> None:
    folder, file = digits / "vovnet_d2_digits" / "train", digits / "train.json"
    with pytest.raises(FileNotFoundError, match=rf"There is no .*\. Close to it: '{file}'\.$"):
        read_contents(f"{file}s", str(folder), evaluated=False)
    with pytest.raises(FileNotFoundError, match=rf"There is no .*\. Close to it: '{folder}'\.$"):
        read_contents(str(file), f"{folder}s", evaluated=False)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            {"id": 5, "name": "0"},
            {"id": 5, "name": "zero"},
            r"does not have: 'zero'\. Add pictures",
        ),
        ({"id": 5, "name": "0"}, {"id": 1, "name": "00"}, r"have: '00'\. Close to it: '0'"),
    ],
)
def test_validation_categories_that_training_does_not_have(
    catalogs: None, digits: Path, tmp_path: Path, old: dict, new: dict, message: str
) -> None:
    content = json.loads((digits / "val.json").read_text())
    content["categories"][content["categories"].index(old)] = new
    for annotation in content["annotations"]:
        if annotation["category_id"] == old["id"]:
            annotation["category_id"] = new["id"]
    (tmp_path / "val.json").write_text(json.dumps(content))
    words = [*flags(digits, "train"), "--val-json", str(tmp_path / "val.json")]
    with pytest.raises(ValueError, match=message):
        setup(FASTER_RCNN, [*words, "--val-images", str(digits / "vovnet_d2_digits" / "val")])


def test_files_that_are_removed_or_changed_later(
    catalogs: None, digits: Path, tmp_path: Path
) -> None:
    """Use the config of an earlier run after its files were changed or removed."""
    copy = tmp_path / "train.json"
    copy.write_text((digits / "train.json").read_text())
    words = [
        "--train-json",
        str(copy),
        "--train-images",
        str(digits / "vovnet_d2_digits" / "train"),
    ]
    cfg = setup(FASTER_RCNN, words)
    content = json.loads(copy.read_text())
    content["annotations"][0]["category_id"] = 77
    copy.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="annotation of category 77, and the network has only 10"):
        DatasetCatalog.get("own_train")
    copy.write_text("[]")
    with pytest.raises(ValueError, match=r"train\.json is not in COCO's format \("):
        DatasetCatalog.get("own_train")
    copy.unlink()
    with pytest.raises(FileNotFoundError, match=r"not where DATASETS\.OWN has.*--train-annot"):
        check_data_sets(cfg, "TRAIN")


# Formats other than COCO


@pytest.fixture(scope="module")
def converted(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the boxes of the digits in every other format, each in its own folder.

    The folder "images" has the images of both parts.
    """
    root = tmp_path_factory.mktemp("formats")
    (root / "images").mkdir()
    parts = {part: json.loads((digits / f"{part}.json").read_text()) for part in BOTH}
    for part, content in parts.items():
        content["categories"] = [{"id": IDS[name], "name": name} for name in NAMES]
        for annotation in content["annotations"]:
            annotation.pop("segmentation")
        for image in content["images"]:
            source = digits / "vovnet_d2_digits" / part / image["file_name"]
            image["file_name"] = f"{part}-{image['file_name']}"
            shutil.copy(source, root / "images" / image["file_name"])
    for key in ("voc", "yolo", "labelme", "csv"):
        WRITERS[key](root / key, parts, Notes())
    return root


def annotation_flags(key: str, converted: Path) -> list[str]:
    words = []
    for split in BOTH:
        path = {"csv": f"{split}.csv", "labelme": split}.get(key, "")
        words += [f"--{split}-annotations", str(converted / key / path)]
        words += [f"--{split}-images", str(converted / "images")]
    return words


@pytest.mark.parametrize("key", ["voc", "yolo", "labelme", "csv"])
def test_records_of_other_formats_equal_those_of_coco(
    catalogs: None, digits: Path, converted: Path, tmp_path: Path, key: str, caplog: Any
) -> None:
    setup(FASTER_RCNN, flags(digits, *BOTH))
    found = [{split: labels_of(f"own_{split}") for split in BOTH}]
    names = MetadataCatalog.get("own_train").thing_classes
    with caplog.at_level(logging.INFO, "vovnet_d2"):
        words = annotation_flags(key, converted)
        cfg = setup(FASTER_RCNN, words, "OUTPUT_DIR", str(tmp_path / "out"))
    found.append({split: labels_of(f"own_{split}") for split in BOTH})
    if key == "yolo":  # YOLO has no crowds
        for sets in found:
            for labels in sets.values():
                for file, objects in labels.items():
                    labels[file] = [row for row in objects if not row[-1]]
    if key == "csv":  # the CSV files have no images without objects
        found[0] = {s: {f: o for f, o in labels.items() if o} for s, labels in found[0].items()}
    used = [name for name in NAMES if name != MISSING]
    if key == "yolo":
        assert MetadataCatalog.get("own_train").thing_classes == names
    else:
        assert MetadataCatalog.get("own_train").thing_classes == sorted(used)
    assert found[0] == found[1]
    assert cfg.DATASETS.OWN[0]["json"] == str(tmp_path / "out" / "annotations_train.json")
    assert f": {FORMATS[key].title}, " in caplog.text
    assert "the categories in their order are 1 " in caplog.text


def labels_of(name: str) -> dict[str, list[tuple[Any, ...]]]:
    names = MetadataCatalog.get(name).thing_classes
    return {
        Path(record["file_name"]).name.removeprefix(f"{name.removeprefix('own_')}-"): [
            (names[a["category_id"]], *(round(n, 6) for n in a["bbox"]), a["iscrowd"])
            for a in record["annotations"]
        ]
        for record in DatasetCatalog.get(name)
    }


def test_train_from_voc_and_evaluate_later(
    catalogs: None, fresh_logging: None, converted: Path, tmp_path: Path
) -> None:
    """Give only the folder of annotations, because the images are where VOC has them."""
    root = tmp_path / "mine"
    shutil.copytree(converted / "voc", root)
    shutil.copytree(converted / "images", root / "JPEGImages")
    out = tmp_path / "out"
    options = [*TINY, "MODEL.DEVICE", "cpu", "INPUT.MIN_SIZE_TRAIN", "(96,)"]
    words = ["--train-annotations", str(root), "--val-annotations", str(root)]
    trained = launch(FASTER_RCNN, *words, *options, "OUTPUT_DIR", str(out))
    log = read_log(out)
    assert f"{root}: PASCAL VOC XML, 14 images, " in log
    assert f"{root}: PASCAL VOC XML, 8 images, " in log
    assert "annotations_train.json: 9 categories, 14 images, " in log
    marked = sum(
        file.read_text().count("<difficult>1</difficult>")
        for file in (root / "Annotations").glob("*.xml")
        if file.stem in (root / "ImageSets" / "Main" / "train.txt").read_text().split()
    )
    assert f"annotations_train.json marks {counted(marked, 'annotations')} as crowds" in log
    for catalog in (DatasetCatalog, MetadataCatalog):
        catalog.data.clear()
    words = ["--eval-only", "MODEL.WEIGHTS", str(out / "model_final.pth")]
    assert str(launch(str(out / "config.yaml"), *words)) == str(trained)


def test_a_conversion_leaves_the_annotations_of_an_earlier_run(
    catalogs: None, converted: Path, tmp_path: Path
) -> None:
    """Convert again after a change. The config of an earlier run still names its own file."""
    root = tmp_path / "mine"
    shutil.copytree(converted / "csv", root)
    words = ["--train-annotations", str(root / "train.csv")]
    words += ["--train-images", str(converted / "images")]
    options = ["OUTPUT_DIR", str(tmp_path / "out")]
    text, files = (root / "train.csv").read_text(), []
    fewer = "".join(text.splitlines(keepends=True)[:-1])
    for rows in (text, fewer, text):
        (root / "train.csv").write_text(rows)
        cfg = setup(FASTER_RCNN, words, *options)
        (tmp_path / "out" / "config.yaml").write_text(cfg.dump())
        files.append(Path(cfg.DATASETS.OWN[0]["json"]))
    assert [file.name for file in files] == [
        *("annotations_train.json", "annotations_train_2.json", "annotations_train.json")
    ]
    first, second = (len(json.loads(file.read_text())["annotations"]) for file in files[:2])
    assert first == second + 1


def test_a_conversion_replaces_the_annotations_of_a_failed_run(
    catalogs: None, converted: Path, tmp_path: Path
) -> None:
    """Convert again after a change. The earlier run has failed before it has written its config."""
    root, out = tmp_path / "mine", tmp_path / "out"
    shutil.copytree(converted / "csv", root)
    words = ["--train-annotations", str(root / "train.csv")]
    words += ["--train-images", str(converted / "images")]
    setup(FASTER_RCNN, words, "OUTPUT_DIR", str(out))
    rows = (root / "train.csv").read_text().splitlines(keepends=True)
    (root / "train.csv").write_text("".join(rows[:-1]))
    setup(FASTER_RCNN, words, "OUTPUT_DIR", str(out))
    (file,) = out.glob("annotations*")
    assert (
        len(json.loads(file.read_text())["annotations"]) == len(rows) - 2
    )  # a title, and one less
    # A file that somebody has changed stays.
    file.write_text(file.read_text() + "\n\n")
    changed = file.read_text()
    (root / "train.csv").write_text("".join(rows))
    second = setup(FASTER_RCNN, words, "OUTPUT_DIR", str(out))
    assert second.DATASETS.OWN[0]["json"] == str(out / "annotations_train_2.json")
    assert file.read_text() == changed


def test_changes_by_a_conversion_are_warnings(
    catalogs: None, converted: Path, tmp_path: Path, caplog: Any
) -> None:
    root = tmp_path / "mine"
    shutil.copytree(converted / "csv", root)
    lines = (root / "train.csv").read_text().splitlines()
    cells = lines[1].split(",")
    cells[4], cells[5] = cells[5], cells[4]
    (root / "train.csv").write_text("\n".join([lines[0], ",".join(cells), *lines[2:]]))
    words = ["--train-annotations", str(root / "train.csv")]
    words += ["--train-images", str(converted / "images")]
    setup(FASTER_RCNN, words, "OUTPUT_DIR", str(tmp_path / "out"))
    note = "1 boxes have their corners swapped and are corrected"
    assert f"{note}; first: {root / 'train.csv'}, line 2." in caplog.text


def test_annotations_without_a_folder_of_images(
    catalogs: None, converted: Path, tmp_path: Path
) -> None:
    words = ["--train-annotations", str(converted / "csv" / "train.csv")]
    with pytest.raises(ValueError, match=r"CSV of Open Images, which does not say where its i"):
        setup(FASTER_RCNN, words, "OUTPUT_DIR", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_equal_training_and_validation_data_are_a_warning(
    catalogs: None, converted: Path, tmp_path: Path, caplog: Any
) -> None:
    """Give the same folder for training and validation."""
    words = annotation_flags("labelme", converted)
    setup(FASTER_RCNN, words, "OUTPUT_DIR", str(tmp_path / "out"))
    assert "are the same" not in caplog.text
    words[words.index("--val-annotations") + 1] = str(converted / "labelme" / "train")
    setup(FASTER_RCNN, words, "OUTPUT_DIR", str(tmp_path / "out"))
    assert "The annotations to train on and to evaluate on are the same" in caplog.text
