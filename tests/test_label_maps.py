# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""The check of label maps before a training: their values, sizes and kinds of files."""

import logging
from pathlib import Path

import check_dataset
import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from vovnet_d2.engine import load_config
from vovnet_d2.engine.data_checks import check_data

pytest_plugins = ["engine_fixtures"]

SIZE = (12, 20)


def register(folder: Path, maps: list[Image.Image | np.ndarray], **metadata: object) -> None:
    records = []
    for index, labels in enumerate(maps):
        picture, file = folder / f"{index}.jpg", folder / f"{index}.png"
        Image.fromarray(np.zeros((*SIZE, 3), np.uint8)).save(picture)
        if not isinstance(labels, Image.Image):
            labels = Image.fromarray(labels.astype(np.uint8 if labels.max() < 256 else np.uint16))
        labels.save(file)
        records.append({"file_name": str(picture), "sem_seg_file_name": str(file)})
    DatasetCatalog.register("maps", lambda: records)
    options = {"stuff_classes": list("abc"), "evaluator_type": "sem_seg", "ignore_label": 255}
    MetadataCatalog.get("maps").set(**options | metadata)


def check(*options: str) -> None:
    cfg = load_config("COCO-SemanticSegmentation/semantic_V_39_FPN_1x.yaml")
    cfg.merge_from_list(["DATASETS.TRAIN", ("maps",), "DATASETS.TEST", ()])
    cfg.merge_from_list(["MODEL.SEM_SEG_HEAD.NUM_CLASSES", 3, *options])
    check_data(cfg, training=True)


def labels_of(*values: int) -> np.ndarray:
    return np.resize(values, SIZE)


def test_good_label_maps(catalogs: None, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    palette = Image.fromarray(labels_of(0, 1).astype(np.uint8), mode="P")
    palette.putpalette([9, 9, 9, 200, 0, 0])
    register(tmp_path, [palette, labels_of(1, 255)])
    with caplog.at_level(logging.INFO, "vovnet_d2"):
        check()
    assert "the label maps have 2 of the 3 classes; without a pixel are 2." in caplog.text


COLOURS = Image.fromarray(np.random.default_rng(0).integers(0, 9, (*SIZE, 3), dtype=np.uint8))
BAD = {
    "colours": (COLOURS, r"0\.png is not a label map: its pixels have "),
    "0 and 255": (labels_of(0, 255), r"no values but 0 and 255.* one class to learn"),
    "grey values": (labels_of(0, 127, 254), r"0\.png is the first .* probably grey values"),
    "from 1": (labels_of(1, 2, 3), "not classes: 3 .*counted from 1: subtract 1"),
    "background": (labels_of(0, 1, 2, 3), "If 0 is the background, the network needs one more"),
    "too many": (labels_of(0, 1, 2, 7, 300), "values that are not classes: 7, 300"),
    "nothing": (labels_of(255), "no pixel of a class"),
    "size": (np.zeros((5, 5)), r"0\.png has 5 x 5 pixels, and its picture .*0\.jpg 20 x 12"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_label_maps(catalogs: None, tmp_path: Path, kind: str) -> None:
    labels, message = BAD[kind]
    register(tmp_path, [labels, labels])
    with pytest.raises(ValueError, match=rf"Data set maps: .*{message}") as caught:
        check()
    assert "\n" not in str(caught.value)


def test_another_value_for_pixels_without_a_label(catalogs: None, tmp_path: Path) -> None:
    register(tmp_path, [labels_of(0, 1)], ignore_label=0)
    with pytest.raises(ValueError, match=r"ignore_label 0 .*IGNORE_VALUE 255"):
        check()


def test_no_label_maps(catalogs: None, tmp_path: Path) -> None:
    register(tmp_path, [])
    with pytest.raises(ValueError, match="has no label maps"):
        check()


def test_the_tool_checks_registered_label_maps(
    catalogs: None, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    register(tmp_path, [labels_of(0, 1)])
    assert check_dataset.main(["maps"]) == 0
    assert "maps: 1 label maps\n  the label maps have 2 of the 3 classes" in capsys.readouterr().out
    DatasetCatalog.clear()
    register(tmp_path, [labels_of(0, 3)])
    assert check_dataset.main(["maps"]) == 1
    assert "label maps have values that are not classes: 3" in capsys.readouterr().out
