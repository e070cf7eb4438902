# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Images with more objects than an evaluation counts detections."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from ...words import counted

__all__ = ["DEFAULT_LIMIT", "Crowding", "measure_crowding"]

DEFAULT_LIMIT = 100
"""The detections of an image that Detectron2's networks give and COCO's evaluation counts, unless
``TEST.DETECTIONS_PER_IMAGE`` says otherwise."""


class Crowding(NamedTuple):
    """What of a data set lies beyond a limit of detections per image.

    Attributes:
        limit: detections per image.
        images: with more objects than that.
        beyond: objects beyond the limit, over all images.
        objects: all there are.
        most: objects in one image.
    """

    limit: int
    images: int
    beyond: int
    objects: int
    most: int

    def __str__(self) -> str:
        """Say it in a sentence without a full stop, and what to set."""
        images, have = counted(self.images, "images"), "has" if self.images == 1 else "have"
        return (
            f"{images} {have} more than {self.limit} objects, so {self.beyond:,} of the "
            f"{counted(self.objects, 'objects')} count as missed whatever a network finds: set "
            f"TEST.DETECTIONS_PER_IMAGE {self.most}"
        )


def measure_crowding(counts: Iterable[int], limit: int) -> Crowding | None:
    """
    Args:
        counts: of objects, crowds aside, in each image.
        limit: detections per image.

    Returns:
        None if no image has more objects than that.
    """
    numbers = list(counts)
    over = [number - limit for number in numbers if number > limit]
    return Crowding(limit, len(over), sum(over), sum(numbers), max(numbers)) if over else None
