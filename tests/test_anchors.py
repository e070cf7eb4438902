# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Tests of --fit-anchors, which fits the sizes and ratios of anchors by k-means."""

import builtins
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_own_data
import torch
import yaml
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data import transforms as T
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.structures import Boxes, BoxMode, pairwise_iou
from engine_runs import FASTER_RCNN, RETINANET, TINY, quick, read_log
from test_own_data import BOTH, flags

from vovnet_d2.engine import argument_parser, fitting, load_config, run
from vovnet_d2.engine.anchors import (
    Anchors,
    Fit,
    TrainingBoxes,
    collect_boxes,
    fit_anchors,
    mean_best_iou,
    read_anchors,
)

pytest_plugins = ["engine_fixtures"]
digits = test_own_data.digits

RATIOS = [0.5, 1.0, 2.0]
FPN = Anchors([[32], [64], [128], [256], [512]], [RATIOS] * 5, [4, 8, 16, 32, 64], 0.0)


def draw_boxes(
    rng: np.random.Generator, number: int, scale: float = 60.0, spread: float = 0.6
) -> TrainingBoxes:
    """Return random boxes with sizes as in photographs, in images of many shapes."""
    sides = rng.integers(150, 400, (number, 2)).astype(float)
    spans = np.clip(scale * np.exp(rng.normal(0, spread, (number, 2))), 2, sides - 1)
    low = rng.uniform(0, 1, (number, 2)) * (sides - spans)
    classes = (rng.random(number) < 0.2).astype(int)
    return TrainingBoxes(np.concatenate([low, low + spans], axis=1), sides, classes)


