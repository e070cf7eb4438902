# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: NPY002 (Detectron2 seeds the global generator)
"""Copy-paste augmentation (arXiv 2012.07177) puts objects of one training image into another
one."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.structures import BitMasks, Instances, PolygonMasks
from torch import Tensor

from ..errors import UserValueError

_FIELDS = {"gt_boxes", "gt_classes", "gt_masks"}


class CopyPaste:
    """Wraps a mapper, and pastes objects of another image into some images.

    The other image goes through the same mapper, with its own random scale and flip. A random
    number of its objects, at least one, are pasted at the same locations (section 3). All random
    numbers come from NumPy's global generator.
    """

    def __init__(
        self,
        mapper: Callable[[dict[str, Any]], dict[str, Any] | None],
        records: Sequence[dict[str, Any]],
        probability: float,
    ):
        """
        Args:
            mapper: makes samples with "image" and "instances", which have masks. It may return
                None for an image that cannot be read.
            records: the data set from which the other images are drawn.
            probability: the probability of pasting objects into an image.

        Raises:
            ValueError: the probability is not between 0 and 1.
        """
        if not 0 <= probability <= 1:
            raise UserValueError(
                f"INPUT.COPY_PASTE is {probability}: give a probability between 0 and 1."
            )
        self.mapper = mapper
        self.records = records
        self.probability = probability

    def __call__(self, record: dict[str, Any]) -> dict[str, Any] | None:
        """Return the sample of a record, with or without objects of another image. Raise ValueError
        if the objects have no masks, or have keypoints."""
        sample = self.mapper(record)
        if sample is None or np.random.uniform() >= self.probability:
            return sample
        other = self.mapper(self.records[np.random.randint(len(self.records))])
        if other is None or not len(other["instances"]):
            return sample
        number = len(other["instances"])
        chosen = np.random.permutation(number)[: np.random.randint(1, number + 1)]
        return paste_objects(sample, other, torch.from_numpy(chosen))


def paste_objects(
    sample: dict[str, Any], other: dict[str, Any], chosen: Tensor, *, min_visible: float = 0.1
) -> dict[str, Any]:
    """Paste objects of one sample into another one, at the same locations.

    The masks of covered objects are cut, and the boxes of all objects become the bounds of their
    masks. An object is left out if too small a part of it stays visible. An object is not pasted if
    too large a part of it would be outside the image.

    Args:
        sample: the sample with "image" (C, H, W) and "instances"; it is not changed.
        other: the sample with the objects. Its image may have another size.
        chosen: the indices of the objects to paste.
        min_visible: the share of an object's pixels that must stay visible.

    Returns:
        a sample with a new "image" and new "instances", whose masks are bitmasks.
    """
    height, width = sample["image"].shape[1:]
    source, masks = other["image"][:, :height, :width], _read_masks(other)[chosen]
    rows, columns = source.shape[1:]
    pasted = masks.new_zeros(len(masks), height, width)
    pasted[:, :rows, :columns] = masks[:, :height, :width]
    whole = _is_visible(pasted, masks, min_visible)
    pasted, chosen = pasted[whole], chosen[whole]
    cover = pasted.any(dim=0)

    image = sample["image"].clone()
    part = image[:, :rows, :columns]
    part.copy_(torch.where(cover[:rows, :columns], source, part))
    before = _read_masks(sample)
    left = before & ~cover
    kept = _is_visible(left, before, min_visible)
    instances = Instances((height, width))
    instances.gt_masks = BitMasks(torch.cat([left[kept], pasted]))
    instances.gt_boxes = instances.gt_masks.get_bounding_boxes()
    instances.gt_classes = torch.cat(
        [sample["instances"].gt_classes[kept], other["instances"].gt_classes[chosen]]
    )
    return {**sample, "image": image, "instances": instances}


def _read_masks(sample: dict[str, Any]) -> Tensor:
    """Return the masks of the objects of a sample, (objects, H, W), boolean."""
    instances = sample["instances"]
    fields = instances.get_fields().keys()
    if not fields <= _FIELDS or (len(instances) and "gt_masks" not in fields):
        raise UserValueError(
            f"Copy-paste needs objects with {', '.join(sorted(_FIELDS))}, and these have "
            f"{', '.join(sorted(fields))}: train a network that learns masks and no keypoints, or "
            "set INPUT.COPY_PASTE 0."
        )
    size = sample["image"].shape[1:]
    if not len(instances):
        return torch.zeros(0, *size, dtype=torch.bool)
    masks = instances.gt_masks
    if isinstance(masks, PolygonMasks):
        masks = BitMasks.from_polygon_masks(masks, *size)
    return masks.tensor


def _is_visible(left: Tensor, before: Tensor, share: float) -> Tensor:
    """Return True for each mask that keeps enough of its pixels, (objects,), boolean."""
    pixels = left.flatten(1).sum(dim=1)
    return (pixels > 0) & (pixels >= share * before.flatten(1).sum(dim=1))
