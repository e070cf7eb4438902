#!/usr/bin/env python
# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Evaluate a detector of digits on mosaics of its validation images, without tiles and with them.

    python benchmarks/tiles_on_digits.py --config-file output/demo/config.yaml \\
        --weights output/demo/model_final.pth --work output/mosaics

A mosaic is made of 3×3 images, so it has three times the height and width of what the detector was
trained on, and is brought to that size for the detector. Tiles have the size of one image.
"""

from __future__ import annotations

import argparse
import json
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from PIL import Image

from vovnet_d2.data import register_digits
from vovnet_d2.engine import argument_parser, run

COUNT = 3  # images in a row of a mosaic


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True)
    parser.add_argument("--weights", required=True)
    parser.add_argument("--work", type=Path, required=True, help="folder for mosaics and results")
    args = parser.parse_args()
    side = write_mosaics(args.work)
    for name, tiles in (("whole", "()"), ("tiles", f"({side}, {side})")):
        words = ["--config-file", args.config_file, "--eval-only"]
        words += ["--val-json", str(args.work / "mosaics.json")]
        words += ["--val-images", str(args.work)]
        words += ["MODEL.WEIGHTS", args.weights, "MODEL.DEVICE", "cpu", "TEST.TILES", tiles]
        words += ["OUTPUT_DIR", str(args.work / name), "DATALOADER.NUM_WORKERS", "0"]
        words += ["TEST.DETECTIONS_PER_IMAGE", "100"]
        results = run(argument_parser().parse_args(words))
        for task, metrics in results.items():
            figures = (f"{key} {metrics[key]:.1f}" for key in ("AP", "AP50", "APs", "APm", "APl"))
            print(f"{name} {task}: {', '.join(figures)}", flush=True)


def write_mosaics(folder: Path) -> int:
    """Write the mosaics of digits_val and their annotations; return the side of one image."""
    register_digits()
    records = iter(DatasetCatalog.get("digits_val"))
    names = MetadataCatalog.get("digits_val").thing_classes
    folder.mkdir(parents=True, exist_ok=True)
    content: dict[str, list[Any]] = {
        "images": [],
        "annotations": [],
        "categories": [{"id": i, "name": name} for i, name in enumerate(names, start=1)],
    }
    while len(nine := list(islice(records, COUNT * COUNT))) == COUNT * COUNT:
        number = len(content["images"]) + 1
        pixels = [np.asarray(Image.open(record["file_name"]).convert("RGB")) for record in nine]
        side = len(pixels[0])
        mosaic = np.zeros((COUNT * side, COUNT * side, 3), np.uint8)
        for index, (record, image) in enumerate(zip(nine, pixels, strict=True)):
            y, x = (side * place for place in divmod(index, COUNT))
            mosaic[y : y + side, x : x + side] = image
            content["annotations"] += [_moved(a, x, y, number) for a in record["annotations"]]
        name = f"{number:06d}.png"
        Image.fromarray(mosaic).save(folder / name)
        entry = {"id": number, "file_name": name, "height": COUNT * side, "width": COUNT * side}
        content["images"].append(entry)
    for number, annotation in enumerate(content["annotations"], start=1):
        annotation["id"] = number
    (folder / "mosaics.json").write_text(json.dumps(content))
    return side


def _moved(annotation: dict[str, Any], x: int, y: int, image: int) -> dict[str, Any]:
    box = BoxMode.convert(annotation["bbox"], annotation["bbox_mode"], BoxMode.XYWH_ABS)
    polygons = [
        np.add(np.reshape(polygon, (-1, 2)), (x, y)).ravel().tolist()
        for polygon in annotation["segmentation"]
    ]
    return {
        "image_id": image,
        "category_id": annotation["category_id"] + 1,
        "bbox": [box[0] + x, box[1] + y, *box[2:]],
        "area": box[2] * box[3],
        "iscrowd": 0,
        "segmentation": polygons,
    }


if __name__ == "__main__":
    main()
