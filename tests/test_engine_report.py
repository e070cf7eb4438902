# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
import argparse
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, Instances
from engine_runs import FASTER_RCNN, RETINANET, tiny_config
from matplotlib.figure import Figure
from PIL import Image
from torch import nn

from vovnet_d2.drawing import curves
from vovnet_d2.drawing.curves import draw_curves, read_metrics
from vovnet_d2.engine.pictures import draw_predictions
from vovnet_d2.engine.report import format_results, write_report

pytest_plugins = ["engine_fixtures"]

BOX = {"AP": 12.345, "AP50": 50.0, "AP75": 1.0, "APs": math.nan, "APm": 2.0, "APl": 3.0}


def read_cells(table: str) -> list[list[str]]:
    rows = [line for line in table.splitlines() if line.startswith("|") and "--" not in line]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def test_one_row_for_each_task(tmp_path: Path) -> None:
    without_75 = {**BOX, "AP75": -100.0}  # as for LVIS
    results = {"bbox": {**BOX, "AP-dog": 7.0}, "segm": without_75, "sem_seg": {"mIoU": 33.3}}
    assert read_cells(format_results(tiny_config(FASTER_RCNN, tmp_path), results)) == [
        ["data", "task", "AP", "AP50", "AP75", "APs", "APm", "APl"],
        ["coco_2017_val", "bbox", "12.35", "50.00", "1.00", "–", "2.00", "3.00"],
        ["coco_2017_val", "segm", "12.35", "50.00", "–", "–", "2.00", "3.00"],
        ["data", "task", "mIoU"],
        ["coco_2017_val", "sem_seg", "33.30"],
    ]


def test_several_data_sets(tmp_path: Path) -> None:
    cfg = tiny_config(FASTER_RCNN, tmp_path, "DATASETS.TEST", "('a', 'b')")
    cells = read_cells(format_results(cfg, {"a": {"bbox": BOX}, "b": {"bbox": BOX}}))
    assert [row[:2] for row in cells] == [["data", "task"], ["a", "bbox"], ["b", "bbox"]]


@pytest.mark.parametrize(
    ("config", "threshold"),
    [
        (FASTER_RCNN, "MODEL.ROI_HEADS.SCORE_THRESH_TEST 0.05"),
        (RETINANET, "MODEL.RETINANET.SCORE_THRESH_TEST 0.05"),
    ],
)
def test_no_predictions_are_explained(
    coco: Path, tmp_path: Path, config: str, threshold: str
) -> None:
    options = ["MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.05"]
    options += ["MODEL.RETINANET.SCORE_THRESH_TEST", "0.05"]
    cfg = tiny_config(config, tmp_path, *options)
    for missing in (math.nan, -1.0):  # the values of COCO and of LVIS
        text = format_results(cfg, {"bbox": dict.fromkeys(BOX, missing)})
        assert f"no predictions above the score threshold ({threshold}) on coco_2017_val" in text
        assert f"{missing:.2f}" not in text


def test_data_without_annotations_is_explained(catalogs: None, tmp_path: Path) -> None:
    DatasetCatalog.register("empty", lambda: [{"annotations": []}])
    cfg = tiny_config(FASTER_RCNN, tmp_path, "DATASETS.TEST", "('empty',)")
    text = format_results(cfg, {"bbox": dict.fromkeys(BOX, math.nan)})
    assert "empty has no annotated objects" in text
    assert "empty has no annotations to compare" in format_results(cfg, {})


def test_nothing_evaluated(tmp_path: Path) -> None:
    cfg = tiny_config(FASTER_RCNN, tmp_path, "DATASETS.TEST", "()")
    assert format_results(cfg, {}) == "Nothing was evaluated."


def write_metrics(folder: Path, rows: list[dict]) -> str:
    path = folder / "metrics.json"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_metrics_of_a_later_run_replace_earlier_ones(tmp_path: Path) -> None:
    rows = [{"iteration": i, "total_loss": float(i), "lr": 0.1} for i in (19, 39, 59)]
    rows[2]["time"] = 0.5  # the resumed run has not written this value yet
    # The evaluation of iteration 29 is written after the losses of iteration 39.
    rows.insert(2, {"iteration": 29, "bbox/AP": 5.0})
    resumed = [{"iteration": 39, "total_loss": 100.0}, {"iteration": 60, "bbox/AP": 6.0}]
    series = read_metrics(write_metrics(tmp_path, rows + resumed))
    assert series["total_loss"] == [(19, 19.0), (39, 100.0)]
    assert series["bbox/AP"] == [(29, 5.0), (60, 6.0)]
    assert series["lr"] == [(19, 0.1)]
    assert series.keys() == {"total_loss", "bbox/AP", "lr"}


def test_a_line_that_a_kill_has_cut_is_skipped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    whole = [json.dumps({"iteration": i, "total_loss": 1.0}) for i in range(4)]
    # The resumed run appends to the rest of the cut line, and is cut, too.
    path.write_text("\n".join([whole[0], whole[1][:20] + whole[1], whole[2], whole[3][:-1]]))
    assert read_metrics(str(path)) == {"total_loss": [(0, 1.0), (2, 1.0)]}


