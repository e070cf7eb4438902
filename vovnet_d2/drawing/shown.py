# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Turn annotated images, training samples and results into what the artist draws."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.data.catalog import Metadata
from detectron2.structures import Boxes, BoxMode, Instances, PolygonMasks
from pycocotools import mask as mask_util

from ..data.check.masks import has_mask
from ..data.image_file import read_labels
from ..data.records import find_absurd
from ..errors import UserValueError
from .artist import Shown, name_of

logger = logging.getLogger(__name__)

Record = Mapping[str, Any]
Size = tuple[int, int]  # height and width of the image


def objects(
    annotations: Sequence[Record], texts: Sequence[str], size: Size, mode: BoxMode | None = None
) -> Instances:
    """Return annotations as objects to draw.

    Args:
        annotations: in COCO's format, or in Detectron2's. "category_id" is the index of a name.
        texts: a label for each.
        mode: the mode of the boxes; by default the "bbox_mode" of each annotation.
    """
    boxes = [
        BoxMode.convert(
            list(map(float, a["bbox"])), a["bbox_mode"] if mode is None else mode, BoxMode.XYXY_ABS
        )
        for a in annotations
    ]
    found = Instances(size, texts=list(texts))
    found.pred_boxes = Boxes(torch.tensor(boxes).reshape(-1, 4))
    found.pred_classes = torch.tensor([a["category_id"] for a in annotations], dtype=torch.int64)
    found.pred_masks = [
        _encode(a["segmentation"], size) if has_mask(a) else None for a in annotations
    ]
    points = [a.get("keypoints") or [] for a in annotations]
    if most := max(map(len, points), default=0):
        padded = [[*p, *[0] * (most - len(p))] for p in points]
        found.pred_keypoints = torch.tensor(padded).reshape(len(padded), -1, 3)
    return found


def _encode(mask: Any, size: Size) -> Any:
    """Return the RLE of a mask: polygons, an RLE, or an array (H, W)."""
    if isinstance(mask, np.ndarray):
        return mask_util.encode(np.asfortranarray(mask, dtype=np.uint8))
    if isinstance(mask, Mapping):
        return mask_util.frPyObjects(mask, *size) if isinstance(mask["counts"], list) else mask
    polygons = [list(p) for p in mask if len(p) >= 6 and len(p) % 2 == 0]
    return mask_util.merge(mask_util.frPyObjects(polygons, *size))


def from_record(record: Record, size: Size, metadata: Metadata) -> Shown:
    """Return the annotations of a record, which training reads in the same way. Objects with
    impossible numbers are named in the log and left out.

    Raises:
        FileNotFoundError: the file of the label map is missing.
        ValueError: the label map cannot be read, or has another size.
    """
    height, width = size
    kept = []
    for index, annotation in enumerate(record.get("annotations", [])):
        if problem := find_absurd(annotation, width, height):
            logger.warning("Object %d of %s has %s.", index, record["file_name"], problem)
        else:
            kept.append(annotation)
    names = metadata.get("thing_classes", [])
    crowd = ["|crowd" if a.get("iscrowd", 0) else "" for a in kept]
    texts = [name_of(a["category_id"], names) + more for a, more in zip(kept, crowd, strict=True)]
    labels = None
    if "sem_seg_file_name" in record:
        labels = torch.from_numpy(read_labels(file := record["sem_seg_file_name"]))
        if labels.shape != size:
            sizes = " and ".join(f"{s[1]} x {s[0]}" for s in (labels.shape, size))
            raise UserValueError(f"{file} is not of the size of its picture: {sizes} pixels.")
    return Shown(objects(kept, texts, size), labels)


def from_sample(sample: Record) -> Shown:
    """Return what training is given of an image: a dict of Detectron2's data loader."""
    found = None
    if "instances" in sample:
        given = sample["instances"]
        found = Instances(
            given.image_size, pred_boxes=given.gt_boxes, pred_classes=given.gt_classes
        )
        if given.has("gt_masks"):
            masks = given.gt_masks
            if isinstance(masks, PolygonMasks):
                found.pred_masks = [_encode(p, given.image_size) if p else None for p in masks]
            else:
                found.pred_masks = masks.tensor
        if given.has("gt_keypoints"):
            found.pred_keypoints = given.gt_keypoints.tensor
    return Shown(found, sample.get("sem_seg"))


def from_results(results: Sequence[Record], size: Size, metadata: Metadata) -> Shown:
    """Return results in COCO's format, whose "category_id" is the index of a name."""
    names = metadata.get("thing_classes", [])
    texts = [f"{name_of(r['category_id'], names)} {r['score']:.0%}" for r in results]
    return Shown(objects(results, texts, size, BoxMode.XYWH_ABS))
