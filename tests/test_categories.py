# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""The categories that weights name are compared with the categories of a config."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model
from engine_runs import FASTER_RCNN, launch, read_log, tiny_config

from vovnet_d2 import Predictor, VoVNetCheckpointer
from vovnet_d2.engine import Trainer
from vovnet_d2.engine.categories import category_names, find_difference, first_difference

pytest_plugins = ["engine_fixtures"]

COCO = "coco_2017_val"
TWO = ["MODEL.ROI_HEADS.NUM_CLASSES", "2"]


def save(folder: Path, names: list[str] | None, *options: str) -> str:
    """Save the weights of a network for these categories, with or without their names."""
    model = build_model(tiny_config(FASTER_RCNN, folder, *options))
    categories = {"thing_classes": names} if names else None
    VoVNetCheckpointer(model, str(folder), categories=categories).save("weights")
    return str(folder / "weights.pth")


def register(name: str, classes: list[str]) -> None:
    DatasetCatalog.register(name, list)
    MetadataCatalog.get(name).set(thing_classes=classes)


def test_a_training_writes_the_names(coco: Path, tmp_path: Path) -> None:
    trainer = Trainer(tiny_config(FASTER_RCNN, tmp_path, "TEST.EVAL_PERIOD", "9"))
    best = next(h for h in trainer._hooks if type(h).__name__ == "BestCheckpointer")
    names = MetadataCatalog.get(COCO).thing_classes
    for checkpointer in (trainer.checkpointer, best._checkpointer):
        assert checkpointer.categories == {"thing_classes": names}
    best._checkpointer.save("weights")
    assert torch.load(tmp_path / "weights.pth")["categories"]["thing_classes"][:2] == names[:2]


def test_evaluation_refuses_weights_of_other_categories(coco: Path, tmp_path: Path) -> None:
    names = [*MetadataCatalog.get(COCO).thing_classes]
    names[3], names[4] = names[4], names[3]
    weights = ["MODEL.WEIGHTS", save(tmp_path, names)]
    message = r"coco_2017_val has: number 3 is 'airplane' for them, and 'motorcycle' there"
    with pytest.raises(ValueError, match=message):
        launch(FASTER_RCNN, tmp_path, "--eval-only", *weights)
    launch(FASTER_RCNN, tmp_path, "--eval-only", "--allow-partial", *weights)
    assert "number 3 is 'airplane' for them" in read_log(tmp_path / "evaluation")


def test_training_from_weights_of_other_categories_is_logged(
    coco: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    weights = save(tmp_path, [f"name {i}" for i in range(80)])
    cfg = tiny_config(FASTER_RCNN, tmp_path / "out", "MODEL.WEIGHTS", weights)
    Trainer(cfg).resume_or_load(resume=False)
    assert "number 0 is 'name 0' for them, and 'person' there" in caplog.text


@pytest.mark.parametrize(
    ("loaded", "missing", "differs"),
    [
        ({"thing_classes": ["b", "a"]}, [], True),
        ({"thing_classes": ["a", "b"]}, [], False),
        ({"thing_classes": ["b"]}, [], False),  # names that do not fit the network
        ({"thing_classes": ["b", "a"]}, ["roi_heads.box_predictor.cls_score.weight"], False),
        ({"stuff_classes": ["b", "a"]}, [], False),
        ({}, [], False),
    ],
)
def test_differences_of_categories(
    catalogs: None, tmp_path: Path, loaded: dict, missing: list[str], differs: bool
) -> None:
    register("mine", ["a", "b"])
    checkpointer = SimpleNamespace(loaded_categories=loaded, missing_outside_backbone=missing)
    cfg = tiny_config(FASTER_RCNN, tmp_path, *TWO)
    assert bool(find_difference(cfg, ["mine"], checkpointer)) == differs  # type: ignore[arg-type]
    assert find_difference(cfg, [], checkpointer) == ""  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("names", "others", "expected"),
    [
        (["a", "b"], ["a", "b"], None),
        (["a", "b"], ["a", "c"], (1, "b", "c")),
        (["a"], ["a", "b"], (1, "missing", "b")),
        (["a", "b"], ["a"], (1, "b", "missing")),
        (["a"], ["a", "missing"], (1, "missing", "missing")),
    ],
)
def test_first_difference(names: list[str], others: list[str], expected: object) -> None:
    assert first_difference(names, others) == expected


def test_names_of_data_sets(catalogs: None) -> None:
    register("mine", ["a", "b"])
    assert category_names(["mine", "other"]) == {"thing_classes": ["a", "b"]}
    assert category_names(["other"]) == category_names([]) == {}
    assert "other" not in MetadataCatalog


def test_predictions_are_named_as_the_weights_say(
    catalogs: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cfg = tiny_config(FASTER_RCNN, tmp_path, *TWO, "DATASETS.TEST", "('mine',)")
    weights = save(tmp_path, ["cat", "dog"], *TWO)
    assert Predictor(cfg, weights).metadata.thing_classes == ["cat", "dog"]
    assert "Categories go by" not in caplog.text
    register("mine", ["dog", "cat"])
    assert Predictor(cfg, weights).metadata.thing_classes == ["cat", "dog"]
    assert "number 0 is 'cat' for them, and 'dog' there. They are named" in caplog.text
    MetadataCatalog.get("mine").thing_colors = [(1, 2, 3), (4, 5, 6)]
    silent = save(tmp_path, None, *TWO)
    assert Predictor(cfg, silent).metadata.thing_colors[0] == (1, 2, 3)


@pytest.mark.parametrize(
    "entry", ["cat", ["cat"], {"thing_classes": "cat"}, {"thing_classes": [1]}, {"name": ["x"]}]
)
def test_a_file_without_category_names_under_their_key(
    catalogs: None, tmp_path: Path, entry: object
) -> None:
    path = save(tmp_path, None, *TWO)
    torch.save(torch.load(path) | {"categories": entry}, path)
    checkpointer = VoVNetCheckpointer(build_model(tiny_config(FASTER_RCNN, tmp_path, *TWO)))
    checkpointer.load(path)
    assert checkpointer.loaded_categories == {}
