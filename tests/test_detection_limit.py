# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Images with more objects than an evaluation counts: their AP, its headers, and warnings."""

import argparse
import json
from pathlib import Path

import pytest
import torch
from coco_tree import THINGS
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.catalog import Metadata
from detectron2.data.datasets import register_coco_instances
from detectron2.structures import Boxes, BoxMode, Instances
from PIL import Image
from pycocotools.coco import COCO
from torch import nn

from vovnet_d2.engine import Trainer, build_evaluator, load_config
from vovnet_d2.engine.detection_limit import evaluated_detections, explain_crowding
from vovnet_d2.engine.rehearsal import rehearse_evaluation
from vovnet_d2.engine.report import write_report
from vovnet_d2.report.average_precision import evaluate
from vovnet_d2.report.detections import Detections

pytest_plugins = ["engine_fixtures"]

COUNTS = {1: 130, 2: 20, 3: 3}  # objects per image; the first image also has a crowd
APIS = ("pycocotools", "faster-coco-eval")
# The AP at 101 recalls from 0 to 1 if the precision is 1 up to a recall of 123 / 153.
LIMITED = 100 * sum(i / 100 <= 123 / 153 for i in range(101)) / 101


@pytest.fixture
def crowded(catalogs: None, tmp_path: Path) -> str:
    annotations = []
    for image_id, count in COUNTS.items():
        for index in range(count + (image_id == 1)):
            box = [14 * (index % 14), 14 * (index // 14), 10, 10]
            x, y = box[:2]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": 1,
                    "bbox": box,
                    "area": 100,
                    "iscrowd": int(index == 130),
                    "segmentation": [[x, y, x + 10, y, x + 10, y + 10, x, y + 10]],
                }
            )
    images = [
        {"id": number, "file_name": f"{number}.png", "height": 200, "width": 200}
        for number in COUNTS
    ]
    for image in images:
        Image.new("L", (200, 200)).save(tmp_path / image["file_name"])
    content = {"images": images, "annotations": annotations}
    path = tmp_path / "crowded.json"
    path.write_text(json.dumps(content | {"categories": [{"id": 1, "name": "cell"}]}))
    register_coco_instances("crowded", {}, str(path), str(tmp_path))
    return "crowded"


def config(tmp_path: Path, limit: int, *options: str, api: str = "auto") -> CfgNode:
    words = ["OUTPUT_DIR", str(tmp_path), "DATASETS.TEST", "('crowded',)", *options]
    words += ["MODEL.ROI_HEADS.NUM_CLASSES", "1", "TEST.COCO_API", api, "MODEL.DEVICE", "cpu"]
    return load_config("", [*words, "TEST.DETECTIONS_PER_IMAGE", str(limit)])


def find_all(record: dict) -> Instances:
    """Return a perfect prediction for each object."""
    objects = [a for a in record["annotations"] if not a["iscrowd"]]
    boxes = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in objects]
    found = Instances((record["height"], record["width"]))
    found.pred_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32))
    found.scores = torch.ones(len(objects))
    found.pred_classes = torch.zeros(len(objects), dtype=torch.long)
    return found


def evaluate_all(cfg: CfgNode) -> float:
    evaluator = build_evaluator(cfg, "crowded")
    evaluator.reset()
    for record in DatasetCatalog.get("crowded"):
        evaluator.process([record], [{"instances": find_all(record)}])
    return evaluator.evaluate()["bbox"]["AP"]


