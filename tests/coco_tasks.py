# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Keypoints and stuff, which COCO has beside boxes and masks, added to the miniature."""

import json
from pathlib import Path

import numpy as np
from detectron2.data.datasets.builtin_meta import COCO_PERSON_KEYPOINT_NAMES
from PIL import Image

NUM_KEYPOINTS = len(COCO_PERSON_KEYPOINT_NAMES)


def add_tasks(root: Path) -> None:
    """Add ``person_keypoints_*.json`` and ``panoptic_stuff_*`` to ``root/coco``."""
    folder = root / "coco"
    for split in ("train2017", "val2017"):
        instances = json.loads((folder / "annotations" / f"instances_{split}.json").read_text())
        _write_keypoints(folder / "annotations" / f"person_keypoints_{split}.json", instances)
        _write_stuff(folder / f"panoptic_stuff_{split}", instances)


def _write_keypoints(path: Path, instances: dict) -> None:
    """All objects are persons, their keypoints on the diagonals of their boxes."""
    along = np.linspace(0.1, 0.9, NUM_KEYPOINTS)
    annotations = []
    for annotation in instances["annotations"]:
        x, y, w, h = annotation["bbox"]
        across = np.where(np.arange(NUM_KEYPOINTS) % 2, along, 1 - along)
        points = np.stack([x + w * across, y + h * along, np.full(NUM_KEYPOINTS, 2)], axis=1)
        points[0] = 0  # not annotated
        annotations.append(
            annotation
            | {"category_id": 1, "keypoints": points.ravel().tolist()}
            | {"num_keypoints": NUM_KEYPOINTS - 1}
        )
    person = {"id": 1, "name": "person", "keypoints": list(COCO_PERSON_KEYPOINT_NAMES)}
    path.write_text(json.dumps({**instances, "annotations": annotations, "categories": [person]}))


def _write_stuff(folder: Path, instances: dict) -> None:
    """Label maps: 0 where an object is; else 1 and 2 above and below; a column is not labelled."""
    folder.mkdir()
    for image in instances["images"]:
        labels = np.ones((image["height"], image["width"]), dtype=np.uint8)
        labels[image["height"] // 2 :] = 2
        labels[:, 0] = 255
        for annotation in instances["annotations"]:
            if annotation["image_id"] == image["id"]:
                x, y, w, h = annotation["bbox"]
                labels[y : y + h, x : x + w] = 0
        Image.fromarray(labels).save(folder / image["file_name"].replace(".jpg", ".png"))
