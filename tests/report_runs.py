# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""The output folder of a training, made without training. The data set has rectangles of three
classes. Some of the predictions are right, some are wrong, and some are missing."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from detectron2.data.datasets import register_coco_instances
from PIL import Image
from pycocotools import mask as mask_util

DATASET = "shapes_val"
CLASSES = {2: "plain", 5: "with 'quotes' & <b>", 7: "数字 $x^$"}
SIZE = (240, 320)  # height, width
# The headings of the report page of such a run.
SECTIONS = [
    *["Results", "Training", DATASET, "Average precision by class and size"],
    *["Precision over recall", "Confusion matrix", "Best images", "Worst images", "Run", "Config"],
]
CONFIG: dict[str, Any] = {
    "DATASETS": {"TRAIN": ["shapes_train"], "TEST": [DATASET]},
    "MODEL": {"WEIGHTS": "timm://ese_vovnet19b_dw.ra_in1k"},
    "SOLVER": {"MAX_ITER": 100},
}


def write_run(
    root: Path, *, classes: dict[int, str] = CLASSES, dataset: str = DATASET, prefix: str = ""
) -> Path:
    """Write and register a data set below ``root``, and the files of a run that evaluated on it.

    Args:
        prefix: the beginning of the names of the image files.

    Returns:
        ``OUTPUT_DIR`` of the run.
    """
    truth, predictions = make_shapes(classes, prefix)
    images = root / "images"
    images.mkdir()
    for number, image in enumerate(truth["images"]):
        pixels = np.full((*SIZE, 3), 60 + 20 * number, dtype=np.uint8)
        Image.fromarray(pixels).save(images / image["file_name"])
    (root / "truth.json").write_text(json.dumps(truth))
    register_coco_instances(dataset, {}, str(root / "truth.json"), str(images))

    run = root / "run"
    (run / "inference").mkdir(parents=True)
    (run / "inference" / "coco_instances_results.json").write_text(json.dumps(predictions))
    config = {**CONFIG, "DATASETS": {"TRAIN": [], "TEST": [dataset]}}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    rows: list[dict[str, float]] = [
        {"iteration": i, "total_loss": 3 / i, "loss_cls": 2 / i, "loss_mask": 1 / i, "lr": 0.1}
        for i in range(19, 100, 20)
    ]
    rows += [{"iteration": i, "bbox/AP": float(i), "segm/AP": i / 2} for i in (50, 100)]
    (run / "metrics.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    content = {
        "run": {"config": "shapes.yaml", "weights": "none", "command": "python train_net.py"},
        "results": {dataset: {"sem_seg": {"mIoU": 43.21}}},
    }
    (run / "results.json").write_text(json.dumps(content))
    return run


def make_shapes(classes: dict[int, str], prefix: str = "") -> tuple[dict, list[dict]]:
    """Return annotations of nine images and predictions with masks and keypoints.

    The last image has no objects.
    """
    rng = np.random.default_rng(0)
    ids = list(classes)
    images, annotations, predictions = [], [], []
    for number in range(9):
        image_id = 10 * number + 3
        name = f"{prefix}{number}.png"
        images.append({"id": image_id, "file_name": name, "height": SIZE[0], "width": SIZE[1]})
        for _ in range(0 if number == 8 else 4):
            box = draw_box(rng)
            category = int(rng.choice(ids))
            annotations.append(
                {"id": len(annotations) + 1, "image_id": image_id, "category_id": category}
                | {"bbox": box, "area": box[2] * box[3], "iscrowd": 0, "num_keypoints": 17}
                | {"segmentation": [corners(box)], "keypoints": keypoints(box, 0, rng)}
            )
            if rng.random() < 0.8:
                moved = [side + float(rng.normal(0, 3)) for side in box]
                found = int(rng.choice(ids)) if rng.random() < 0.2 else category
                predictions.append(predict(image_id, found, moved, rng))
        predictions.append(predict(image_id, int(rng.choice(ids)), draw_box(rng), rng))
    annotations[0] |= {"iscrowd": 1}
    categories = [
        {"id": i, "name": name, "keypoints": [str(k) for k in range(17)], "skeleton": []}
        for i, name in classes.items()
    ]
    return {"images": images, "annotations": annotations, "categories": categories}, predictions


def draw_box(rng: np.random.Generator) -> list[float]:
    """Return a small, medium or large box as x, y, w, h."""
    w, h = rng.uniform(*[(14, 30), (40, 90), (100, 200)][rng.integers(3)], size=2)
    return [float(rng.uniform(2, SIZE[1] - w - 2)), float(rng.uniform(2, SIZE[0] - h - 2)), w, h]


def corners(box: list[float]) -> list[float]:
    x, y, w, h = box
    return [x, y, x + w, y, x + w, y + h, x, y + h]


def keypoints(box: list[float], noise: float, rng: np.random.Generator) -> list[float]:
    """Return 17 keypoints on the diagonal of a box."""
    places = np.linspace(0.1, 0.9, 17)[:, None] * box[2:] + box[:2]
    places = places + rng.normal(0, noise, places.shape) if noise else places
    return np.hstack([places, np.full((17, 1), 2.0)]).ravel().tolist()


def predict(image_id: int, category: int, box: list[float], rng: np.random.Generator) -> dict:
    (rle,) = mask_util.frPyObjects([corners(box)], *SIZE)
    return {
        "image_id": image_id,
        "category_id": category,
        "bbox": box,
        "score": float(rng.uniform(0.3, 1)),
        "segmentation": {"size": rle["size"], "counts": rle["counts"].decode()},
        "keypoints": keypoints(box, 0.03 * box[2], rng),
    }
