# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Names with dollar signs do not change in pictures, although matplotlib can read formulas."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from coco_tree import COLORS
from detectron2.data.catalog import Metadata
from detectron2.data.datasets import register_coco_instances
from detectron2.structures import Boxes, Instances
from engine_runs import FASTER_RCNN, TINY, tiny_config
from matplotlib.mathtext import MathTextParser
from matplotlib.text import Text
from torch import nn

from vovnet_d2.benchmark.plots import plot_cell
from vovnet_d2.drawing import artist
from vovnet_d2.drawing.artist import Artist, Shown
from vovnet_d2.drawing.curves import draw_curves
from vovnet_d2.engine.data_pictures_command import main as visualize_data
from vovnet_d2.engine.pictures import draw_predictions

pytest_plugins = ["engine_fixtures"]

NAMES = ["$x^$", r"$\frac$", "50$ or 60$"]  # the first two are invalid formulas


@pytest.fixture
def no_formulas(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Fail if a text is read as a formula; return a list of all texts."""
    texts: list[str] = []
    set_text, render = Text.set_text, artist._render

    def record(self: Text, text: object) -> None:
        if str(text) != getattr(self, "_text", None):  # matplotlib may set the same text again
            texts.append(str(text))
        set_text(self, text)

    def refuse(self: MathTextParser, text: str, *_: object, **__: object) -> None:
        pytest.fail(f"{text!r} is read as a formula")

    def record_drawn(text: str, size: int) -> np.ndarray:
        texts.append(text)
        return render(text, size)

    monkeypatch.setattr(artist, "_render", record_drawn)
    monkeypatch.setattr(Text, "set_text", record)
    monkeypatch.setattr(MathTextParser, "parse", refuse)
    return texts


@pytest.fixture
def mine(coco: Path, tmp_path: Path) -> Path:
    """Register the miniature COCO with dollar signs in the names of categories and files."""
    content = json.loads((coco / "coco/annotations/instances_train2017.json").read_text())
    content["categories"] = [
        {"id": number, "name": name} for number, name in zip(COLORS, NAMES, strict=True)
    ]
    images = tmp_path / "images"
    images.mkdir()
    for image in content["images"]:
        source = coco / "coco/train2017" / image["file_name"]
        image["file_name"] = f"$_{image['id']}$.jpg"
        (images / image["file_name"]).write_bytes(source.read_bytes())
    (tmp_path / "a.json").write_text(json.dumps(content))
    register_coco_instances("mine", {}, str(tmp_path / "a.json"), str(images))
    return tmp_path


@pytest.mark.parametrize("what", ["annotations", "training", "results"])
def test_pictures_of_data(mine: Path, no_formulas: list[str], what: str) -> None:
    words = [what, str(mine / "sheet.png")]
    options = ["DATASETS.TRAIN", "('mine',)", "DATASETS.TEST", "('mine',)"]
    options += ["MODEL.ROI_HEADS.NUM_CLASSES", "3"]
    if what == "results":
        content = json.loads((mine / "a.json").read_text())
        found = [annotation | {"score": 0.9} for annotation in content["annotations"]]
        (mine / "found.json").write_text(json.dumps(found))
        words += ["--results", str(mine / "found.json")]
    config = ["--config-file", FASTER_RCNN, "--opts", *TINY, "MODEL.DEVICE", "cpu"]
    visualize_data([*words, *config, *options])
    for name in NAMES:
        assert any(name in text for text in no_formulas)
    assert any(text.startswith("$_") and text.endswith("$.jpg") for text in no_formulas)


class Found(nn.Module):
    """Detector that finds one object of each category."""

    def forward(self, records: list[dict]) -> list[dict]:
        found = Instances((64, 80))
        found.pred_boxes = Boxes(torch.tensor([[5.0, 5, 40, 40]] * len(NAMES)))
        found.scores = torch.full((len(NAMES),), 0.9)
        found.pred_classes = torch.arange(len(NAMES))
        return [{"instances": found} for _ in records]


def test_pictures_of_predictions(mine: Path, no_formulas: list[str]) -> None:
    cfg = tiny_config(FASTER_RCNN, mine, "DATASETS.TEST", "('mine',)")
    assert draw_predictions(cfg, Found())
    instances = Found()([{}])[0]["instances"]
    shown = Shown(instances=instances, labels=None, panoptic=None)
    Artist(Metadata(thing_classes=NAMES)).draw(np.zeros((64, 80, 3), np.uint8), shown)
    for name in NAMES:
        assert no_formulas.count(f"{name} 90%") == 5 + 1  # five images and the demo


@pytest.mark.parametrize("width", [1, 2, 3])
def test_pictures_of_a_few_columns(width: int) -> None:
    found = Instances((90, width))
    found.pred_boxes = Boxes(torch.tensor([[0.0, 5, width, 40]]))
    found.scores, found.pred_classes = torch.ones(1), torch.zeros(1, dtype=torch.int64)
    found.pred_masks = torch.ones(1, 90, width, dtype=torch.bool)
    labels = torch.zeros(90, width, dtype=torch.int64)
    picture = np.zeros((90, width, 3), np.uint8)
    drawn = Artist(Metadata(thing_classes=["a"], stuff_classes=["b"])).draw(
        picture, Shown(found, labels, None)
    )
    assert drawn.shape == picture.shape
    assert drawn.any()


def test_curves_of_a_data_set(tmp_path: Path, no_formulas: list[str]) -> None:
    rows = [{"iteration": 19, "total_loss": 1.0, "$x^$/bbox/AP": 20.0}]
    (tmp_path / "metrics.json").write_text("\n".join(map(json.dumps, rows)))
    assert draw_curves(str(tmp_path))
    assert "$x^$/bbox/AP" in no_formulas


def test_plots_of_a_benchmark(no_formulas: list[str], tmp_path: Path) -> None:
    row = {"network": "$x^$", "kind": "backbone", "treatment": "plain", "fps": 3.0, "gflops": 2.0}
    row |= {"gflops_per_second": 6.0, "joules_per_image": 1.0, "accuracy": None}
    figure, _ = plot_cell([row, row | {"fps": 99.0}], "on $_$")
    figure.savefig(tmp_path / "plot.png")
    assert {"$x^$", "on $_$"} <= set(no_formulas)
