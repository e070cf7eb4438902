# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""All code that reads, draws or saves images keeps red and blue in the right order."""

import base64
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import export_model
import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data import transforms as T
from detectron2.data.catalog import Metadata
from detectron2.data.datasets import register_coco_instances
from detectron2.structures import Boxes, Instances
from engine_runs import FASTER_RCNN, tiny_config
from PIL import Image
from torch import nn

from vovnet_d2.data.check.files import inspect_files
from vovnet_d2.data.classification import build_classification_dataset
from vovnet_d2.data.mapper import build_mapper
from vovnet_d2.demo.inputs import Pictures
from vovnet_d2.demo.outputs import PictureFiles, plan_pictures
from vovnet_d2.drawing.artist import Artist, Shown
from vovnet_d2.engine import pictures
from vovnet_d2.engine.data_pictures import (
    draw_annotations,
    draw_results,
    draw_training_samples,
    write_contact_sheet,
    write_pictures,
)
from vovnet_d2.predictor import Predictor
from vovnet_d2.report.detections import Detections
from vovnet_d2.report.images import draw_tile
from vovnet_d2.report.matching import ImageMatches

pytest_plugins = ["engine_fixtures"]

RED = (220, 40, 10)
BOX = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [2, 2, 4, 4], "area": 16, "iscrowd": 0}


class Blind(nn.Module):
    """Detector that finds nothing."""

    def forward(self, inputs: list[dict]) -> list[dict]:
        nothing = Instances((64, 80), scores=torch.zeros(0), pred_classes=torch.zeros(0).long())
        nothing.pred_boxes, nothing.pred_masks = Boxes(torch.zeros(0, 4)), torch.zeros(0, 64, 80)
        return [{"instances": nothing}] * len(inputs)


@pytest.fixture
def file(catalogs: None, tmp_path: Path) -> Path:
    """Save a red image, and register it as the data set "red"."""
    path = tmp_path / "red.png"
    Image.new("RGB", (80, 64), RED).save(path)
    content = {
        "images": [{"id": 1, "file_name": "red.png", "height": 64, "width": 80}],
        "annotations": [BOX],
        "categories": [{"id": 1, "name": "a"}],
    }
    (tmp_path / "red.json").write_text(json.dumps(content))
    (tmp_path / "found.json").write_text(json.dumps([{**BOX, "score": 0.9}]))
    register_coco_instances("red", {}, str(tmp_path / "red.json"), str(tmp_path))
    DatasetCatalog.get("red")
    return path


def config(file: Path, *options: str):
    options = ("DATASETS.TRAIN", "('red',)", "DATASETS.TEST", "('red',)", *options)
    return tiny_config(FASTER_RCNN, file.parent, "SOLVER.IMS_PER_BATCH", "1", *options)


def saved(path: Path) -> np.ndarray:
    return np.array(Image.open(path).convert("RGB"))


def network_input(file: Path, format: str, training: bool, *options: str) -> np.ndarray:
    cfg = config(file, "INPUT.FORMAT", format, *options)
    record = DatasetCatalog.get("red")[0]
    pixels = build_mapper(cfg, is_train=training)(record)["image"].permute(1, 2, 0).numpy()
    return pixels[:, :, ::-1] if format == "BGR" else pixels


def predictor_input(file: Path, format: str) -> np.ndarray:
    predictor = object.__new__(Predictor)
    predictor.cfg = config(file, "INPUT.FORMAT", format)
    predictor._resize = T.AugmentationList([])
    bgr = np.full((64, 80, 3), RED[::-1], np.uint8)
    pixels = predictor._to_input(bgr)["image"].permute(1, 2, 0).numpy()
    return pixels[:, :, ::-1] if format == "BGR" else pixels


def exported_input(file: Path, format: str) -> np.ndarray:
    (image,) = export_model._read_images(config(file, "INPUT.FORMAT", format), [str(file)])
    pixels = image[0].permute(1, 2, 0).numpy()
    return pixels[:, :, ::-1] if format == "BGR" else pixels


def picture_of_predictions(file: Path) -> np.ndarray:
    return saved(pictures.draw_predictions(config(file), Blind()))


def contact_sheet(file: Path) -> np.ndarray:
    write_contact_sheet(file.parent / "sheet.png", draw_annotations("red", number=1))
    return saved(file.parent / "sheet.png")


def written_picture(file: Path) -> np.ndarray:
    write_pictures(file.parent / "drawn", draw_annotations("red", number=1))
    return saved(file.parent / "drawn" / "001_red.png")


