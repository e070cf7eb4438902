# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""The mapper turns a record of a data set into the network's input."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper
from detectron2.data import detection_utils as utils
from detectron2.data import transforms as T
from detectron2.structures import BoxMode

from ..errors import UserValueError
from .image_file import read_image, read_labels
from .ssd_augmentation import ssd_augmentations


def build_mapper(cfg: CfgNode, is_train: bool) -> Mapper:
    """Build the mapper of a config. It is an :class:`SSDMapper` in a training with
    ``INPUT.SSD_AUGMENTATION``. Raise ValueError, see :func:`build_augmentations`."""
    ssd = is_train and cfg.INPUT.SSD_AUGMENTATION
    mapper = SSDMapper if ssd else Mapper
    augmentations = build_augmentations(cfg, is_train)
    if is_train and cfg.INPUT.CROP.ENABLED:
        augmentations.insert(0, _RandomCrop(cfg.INPUT.CROP.TYPE, cfg.INPUT.CROP.SIZE))
    return mapper(cfg, is_train, augmentations=augmentations)


def build_augmentations(cfg: CfgNode, is_train: bool) -> list[T.Augmentation]:
    """Build the augmentations of a config, which are Detectron2's resizing and flipping by default.
    ``INPUT.FIXED_SIZE`` replaces the resizing: images are warped to a square.
    ``INPUT.SSD_AUGMENTATION`` comes before the flipping. Very thin images keep at least one pixel
    in each direction, which Detectron2's resizing does not guarantee.

    Raise ValueError for SSD's augmentation without a fixed size, or with ``INPUT.CROP``.
    """
    augmentations = [_leaving_a_pixel(a) for a in utils.build_augmentation(cfg, is_train)]
    size = cfg.INPUT.FIXED_SIZE
    if is_train and cfg.INPUT.SSD_AUGMENTATION and (not size or cfg.INPUT.CROP.ENABLED):
        raise UserValueError(
            "INPUT.SSD_AUGMENTATION crops and warps to a square: set INPUT.FIXED_SIZE to its side "
            "and INPUT.CROP.ENABLED False."
        )
    if not size:
        return augmentations
    flips = [a for a in augmentations if isinstance(a, T.RandomFlip)]
    if is_train and cfg.INPUT.SSD_AUGMENTATION:
        return [*ssd_augmentations(size, cfg.MODEL.PIXEL_MEAN, cfg.INPUT.FORMAT), *flips]
    return [T.Resize((size, size)), *flips]


class Mapper(DatasetMapper):
    """A :class:`DatasetMapper` that reads files by :mod:`~vovnet_d2.data.image_file`. It keeps at
    least one pixel of very thin images in each direction."""

    augmentations: T.AugmentationList

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        augmentations = [_leaving_a_pixel(augmentation) for augmentation in self.augmentations.augs]
        self.augmentations = T.AugmentationList(augmentations)

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        """Read the image of a record in Detectron2's format, augment it and return the input of the
        network: the record with "image" (C, H, W). In training it has "instances" instead of
        "annotations", and "sem_seg" (H, W), int64, instead of "sem_seg_file_name"."""
        record = copy.deepcopy(dataset_dict)
        image = read_image(record["file_name"], self.image_format)
        utils.check_image_size(record, image)
        label_file = record.pop("sem_seg_file_name", None)
        labels = read_labels(label_file) if label_file and self.is_train else None
        image, labels, transforms = self._augment(record, image, labels)
        record["image"] = torch.as_tensor(np.ascontiguousarray(image.transpose(2, 0, 1)))
        if labels is not None:
            record["sem_seg"] = torch.as_tensor(labels)
        shape = image.shape[:2]
        if self.proposal_topk is not None:
            utils.transform_proposals(record, shape, transforms, proposal_topk=self.proposal_topk)
        if not self.is_train:
            record.pop("annotations", None)
        elif "annotations" in record:
            self._transform_annotations(record, transforms, shape)
        return record

    def _augment(
        self, record: dict[str, Any], image: np.ndarray, labels: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray | None, T.TransformList]:
        # Labels must not be averaged. Detectron2 takes nearest neighbours for 8 bits only, so
        # labels above 255 are transformed as two bytes.
        low = None if labels is None else (labels & 0xFF).astype(np.uint8)
        aug_input = T.AugInput(image, sem_seg=low)
        transforms = self.augmentations(aug_input)
        if labels is None:
            return aug_input.image, None, transforms
        found = aug_input.sem_seg.astype(np.int64)
        if labels.max(initial=0) > 0xFF:
            high = transforms.apply_segmentation((labels >> 8).astype(np.uint8))
            found += high.astype(np.int64) << 8
        return aug_input.image, found, transforms