def search(anchors: Anchors, boxes: TrainingBoxes) -> float:
    """Return the best IoU of a box with any of Detectron2's anchors, as a mean over classes."""
    generator = DefaultAnchorGenerator(
        sizes=anchors.sizes,
        aspect_ratios=anchors.ratios,
        strides=anchors.strides,
        offset=anchors.offset,
    )
    best = []
    for corners, (width, height) in zip(boxes.corners, boxes.sides, strict=True):
        maps = [
            torch.zeros(1, 1, int(-(-height // stride)), int(-(-width // stride)))
            for stride in anchors.strides
        ]
        every = Boxes.cat(generator(maps))
        best.append(pairwise_iou(Boxes(torch.tensor(corners[None])), every).max().item())
    by_class: dict[int, list[float]] = {}
    for number, value in zip(boxes.classes.tolist(), best, strict=True):
        by_class.setdefault(number, []).append(value)
    return float(np.mean(list(map(np.mean, by_class.values()))))


def test_the_iou_equals_that_of_a_search_over_all_anchors() -> None:
    rng = np.random.default_rng(0)
    octaves = [[size, size * 1.3, size * 1.6] for size in (20, 50, 90)]
    for anchors in (
        FPN,
        FPN._replace(offset=0.5, ratios=[[0.4, 1.7]] * 5),
        Anchors(octaves, [RATIOS] * 3, [8, 16, 32], 0.0),
        Anchors([[16.0, 40.0, 80.0]], [[1.0]], [16], 0.5),
    ):
        boxes = draw_boxes(rng, 40)
        assert mean_best_iou(anchors, boxes) == pytest.approx(search(anchors, boxes), abs=1e-6)


def squares(*sides: float, ratio: float = 1.0, each: int = 4) -> TrainingBoxes:
    """Return boxes of these sizes in the centre of 1024 × 1024 images, which suits every stride."""
    size = np.repeat(sides, each)
    half = np.stack([size / np.sqrt(ratio), size * np.sqrt(ratio)], axis=1) / 2
    centres = np.full((len(size), 2), 512.0)
    return TrainingBoxes(
        np.concatenate([centres - half, centres + half], axis=1),
        np.full((len(size), 2), 1024.0),
        np.zeros(len(size), int),
    )


def test_distinct_sizes_are_found() -> None:
    fit = fit_anchors(FPN, squares(20, 45, 100, 220, 480))
    assert fit.anchors.sizes == [[20], [45], [100], [220], [480]]
    assert fit.after == pytest.approx(1)
    assert fit.before == pytest.approx(
        np.mean([search(FPN, squares(s)) for s in (20, 45, 100, 220, 480)])
    )
    assert fit.num_boxes == 20
    ratios = TrainingBoxes(
        *(
            np.concatenate(parts)
            for parts in zip(
                *(squares(20, 45, 100, 220, 480, ratio=r) for r in (0.25, 1.0, 3.0)), strict=True
            )
        )
    )
    fit = fit_anchors(FPN, ratios)
    assert fit.anchors.ratios == [[0.25, 1, 3]] * 5
    assert fit.after == pytest.approx(1, abs=1e-3)
    assert fit.num_boxes == 60


def test_coarse_feature_maps_keep_large_anchors_if_objects_are_small() -> None:
    """Keep large anchors at stride 64, where anchors of 16 pixels would miss nearly all objects."""
    fit = fit_anchors(FPN, draw_boxes(np.random.default_rng(1), 200, scale=12))
    assert fit.anchors.sizes[-1] == [512]
    assert fit.anchors.sizes[0][0] < 20
    assert fit.after > fit.before


def test_rare_classes_count_as_much_as_a_frequent_one() -> None:
    """Fit anchors to many boxes of one class and few of two others, as in images of blood cells."""
    rng = np.random.default_rng(3)
    numbers, scales = (20, 800, 20), (20, 50, 100)
    parts = [draw_boxes(rng, *each, spread=0.1) for each in zip(numbers, scales, strict=True)]
    joined = [np.concatenate(each) for each in zip(*(part[:2] for part in parts), strict=True)]
    start = FPN._replace(sizes=[[12.0], [24.0], [40.0], [56.0], [80.0]])
    fit, of_one_class = (
        fit_anchors(start, TrainingBoxes(*joined, np.repeat(classes, numbers)))
        for classes in ([0, 1, 2], [0, 0, 0])
    )
    for part in parts[::2]:
        assert mean_best_iou(fit.anchors, part) > mean_best_iou(of_one_class.anchors, part) + 0.1
        assert mean_best_iou(fit.anchors, part) > mean_best_iou(start, part)


def test_a_fit_is_never_worse_and_never_changes_the_number() -> None:
    rng = np.random.default_rng(2)
    retinanet = Anchors([[20.0, 25, 30], [40, 50, 60]], [RATIOS] * 2, [8, 16], 0.0)
    for anchors in (FPN, retinanet):
        for scale in (5, 40, 150):
            boxes = draw_boxes(rng, 30, scale)
            fit = fit_anchors(anchors, boxes)
            assert fit.before == mean_best_iou(anchors, boxes)
            assert fit.after == mean_best_iou(fit.anchors, boxes) >= fit.before
            assert [len(sizes) for sizes in fit.anchors.sizes] == [
                len(sizes) for sizes in anchors.sizes
            ]
            assert [len(r) for r in fit.anchors.ratios] == [3] * len(anchors.ratios)
    # Fitted sizes are rounded to a tenth of a pixel, so they would be worse than these.
    perfect = FPN._replace(sizes=[[20.04], [45.04], [100.04], [220.04], [480.04]])
    fit = fit_anchors(perfect, squares(20.04, 45.04, 100.04, 220.04, 480.04))
    assert fit.anchors == perfect
    assert fit.before == fit.after
    assert fit_anchors(FPN, squares(50, each=6)).after == pytest.approx(1)  # one size for all


def test_too_few_boxes_and_no_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="needs at least 5 boxes, and finds 4"):
        fit_anchors(FPN, squares(50))
    load = builtins.__import__

    def without(name: str, *args: Any, **options: Any) -> Any:
        if name.startswith("sklearn"):
            raise ImportError(name)
        return load(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match="--fit-anchors needs scikit-learn: pip install"):
        fit_anchors(FPN, squares(50, 60))


def test_boxes_are_as_training_sees_them() -> None:
    def box(*corners: float, crowd: int = 0) -> dict[str, Any]:
        left, top, right, bottom = corners
        found = {"bbox": [left, top, right - left, bottom - top], "bbox_mode": BoxMode.XYWH_ABS}
        return found | {"iscrowd": crowd, "category_id": int(left > 0)}

    records = [
        {
            "height": 50,
            "width": 100,
            "annotations": [box(10, 20, 30, 50), box(0, 0, 9, 9, crowd=1)],
        },
        {
            "height": 80,
            "width": 40,
            # After resizing, the first box is one pixel high, and the second box is smaller.
            "annotations": [box(0, 0, 40, 0.4), box(0, 5, 40, 5.3), box(-5, 70, 20, 90)],
        },
        {"height": 8, "width": 8, "annotations": []},
    ]
    resize = T.AugmentationList([T.ResizeShortestEdge(100, 1000)])
    boxes = collect_boxes(records, resize)
    expected = {
        (20, 40, 60, 100, 200, 100, 1),
        (0, 0, 100, 1, 100, 200, 0),
        (0, 175, 50, 200, 100, 200, 0),
    }
    found = np.concatenate([boxes.corners, boxes.sides, boxes.classes[:, None]], axis=1)
    assert {tuple(row) for row in found.round(6).tolist()} == expected
    again = collect_boxes(records * 400, T.AugmentationList([T.RandomFlip()]))
    assert (
        again.corners == collect_boxes(records * 400, T.AugmentationList([T.RandomFlip()])).corners
    ).all()


def test_boxes_come_from_images_all_over_a_set() -> None:
    """Check which 500 of 1200 boxes are used. The position of a box is the number of its image."""
    records = [
        {
            "height": 50,
            "width": 2000,
            "annotations": [
                {"bbox": [i, 0, 20, 20], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0}
            ],
        }
        for i in range(1200)
    ]
    lefts = collect_boxes(records, T.AugmentationList([])).corners[:, 0]
    assert len(lefts) == len(set(lefts)) == 500
    assert np.histogram(lefts, bins=4, range=(0, 1200))[0].min() > 90


# Configs


def test_the_anchors_of_a_config() -> None:
    assert read_anchors(load_config(FASTER_RCNN)) == FPN
    cfg = load_config(RETINANET)
    anchors = read_anchors(cfg)
    assert (anchors.sizes, anchors.ratios) == (cfg.MODEL.ANCHOR_GENERATOR.SIZES, [RATIOS] * 5)
    assert anchors.strides == [8, 16, 32, 64, 128]
    refinedet = read_anchors(load_config("PascalVOC-Detection/refinedet320_V_39_120k.yaml"))
    assert refinedet.sizes == [[32], [64], [128], [256]]
    assert refinedet.strides == [8, 16, 32, 64]
    assert refinedet.offset == 0.5


@pytest.mark.parametrize(
    "config",
    [
        "COCO-Detection/fcos_V_39_eSE_FPN_1x.yaml",
        "PascalVOC-Detection/dsod300_V_27_slim_100k.yaml",
        "COCO-SemanticSegmentation/semantic_V_39_eSE_FPN_1x.yaml",
    ],
    ids=["fcos", "dsod", "semantic"],
)
def test_other_networks_are_refused(config: str) -> None:
    with pytest.raises(ValueError, match="does not: leave it out"):
        read_anchors(load_config(config))


# The command line


@pytest.mark.parametrize(
    ("sizes", "note"),
    [
        ([32, 50, 90, 256, 512], "stay for the coarsest 2 of 5 feature maps"),
        ([32, 64, 128, 256, 512], "stay for the coarsest 5 of 5 feature maps"),
        ([32, 64, 128, 256, 400], ""),
    ],
)
def test_the_reason_counts_the_coarsest_feature_maps_that_keep_their_sizes(
    monkeypatch: pytest.MonkeyPatch, sizes: list[int], note: str
) -> None:
    """Fit sizes of which the finest equals the earlier size by chance."""
    fit = Fit(FPN._replace(sizes=[[size] for size in sizes]), 7, 0.5, 0.6)
    monkeypatch.setattr(fitting, "fit_anchors", lambda *_: fit)
    monkeypatch.setattr(fitting, "collect_boxes", lambda *_: None)
    data = fitting.TrainingData(list, lambda: T.AugmentationList([]), lambda: FPN)
    reason = fitting._fit_anchors(FPN, [], data)["reason"]
    assert "stay for" in reason if note else "stay" not in reason
    assert reason.endswith(note)


def launch_own(root: Path, out: Path, *words: str, config: str = FASTER_RCNN) -> dict[str, Any]:
    options = [*TINY, "MODEL.DEVICE", "cpu", "INPUT.MIN_SIZE_TRAIN", "(96,)"]
    more = [word for word in words if not word.startswith("--")]
    given = [word for word in words if word.startswith("--")]
    args = ["--config-file", config, *flags(root, *BOTH), *given, *options, "OUTPUT_DIR", str(out)]
    with quick():
        return run(argument_parser().parse_args([*args, *more]))


@pytest.mark.parametrize("config", [FASTER_RCNN, RETINANET], ids=["faster", "retinanet"])
def test_a_training_with_fitted_anchors(
    catalogs: None, fresh_logging: None, digits: Path, tmp_path: Path, config: str
) -> None:
    out = tmp_path / "out"
    trained = launch_own(digits, out, "--fit-anchors", config=config)
    assert "k-means over " in read_log(out)
    saved = yaml.safe_load((out / "config.yaml").read_text())["MODEL"]["ANCHOR_GENERATOR"]
    record = json.loads((out / "fitted.json").read_text())["anchors"]
    assert (saved["SIZES"], saved["ASPECT_RATIOS"]) == (record["sizes"], record["ratios"])
    assert "boxes as training resizes them: mean best IoU 0." in record["reason"]
    before = load_config(config).MODEL.ANCHOR_GENERATOR.SIZES
    assert saved["SIZES"] != before
    # The sizes may go down where fitted sizes end, and the reason explains that.
    told = re.search(r"sizes, .*, stay for the coarsest (\d) of 5 f", record["reason"])
    assert told
    kept = int(told[1])
    assert saved["SIZES"][-kept:] == before[-kept:]
    assert saved["SIZES"][-kept - 1] != before[-kept - 1]
    assert trained.keys() == {"bbox"}


@pytest.mark.slow
def test_fitted_anchors_are_kept(
    catalogs: None, fresh_logging: None, digits: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    launch_own(digits, out, "--fit-anchors")
    record = json.loads((out / "fitted.json").read_text())
    record["anchors"]["sizes"][0] = [11.5]
    (out / "fitted.json").write_text(json.dumps(record))
    launch_own(digits, out, "--resume", "--fit-anchors")
    saved = yaml.safe_load((out / "config.yaml").read_text())["MODEL"]["ANCHOR_GENERATOR"]
    assert saved["SIZES"] == record["anchors"]["sizes"]
    with pytest.raises(ValueError, match=r"began with --fit-anchors.*: add it again"):
        launch_own(digits, out, "--resume")
    launch_own(digits, out, "--resume", config=str(out / "config.yaml"))  # it has the anchors


def test_contradictions(catalogs: None, fresh_logging: None, digits: Path, tmp_path: Path) -> None:
    launch_own(digits, tmp_path)
    for words, message in (
        (["--resume", "--fit-anchors"], "began without --fit-anchors.*: leave it out"),
        (["--eval-only", "--fit-anchors"], "give the config.yaml of that training"),
        (
            ["--fit-anchors", "MODEL.ANCHOR_GENERATOR.SIZES", "[[16]]"],
            "--fit-anchors and MODEL.ANCHOR_GENERATOR.SIZES both set",
        ),
    ):
        for catalog in (DatasetCatalog, MetadataCatalog):
            catalog.data.clear()
        with pytest.raises(ValueError, match=message):
            launch_own(digits, tmp_path, *words)
