# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Each class of a label map has the same colour in all panels and images."""

from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from engine_runs import FASTER_RCNN
from matplotlib.figure import Figure
from PIL import Image
from torch import nn

from vovnet_d2.drawing import artist
from vovnet_d2.drawing.artist import Artist, Shown
from vovnet_d2.engine import load_config
from vovnet_d2.engine.data_pictures import draw_annotations
from vovnet_d2.engine.pictures import draw_predictions

pytest_plugins = ["engine_fixtures"]

SEMANTIC = "COCO-SemanticSegmentation/semantic_V_39_FPN_1x.yaml"
CLASSES = ["sky", "sea", "sand"]
LABELS = np.repeat(np.arange(3, dtype=np.uint8), [10, 20, 34])[:, None].repeat(80, axis=1)
Colors = dict[str, set]


class Oracle(nn.Module):
    def forward(self, inputs: list[dict]) -> list[dict]:
        scores = nn.functional.one_hot(torch.from_numpy(LABELS).long(), len(CLASSES))
        return [{"sem_seg": scores.permute(2, 0, 1).float()}]


@pytest.fixture
def colors(monkeypatch: pytest.MonkeyPatch) -> Colors:
    """Record the colours in which each class is drawn."""
    found: Colors = defaultdict(set)
    original = artist._draw_regions

    def record(canvas: np.ndarray, regions: list, font_size: int) -> None:
        for _, color, text in regions:
            found[text].add(tuple(color.tolist()))
        original(canvas, regions, font_size)

    monkeypatch.setattr(artist, "_draw_regions", record)
    return found


@pytest.fixture
def beach(catalogs: None, tmp_path: Path) -> str:
    records = []
    for name in "ab":
        files = tmp_path / f"{name}.jpg", tmp_path / f"{name}_labels.png"
        Image.new("RGB", (80, 64), (128, 128, 128)).save(files[0])
        Image.fromarray(LABELS).save(files[1])
        keys = ("file_name", "sem_seg_file_name")
        record = dict(zip(keys, map(str, files), strict=True))
        records.append(record | {"height": 64, "width": 80})
    DatasetCatalog.register("beach", lambda: records)
    MetadataCatalog.get("beach").set(stuff_classes=CLASSES, evaluator_type="sem_seg")
    return "beach"


def check_colors(colors: Colors) -> None:
    assert sorted(colors) == sorted(CLASSES)
    assert all(len(found) == 1 for found in colors.values())
    assert len(set.union(*colors.values())) == len(CLASSES)


@pytest.fixture
def titles(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record the titles of the drawn panels."""
    found: list[str] = []
    original = Figure.savefig

    def save(self: Figure, *args: object, **words: object) -> None:
        found.extend(panel.get_title() for panel in self.axes)
        original(self, *args, **words)

    monkeypatch.setattr(Figure, "savefig", save)
    return found


def draw_panels(config: str, tmp_path: Path) -> None:
    options = ["OUTPUT_DIR", str(tmp_path), "DATASETS.TEST", "('beach',)", "MODEL.DEVICE", "cpu"]
    assert draw_predictions(load_config(config, options), Oracle())


def test_truth_and_predictions(
    beach: str, tmp_path: Path, colors: Colors, titles: list[str]
) -> None:
    draw_panels(SEMANTIC, tmp_path)
    check_colors(colors)
    assert titles == ["ground truth · predictions"] * 2  # label maps have no scores


def test_titles_of_detections_name_the_score_threshold(
    beach: str, tmp_path: Path, titles: list[str]
) -> None:
    draw_panels(FASTER_RCNN, tmp_path)
    assert titles == ["ground truth · predictions (score ≥ 50%)"] * 2


def test_annotations(beach: str, colors: Colors) -> None:
    assert len(list(draw_annotations(beach, number=2))) == 2
    check_colors(colors)


def test_the_demo(beach: str, colors: Colors) -> None:
    drawer = Artist(MetadataCatalog.get(beach))
    for _ in range(2):
        drawer.draw(np.zeros((64, 80, 3), np.uint8), Shown(None, torch.from_numpy(LABELS), None))
    check_colors(colors)