def _leaving_a_pixel(augmentation: T.Augmentation) -> T.Augmentation:
    """Return an augmentation that keeps at least one pixel in each direction. Only Detectron2's
    ``ResizeShortestEdge`` is replaced; every other augmentation is returned itself."""
    if type(augmentation) is not T.ResizeShortestEdge:
        return augmentation
    sizes = list(augmentation.short_edge_length)
    style = "range" if augmentation.is_range else "choice"
    return _ResizeShortestEdge(sizes, augmentation.max_size, style, augmentation.interp)


class _ResizeShortestEdge(T.ResizeShortestEdge):
    def get_transform(self, image: np.ndarray) -> T.Transform:
        transform = super().get_transform(image)
        if isinstance(transform, T.ResizeTransform):
            transform.new_h, transform.new_w = max(1, transform.new_h), max(1, transform.new_w)
        return transform


class _RandomCrop(T.RandomCrop):
    """Detectron2's crop, which takes at least one pixel."""

    def get_crop_size(self, image_size: tuple[int, int]) -> tuple[int, int]:
        height, width = super().get_crop_size(image_size)
        return max(1, height), max(1, width)


class AugmentedTestMapper:
    """Makes the inputs of test-time augmentation as Detectron2's ``DatasetMapperTTA`` does. It
    keeps at least one pixel of very thin images in each direction."""

    def __init__(self, min_sizes: Sequence[int], max_size: int, *, flip: bool):
        """Take ``TEST.AUG.MIN_SIZES``, ``MAX_SIZE`` and ``FLIP``."""
        resizes = [_ResizeShortestEdge(size, max_size) for size in min_sizes]
        flips: list[list[T.Augmentation]] = [[], [T.RandomFlip(prob=1.0)]]
        self._augmentations = [
            T.AugmentationList([resize, *more]) for resize in resizes for more in flips[: 1 + flip]
        ]

    def __call__(self, record: dict[str, Any]) -> list[dict[str, Any]]:
        """Return the augmented inputs of the network for an image.

        Args:
            record: a record with "image" (C, H, W), and "height" and "width" of the picture as it
                is read.

        Returns:
            for each size, and with flips also for its mirror image, a copy of the record with the
                augmented "image" and the "transforms" that lead from the picture to it.
        """
        pixels = record["image"].permute(1, 2, 0).numpy()
        resized = T.ResizeTransform(record["height"], record["width"], *pixels.shape[:2])
        found = []
        for augmentations in self._augmentations:
            aug_input = T.AugInput(pixels.copy())
            transforms = augmentations(aug_input)
            image = torch.from_numpy(np.ascontiguousarray(aug_input.image.transpose(2, 0, 1)))
            found.append({**record, "image": image, "transforms": resized + transforms})
        return found


class SSDMapper(Mapper):
    """A :class:`Mapper` for training whose augmentations get the boxes of objects. As in SSD, it
    leaves out objects whose centre is outside the augmented image. It also leaves out crowds."""

    def _augment(
        self, record: dict[str, Any], image: np.ndarray, labels: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray | None, T.TransformList]:
        annotations = [a for a in record.get("annotations", []) if not a.get("iscrowd", 0)]
        boxes = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in annotations]
        corners = np.array(boxes, dtype=np.float64).reshape(-1, 4)

        aug_input = T.AugInput(image, boxes=corners)
        transforms = self.augmentations(aug_input)
        height, width = aug_input.image.shape[:2]
        centres = transforms.apply_coords((corners[:, :2] + corners[:, 2:]) / 2)
        inside = ((centres > 0) & (centres < (width, height))).all(axis=1)
        record["annotations"] = [a for a, keep in zip(annotations, inside, strict=True) if keep]
        return aug_input.image, None, transforms