@pytest.mark.parametrize("api", APIS)
def test_the_limit_reaches_the_evaluation_and_its_headers(
    crowded: str,
    tmp_path: Path,
    api: str,
    capsys: pytest.CaptureFixture,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    for limit, expected, counted in ((100, LIMITED, 100), (130, 100, 130), (10, LIMITED, 100)):
        capsys.readouterr()
        caplog.clear()
        assert evaluate_all(config(tmp_path, limit, api=api)) == pytest.approx(expected), limit
        text = capsys.readouterr().out + caplog.text
        lines = [line for line in text.splitlines() if "maxDets=" in line]
        headers = [int(line.partition("maxDets=")[2].split()[0]) for line in lines]
        averages = [line for line in lines if "Average Precision" in line]
        assert len(averages) == 6
        assert set(headers[:6]) == {counted}
        assert sorted(set(headers)) == [1, 10, counted]
        assert f"evaluated by {api}, with {counted} detections per image." in caplog.text


def test_the_faster_api_is_used_with_any_limit(
    crowded: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check that faster-coco-eval is used for a limit other than 100, unlike in Detectron2."""
    monkeypatch.setattr("pycocotools.cocoeval.COCOeval.evaluate", lambda self: 1 / 0)
    cfg = config(tmp_path, 130, api="faster-coco-eval")
    assert evaluate_all(cfg) == pytest.approx(100)


def test_pycocotools_takes_over_with_the_same_limit(
    crowded: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = "vovnet_d2.engine.faster_coco.FasterCOCOeval.evaluate"
    monkeypatch.setattr(path, lambda self: 1 / 0)
    assert evaluate_all(config(tmp_path, 130)) == pytest.approx(100)
    assert "pycocotools takes over" in caplog.text


def test_data_with_the_categories_of_coco_have_the_limit_of_coco() -> None:
    """Check that COCO is evaluated with 100 detections, as in papers, whatever the limit."""
    ids = {category["id"]: number for number, category in enumerate(THINGS)}
    coco = Metadata(name="coco", thing_dataset_id_to_contiguous_id=ids)
    other = Metadata(name="other", thing_dataset_id_to_contiguous_id={1: 0})
    assert [evaluated_detections(n, coco) for n in (50, 100, 500)] == [100] * 3
    assert [evaluated_detections(n, other) for n in (50, 100, 500)] == [100, 100, 500]


@pytest.mark.parametrize("api", APIS)
def test_the_page_uses_the_limit_of_the_run(crowded: str, tmp_path: Path, api: str) -> None:
    truth = COCO(MetadataCatalog.get(crowded).json_file if DatasetCatalog.get(crowded) else "")
    results = [
        {"image_id": a["image_id"], "category_id": 1, "bbox": a["bbox"], "score": 1.0}
        for a in truth.dataset["annotations"]
        if not a["iscrowd"]
    ]
    detections = Detections(truth, results, {})
    assert evaluate(detections, "bbox", api).metrics()["AP"] == pytest.approx(LIMITED)
    found = evaluate(detections, "bbox", api, limit=130)
    assert found.metrics()["AP"] == pytest.approx(100)


SENTENCE = (
    "1 image has more than 100 objects, so 30 of the 153 objects always count as missed: "
    "set TEST.DETECTIONS_PER_IMAGE 130"
)


def test_objects_beyond_the_limit_are_logged_before_the_run(
    crowded: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rehearse_evaluation(config(tmp_path, 100), Trainer)
    assert f"Data set crowded: {SENTENCE}." in caplog.text
    assert "Perfect predictions for 3 images of crowded score bbox AP 80." in caplog.text
    caplog.clear()
    rehearse_evaluation(config(tmp_path, 130), Trainer)
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    # The network returns fewer detections than the evaluation counts.
    rehearse_evaluation(config(tmp_path, 20), Trainer)
    assert "1 image has more than 20 objects, so 110 of the 153 objects" in caplog.text
    assert "score bbox AP 28." in caplog.text  # 43 of 153


@pytest.mark.parametrize("proposals", ["130", "131"])
def test_too_few_proposals_are_a_warning(crowded: str, tmp_path: Path, proposals: str) -> None:
    cfg = config(tmp_path, 100, "MODEL.RPN.POST_NMS_TOPK_TEST", proposals)
    said = explain_crowding(cfg, DatasetCatalog.get(crowded))
    more = ", and MODEL.RPN.POST_NMS_TOPK_TEST above its 130" if proposals == "130" else ""
    assert said == SENTENCE + more
    cfg.MODEL.META_ARCHITECTURE = "RetinaNet"
    assert explain_crowding(cfg, DatasetCatalog.get(crowded)) == SENTENCE


def test_objects_beyond_the_limit_are_in_the_results(crowded: str, tmp_path: Path) -> None:
    args = argparse.Namespace(config_file="", eval_only=True)
    boxes = {"bbox": {"AP": LIMITED}}
    write_report(config(tmp_path, 100), nn.Identity(), boxes, args=args, seconds=1.0)
    content = json.loads((tmp_path / "results.json").read_text())
    assert content["notes"] == [f"crowded: {SENTENCE}."]
    assert f"crowded: {SENTENCE}." in (tmp_path / "results.md").read_text()
    write_report(config(tmp_path, 130), nn.Identity(), boxes, args=args, seconds=1.0)
    assert "notes" not in json.loads((tmp_path / "results.json").read_text())
