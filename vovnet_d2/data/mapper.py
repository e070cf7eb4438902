# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""From a record of a data set to the network's input, as the config says."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper
from detectron2.data import detection_utils as utils
from detectron2.data import transforms as T
from detectron2.structures import BoxMode

from .ssd_augmentation import ssd_augmentations

__all__ = ["SSDMapper", "build_augmentations", "build_mapper"]


def build_mapper(cfg: CfgNode, is_train: bool) -> DatasetMapper:
    """Detectron2's mapper, or with ``INPUT.SSD_AUGMENTATION`` in training, :class:`SSDMapper`.

    Raises:
        ValueError: see :func:`build_augmentations`.
    """
    ssd = is_train and cfg.INPUT.SSD_AUGMENTATION
    mapper = SSDMapper if ssd else DatasetMapper
    augmentations = build_augmentations(cfg, is_train)
    if is_train and cfg.INPUT.CROP.ENABLED:
        augmentations.insert(0, T.RandomCrop(cfg.INPUT.CROP.TYPE, cfg.INPUT.CROP.SIZE))
    return mapper(cfg, is_train, augmentations=augmentations)


def build_augmentations(cfg: CfgNode, is_train: bool) -> list[T.Augmentation]:
    """Detectron2's resizing and flipping; where ``INPUT.FIXED_SIZE`` is set, images are warped to a
    square of it instead, and ``INPUT.SSD_AUGMENTATION`` comes before the flipping.

    Raises:
        ValueError: SSD's augmentation without a fixed size, or with ``INPUT.CROP``.
    """
    augmentations = utils.build_augmentation(cfg, is_train)
    size = cfg.INPUT.FIXED_SIZE
    if is_train and cfg.INPUT.SSD_AUGMENTATION and (not size or cfg.INPUT.CROP.ENABLED):
        raise ValueError(
            "INPUT.SSD_AUGMENTATION crops and warps to a square: set INPUT.FIXED_SIZE to its side "
            "and INPUT.CROP.ENABLED False."
        )
    if not size:
        return augmentations
    flips = [a for a in augmentations if isinstance(a, T.RandomFlip)]
    if is_train and cfg.INPUT.SSD_AUGMENTATION:
        return [*ssd_augmentations(size, cfg.MODEL.PIXEL_MEAN, cfg.INPUT.FORMAT), *flips]
    return [T.Resize((size, size)), *flips]


class SSDMapper(DatasetMapper):
    """A :class:`DatasetMapper` for training whose augmentations see the boxes, crowds aside, and
    that leaves out what has its box's centre outside the result, as SSD does."""

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        """
        Args:
            dataset_dict: an image in Detectron2's format.

        Returns:
            the same with "image" (C, H, W) and "instances" instead of "annotations".
        """
        record = copy.deepcopy(dataset_dict)
        image = utils.read_image(record["file_name"], format=self.image_format)
        utils.check_image_size(record, image)
        annotations = [a for a in record.pop("annotations", []) if not a.get("iscrowd", 0)]
        boxes = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in annotations]
        corners = np.array(boxes, dtype=np.float64).reshape(-1, 4)

        aug_input = T.AugInput(image, boxes=corners)
        transforms = self.augmentations(aug_input)
        image = aug_input.image
        height, width = image.shape[:2]
        centres = transforms.apply_coords((corners[:, :2] + corners[:, 2:]) / 2)
        inside = ((centres > 0) & (centres < (width, height))).all(axis=1)
        record["annotations"] = [a for a, keep in zip(annotations, inside, strict=True) if keep]
        self._transform_annotations(record, transforms, (height, width))
        record["image"] = torch.as_tensor(np.ascontiguousarray(image.transpose(2, 0, 1)))
        return record
