# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""A count of the images that have more objects than an evaluation counts detections in an image."""

from collections.abc import Iterable
from typing import NamedTuple

from ...words import counted

DEFAULT_LIMIT = 100
"""The number of detections per image that Detectron2's networks give and that COCO's evaluation
counts, unless ``TEST.DETECTIONS_PER_IMAGE`` has another value."""


class Crowding(NamedTuple):
    """The objects of a data set beyond a limit of detections per image.

    Attributes:
        limit: the number of detections per image.
        images: the number of images with more objects than the limit.
        beyond: the number of objects beyond the limit, over all images.
        objects: the number of all objects.
        most: the largest number of objects in an image.
    """

    limit: int
    images: int
    beyond: int
    objects: int
    most: int

    def __str__(self) -> str:
        """Return a sentence without a full stop that says what to set."""
        images, have = counted(self.images, "images"), "has" if self.images == 1 else "have"
        return (
            f"{images} {have} more than {self.limit} objects, so {self.beyond:,} of the "
            f"{counted(self.objects, 'objects')} always count as missed: set "
            f"TEST.DETECTIONS_PER_IMAGE {self.most}"
        )


def measure_crowding(counts: Iterable[int], limit: int) -> Crowding | None:
    """Count the objects beyond a limit of detections per image. ``counts`` are the numbers of
    objects in the images, without crowds. Return None if no image has more objects than the limit.
    """
    numbers = list(counts)
    over = [number - limit for number in numbers if number > limit]
    return Crowding(limit, len(over), sum(over), sum(numbers), max(numbers)) if over else None
