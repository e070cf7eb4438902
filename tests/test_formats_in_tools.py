# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""The check and the drawing of annotations in formats other than COCO."""

import json
import re
from pathlib import Path

import check_dataset
import pytest
from test_formats import image, voc, voc_object, write

from vovnet_d2.data.formats import FORMATS
from vovnet_d2.engine import argument_parser
from vovnet_d2.engine.data_pictures_command import main as visualize

pytest_plugins = ["engine_fixtures"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Write two parts in VOC's layout. In the first, an image is missing and a box is swapped."""
    root = tmp_path / "cells"
    boxes = {"a": (9, 2, 30, 40), "b": (30, 2, 9, 40), "gone": (1, 1, 9, 9), "c": (1, 1, 70, 49)}
    for index, (name, box) in enumerate(boxes.items()):
        write(root / "Annotations" / f"{name}.xml", voc(voc_object("cell", *box)))
        if name != "gone":
            image(root / "JPEGImages" / f"{name}.jpg")
            (root / "JPEGImages" / f"{name}.jpg").open("ab").write(bytes([index]))  # all differ
    write(root / "ImageSets" / "Main" / "train.txt", "a\nb\ngone\n")
    write(root / "ImageSets" / "Main" / "val.txt", "c\n")
    return root


def test_the_help_of_each_tool_lists_the_formats() -> None:
    for parser in (check_dataset.argument_parser(), argument_parser()):
        lines = parser.format_help().splitlines()
        assert {f"  {known.title}: {known.example}" for known in FORMATS.values()} <= set(lines)


def test_the_check(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    words = ["--train-annotations", str(folder), "--val-annotations", str(folder)]
    fixed = tmp_path / "train.json", tmp_path / "val.json"
    assert check_dataset.main([*words, "--fix", *map(str, fixed)]) == 1
    told = capsys.readouterr().out
    assert f"{folder}: PASCAL VOC XML, 3 images, 3 objects; " in told
    assert "1 boxes have their corners swapped and are corrected; first: " in told
    assert f"train: {folder}\n  1 category, 3 images, 3 annotations\n" in told
    assert f"val: {folder}\n  1 category, 1 image, 1 annotation\n" in told
    assert re.search("error +1  image files that are missing", told)
    content = json.loads(fixed[0].read_text())
    assert [image["file_name"] for image in content["images"]] == ["a.jpg", "b.jpg"]
    assert [annotation["bbox"] for annotation in content["annotations"]] == [[8, 1, 22, 39]] * 2


def test_drawing_writes_no_other_files(
    catalogs: None,
    fresh_logging: None,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    config = "COCO-Detection/faster_rcnn_V_19_slim_eSE_FPN_3x.yaml"
    visualize(["annotations", "drawn", "--config-file", config, "--val-annotations", str(folder),
               "--train-annotations", str(folder / "ImageSets" / "Main" / "val.txt")])  # fmt: skip
    assert "Drew 1 pictures of own_train to drawn." in capsys.readouterr().out
    made = {path.name for path in (tmp_path / "here").rglob("[!.]*")}
    assert made == {"drawn", "001_c.png"}
