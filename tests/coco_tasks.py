# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Add COCO's annotations of keypoints and stuff to the miniature of :mod:`coco_tree`."""

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
    """Write every object as a person whose keypoints lie on a diagonal of its box."""
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
    """Write label maps of stuff.

    Pixels of objects are 0. Other pixels are 1 in the upper half and 2 in the lower half. The first
    column is not labelled.
    """
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