def test_the_marker_of_a_single_evaluation_is_not_cut() -> None:
    """Check that the panel begins at 0 and has space above the marker."""
    panel = Figure().subplots()
    curves._draw_panel(panel, {"bbox/AP": [(599, 59.0)]}, "AP →")
    low, high = panel.get_ylim()
    assert low == 0
    assert high > 1.03 * 59


def test_curves_are_only_drawn_if_there_are_losses(tmp_path: Path) -> None:
    assert draw_curves(str(tmp_path)) is None
    write_metrics(tmp_path, [{"iteration": 9, "bbox/AP": 5.0}])
    assert draw_curves(str(tmp_path)) is None
    rows = [{"iteration": i, "total_loss": 2.0, "loss_cls": 1.0} for i in range(5)]
    write_metrics(tmp_path, rows)
    with_losses = Image.open(draw_curves(str(tmp_path))).size
    write_metrics(tmp_path, [*rows, {"iteration": 5, "bbox/AP": 5.0, "bbox/APs": 1.0}])
    with_scores = Image.open(draw_curves(str(tmp_path))).size
    assert with_scores[0] == with_losses[0]
    assert with_scores[1] > with_losses[1]  # there is one more panel


class Oracle(nn.Module):
    """Detector that finds one green object with a given score."""

    def __init__(self, score: float):
        super().__init__()
        self.score = score

    def forward(self, inputs: list[dict]) -> list[dict]:
        assert not self.training
        assert not torch.is_grad_enabled()
        instances = Instances((64, 80))
        instances.pred_boxes = Boxes(torch.tensor([[10.0, 10.0, 50.0, 50.0]]))
        instances.scores = torch.tensor([self.score])
        instances.pred_classes = torch.tensor([1])
        return [{"instances": instances}]


def test_predictions_are_drawn_beside_the_truth(catalogs: None, tmp_path: Path) -> None:
    Image.new("RGB", (80, 64), (128, 128, 128)).save(tmp_path / "a.png")
    record = {"file_name": str(tmp_path / "a.png"), "height": 64, "width": 80, "annotations": []}
    DatasetCatalog.register("mine", lambda: [record])
    MetadataCatalog.get("mine").set(thing_classes=["a", "b"])
    cfg = tiny_config(FASTER_RCNN, tmp_path, "DATASETS.TEST", "('mine',)")

    pictures = {}
    for score in (0.9, 0.5, 0.49, 0.1):
        model = Oracle(score)
        pictures[score] = np.array(Image.open(draw_predictions(cfg, model)).convert("L"))
        assert model.training
    assert np.array_equal(pictures[0.49], pictures[0.1])  # not drawn
    assert not np.array_equal(pictures[0.5], pictures[0.49])
    different = pictures[0.9] != pictures[0.1]
    columns = np.flatnonzero(different.any(axis=0)) / different.shape[1]
    # Annotations are on the left, and predictions are on the right.
    assert 0.5 < columns.min() < columns.max() < 1
    assert (
        draw_predictions(tiny_config(FASTER_RCNN, tmp_path, "DATASETS.TEST", "()"), model) is None
    )


def test_an_empty_data_set_has_no_picture(catalogs: None, tmp_path: Path) -> None:
    DatasetCatalog.register("empty", list)
    cfg = tiny_config(FASTER_RCNN, tmp_path, "DATASETS.TEST", "('empty',)")
    assert draw_predictions(cfg, Oracle(0.9)) is None


@pytest.mark.parametrize(
    ("earlier", "told"),
    [(0, "1:02:05"), (86400, "1 day, 1:02:05, of which 1:02:05 since --resume")],
)
def test_wall_time_covers_the_whole_training(
    catalogs: None, tmp_path: Path, earlier: float, told: str
) -> None:
    cfg = tiny_config(FASTER_RCNN, tmp_path, "DATASETS.TEST", "()", "MODEL.WEIGHTS", "a.pth")
    args = argparse.Namespace(config_file="", eval_only=False)
    times = {"seconds": 3725.4, "earlier_seconds": earlier}
    write_report(cfg, Oracle(0.9), {}, args=args, **times, length="9 iterations")
    run = json.loads((tmp_path / "results.json").read_text())["run"]
    assert run["wall time"] == told
    assert run["kind"] == "training, 9 iterations"
    assert run["weights"] == "a.pth"


def test_results_are_written_if_a_picture_fails(
    catalogs: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    DatasetCatalog.register("gone", lambda: [{"file_name": "gone.png", "annotations": [{}]}])
    cfg = tiny_config(FASTER_RCNN, tmp_path, "DATASETS.TEST", "('gone',)")
    write_metrics(tmp_path, [{"iteration": 0, "total_loss": 1.0}])
    args = argparse.Namespace(config_file="", eval_only=True)
    write_report(cfg, Oracle(0.9), {"bbox": BOX}, args=args, seconds=1.0)
    assert (
        json.loads((tmp_path / "results.json").read_text())["results"]["gone"]["bbox"]["AP50"] == 50
    )
    report = (tmp_path / "results.md").read_text()
    assert "12.35" in report
    assert "![](loss_curve.png)" in report
    assert "predictions.png" not in report
    warning = next(record for record in caplog.records if record.levelname == "WARNING")
    assert "missing in the report" in warning.message
    assert issubclass(warning.exc_info[0], FileNotFoundError)
