# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""A miniature COCO with the real layout, file names and category ids. Its objects are shapes."""

import json
from pathlib import Path

import numpy as np
from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES
from PIL import Image

THINGS = [category for category in COCO_CATEGORIES if category["isthing"]]
# Ids of the categories in use, and the colours of their shapes. COCO's ids have gaps; these ids
# lie before and after such gaps.
COLORS = {1: (220, 30, 30), 13: (30, 200, 30), 90: (40, 60, 230)}


def write_coco_tree(
    root: Path, *, num_train: int = 6, num_val: int = 3, size: tuple[int, int] = (64, 80)
) -> Path:
    """Write ``root/coco/{train2017,val2017,annotations}``, and return ``root``.

    The second image has no annotations. The third image has a crowd. ``size`` is height and width
    in pixels."""
    folder = root / "coco"
    (folder / "annotations").mkdir(parents=True)
    for split, count, seed in (("train2017", num_train, 1), ("val2017", num_val, 2)):
        (folder / split).mkdir()
        rng = np.random.default_rng(seed)
        images, annotations = [], []
        for index in range(count):
            image_id = 1000 * seed + 7 * index + 1
            pixels = rng.integers(90, 130, (*size, 3)).astype(np.uint8)
            for shape in range(0 if index == 1 else 3):
                annotations.append(
                    _draw(pixels, rng, crowd=index == 2 and shape == 0)
                    | {"id": len(annotations) + 1, "image_id": image_id}
                )
            name = f"{image_id:012d}.jpg"
            Image.fromarray(pixels).save(folder / split / name, quality=95)
            images.append({"id": image_id, "file_name": name, "height": size[0], "width": size[1]})
        categories = [{"id": c["id"], "name": c["name"], "supercategory": "thing"} for c in THINGS]
        content = {"images": images, "annotations": annotations, "categories": categories}
        path = folder / "annotations" / f"instances_{split}.json"
        path.write_text(json.dumps(content))
    return root


def _draw(pixels: np.ndarray, rng: np.random.Generator, *, crowd: bool) -> dict:
    """Paint a rectangle and return its annotation: a polygon, or uncompressed RLE for a crowd."""
    height, width = pixels.shape[:2]
    h, w = int(rng.integers(14, 30)), int(rng.integers(14, 30))
    y, x = int(rng.integers(0, height - h)), int(rng.integers(0, width - w))
    category = int(rng.choice(list(COLORS)))
    pixels[y : y + h, x : x + w] = COLORS[category]
    annotation = {"category_id": category, "bbox": [x, y, w, h], "area": h * w}
    if not crowd:
        corners = [x, y, x + w, y, x + w, y + h, x, y + h]
        return annotation | {"iscrowd": 0, "segmentation": [[float(c) for c in corners]]}
    mask = np.zeros((height, width), dtype=bool)
    mask[y : y + h, x : x + w] = True
    flat = np.concatenate([[False], mask.ravel(order="F")])
    changes = np.flatnonzero(flat[1:] != flat[:-1])
    counts = np.diff(np.concatenate([[0], changes, [mask.size]])).tolist()
    return annotation | {"iscrowd": 1, "segmentation": {"size": [height, width], "counts": counts}}