def results_beside_truth(file: Path) -> np.ndarray:
    (drawn,) = draw_results("red", file.parent / "found.json", number=1, min_score=0.5)
    return drawn.pixels


def training_sample(file: Path, format: str) -> np.ndarray:
    (drawn,) = draw_training_samples(config(file, "INPUT.FORMAT", format), number=1)
    return drawn.pixels


def tile_of_a_report(file: Path) -> np.ndarray:
    image = {"height": 64, "width": 80}
    truth = SimpleNamespace(cats={1: {"id": 1, "name": "a"}}, imgs={1: image})
    tile = draw_tile(Detections(truth, [], {1: str(file)}), ImageMatches(1, [BOX], [], []))
    return saved(io.BytesIO(base64.b64decode(tile.truth.partition(",")[2])))


def demo_picture(file: Path) -> np.ndarray:
    source = Pictures([str(file)])
    (frame,) = source.frames(pytest.fail)
    found = Blind()([{}])[0]["instances"]
    drawn = Artist(MetadataCatalog.get("red")).draw(frame.pixels, Shown(found, None, None))
    targets = plan_pictures(str(file.parent / "demo"), source.pictures)
    with PictureFiles(targets) as sink:
        sink.write(frame, drawn)
    return saved(targets[0])


def image_of_a_classifier(file: Path) -> np.ndarray:
    folder = file.parent / "classification" / "train" / "a"
    folder.mkdir(parents=True)
    shutil.copy(file, folder)
    ((image, _),) = build_classification_dataset(str(folder.parents[1]), "train")
    return np.array(image)


PLACES: dict[str, Callable[[Path], np.ndarray]] = {
    "picture of predictions": picture_of_predictions,
    "contact sheet": contact_sheet,
    "written picture": written_picture,
    "results beside the truth": results_beside_truth,
    "tile of a report": tile_of_a_report,
    "demo's picture": demo_picture,
    "image of a classifier": image_of_a_classifier,
}
for order in ("BGR", "RGB"):
    PLACES |= {
        f"training input, {order}": lambda file, f=order: network_input(file, f, True),
        f"evaluation input, {order}": lambda file, f=order: network_input(file, f, False),
        f"predictor's input, {order}": lambda file, f=order: predictor_input(file, f),
        f"input of an exported model, {order}": lambda file, f=order: exported_input(file, f),
        f"training sample, {order}": lambda file, f=order: training_sample(file, f),
    }


@pytest.mark.parametrize("place", PLACES)
def test_red_stays_red(file: Path, place: str) -> None:
    pixels = PLACES[place](file).reshape(-1, 3).astype(int)
    codes, counts = np.unique(pixels @ (1 << 16, 1 << 8, 1), return_counts=True)
    colours = codes[:, None] >> (16, 8, 0) & 255
    coloured = np.ptp(colours, axis=1) > 60  # neither background nor letters
    found = colours[coloured][counts[coloured].argmax()]
    assert np.abs(found - RED).max() <= 6, f"{found} for {RED}"


BLUE = (0, 114, 189)  # the first colour of Detectron2's colour map


def test_categories_without_colours_get_those_of_detectron2() -> None:
    """Check that the first category is blue, in a label map and as a box."""
    grey = np.full((64, 80, 3), 100, np.uint8)
    metadata = Metadata(stuff_classes=["a"], thing_classes=["a"])
    drawn = Artist(metadata).draw(grey, Shown(None, torch.zeros(64, 80).long(), None))
    change = drawn[..., ::-1].astype(int).mean(axis=(0, 1)) - 100
    direction = np.array(BLUE) - 100
    assert change @ direction > 0.95 * np.linalg.norm(change) * np.linalg.norm(direction)
    box = Boxes(torch.tensor([[10.0, 10, 60, 50]]))
    found = Instances((64, 80), pred_boxes=box, scores=torch.ones(1))
    found.pred_classes = torch.zeros(1).long()
    drawn = Artist(metadata).draw(grey, Shown(found, None, None))
    assert np.abs(drawn[50, 40, ::-1].astype(int) - BLUE).max() <= 1


def test_similar_images_are_found_by_perceived_brightness(tmp_path: Path) -> None:
    """Check that an image from red to blue becomes darker, because the eye sees red as brighter."""
    ramp = np.linspace(255, 0, 170).astype(np.uint8)
    pixels = np.zeros((160, 170, 3), np.uint8)
    pixels[..., 0], pixels[..., 2] = ramp, ramp[::-1]
    Image.fromarray(pixels).save(tmp_path / "a.png")
    (found,) = inspect_files([str(tmp_path / "a.png")], "").values()
    assert not found.look.any()
