# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Run detectors on the tiles of large images, so that small objects keep their pixels."""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from detectron2.data import transforms as T
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn
from torchvision.ops import batched_nms

from .errors import UserValueError

MAX_IOU = 0.5
"""The overlap (IoU) of two boxes of one category above which the less likely one is left out."""

_BORDER = 0.01
"""A box touches the border of its tile within this share of the tile's side."""


class Tile(NamedTuple):
    """A part of an image, in pixels: from row ``top`` to before ``bottom``, likewise columns."""

    top: int
    left: int
    bottom: int
    right: int


def check_tiles(tiles: Sequence[int], overlap: float) -> None:
    """Raise ValueError unless ``tiles`` are two sides in pixels and the overlap is from 0 to below
    1."""
    if len(tiles) != 2 or any(not isinstance(side, int) or side < 1 for side in tiles):
        raise UserValueError(
            f"Tiles of {tiles} cannot be cut: give a height and a width in pixels, such as "
            "(640, 640)."
        )
    if not 0 <= overlap < 1:
        raise UserValueError(
            f"The overlap of tiles is {overlap}: give a share of their side from 0 to below 1."
        )


def cut_tiles(height: int, width: int, tiles: Sequence[int], overlap: float) -> list[Tile]:
    """Cut an image into tiles of one size (height and width), or smaller where the image is.

    The tiles are spread evenly. The first and the last tile of a row or column touch the borders of
    the image. A tile overlaps the next one by at least the share ``overlap`` of its side.
    """
    rows, columns = (
        list(_cut_side(side, tile, overlap))
        for side, tile in zip((height, width), tiles, strict=True)
    )
    return [Tile(y0, x0, y1, x1) for y0, y1 in rows for x0, x1 in columns]


def _cut_side(side: int, tile: int, overlap: float) -> Iterator[tuple[int, int]]:
    tile = min(side, tile)
    step = max(1, math.floor(tile * (1 - overlap)))
    number = 1 + math.ceil((side - tile) / step)
    for index in range(number):
        start = index * (side - tile) // max(1, number - 1)
        yield start, start + tile


class TiledDetector(nn.Module):
    """A detector that runs on the tiles of an image and on the whole image.

    An object that is larger than the overlap of two tiles may be whole in neither. So a detection
    that touches a border of its tile inside the image is left out: the next tile, or the whole
    image, shows all of the object. What remains is merged by non-maximum suppression within each
    category.
    """

    def __init__(
        self,
        model: nn.Module,
        tiles: Sequence[int],
        overlap: float,
        *,
        resize: T.Augmentation,
        batch_size: int = 8,
    ):
        """
        Args:
            model: one of Detectron2's detectors, in evaluation mode.
            tiles: height and width of a tile, in pixels of the image.
            overlap: see :func:`cut_tiles`.
            resize: resizes a tile, or the whole image, for the detector.
            batch_size: the largest number of tiles to run at once.

        Raises:
            ValueError: see :func:`check_tiles`.
        """
        super().__init__()
        check_tiles(tiles, overlap)
        self.model = model
        self.tiles = tuple(tiles)
        self.overlap = overlap
        self.resize = resize
        self.batch_size = batch_size
        self.train(model.training)

    def forward(self, batched_inputs: Sequence[dict[str, Any]]) -> list[dict[str, Instances]]:
        """Detect objects in each image, tile by tile.

        Args:
            batched_inputs: dicts with "image" (C, H, W), in the size of the image file.

        Returns:
            "instances" of each image, in its coordinates, the likeliest first. An image has at most
            as many of them as the detector finds in all its tiles together.

        Raises:
            ValueError: the detector returns something else than instances.
        """
        return [{"instances": self._detect(inputs["image"])} for inputs in batched_inputs]

    def _detect(self, image: Tensor) -> Instances:
        height, width = image.shape[1:]
        tiles = cut_tiles(height, width, self.tiles, self.overlap)
        if len(tiles) > 1:
            tiles.append(Tile(0, 0, height, width))
        pixels = image.permute(1, 2, 0).cpu().numpy()
        found: list[Instances] = []
        for index in range(0, len(tiles), self.batch_size):
            chunk = tiles[index : index + self.batch_size]
            outputs = self.model([self._to_input(pixels, tile) for tile in chunk])
            found += map(_instances_of, outputs)
        found = [_leave_out_cut(*pair, (height, width)) for pair in zip(found, tiles, strict=True)]
        return self._merge(found, tiles, (height, width))

    def _to_input(self, pixels: np.ndarray, tile: Tile) -> dict[str, Any]:
        part = T.AugInput(pixels[tile.top : tile.bottom, tile.left : tile.right])
        self.resize(part)
        image = np.ascontiguousarray(part.image.transpose(2, 0, 1))
        return {
            "image": torch.as_tensor(image),
            "height": tile.bottom - tile.top,
            "width": tile.right - tile.left,
        }

    def _merge(self, found: list[Instances], tiles: list[Tile], size: tuple[int, int]) -> Instances:
        if len(tiles) == 1:
            return found[0]
        boxes = torch.cat(
            [_shift(i.pred_boxes.tensor, t) for i, t in zip(found, tiles, strict=True)]
        )
        scores = torch.cat([instances.scores for instances in found])
        classes = torch.cat([instances.pred_classes for instances in found])
        kept = batched_nms(boxes, scores, classes, MAX_IOU)
        merged = Instances(size, pred_boxes=Boxes(boxes[kept]), scores=scores[kept])
        merged.pred_classes = classes[kept]
        # Masks are as large as the image, so only those that are kept are put into it.
        place = [(i, j) for i, instances in enumerate(found) for j in range(len(instances))]
        chosen = [place[index] for index in kept.tolist()]
        for name in set(found[0].get_fields()) - set(merged.get_fields()):
            merged.set(name, _gather(name, found, tiles, chosen, size))
        return merged


def _instances_of(output: dict[str, Any]) -> Instances:
    if output.keys() != {"instances"}:
        raise UserValueError(
            f"Tiles are merged for detections only, and this network returns {', '.join(output)}: "
            "run it without tiles."
        )
    return output["instances"]


def _leave_out_cut(instances: Instances, tile: Tile, size: tuple[int, int]) -> Instances:
    """Leave out the detections that touch a border of their tile inside the image."""
    x0, y0, x1, y1 = _shift(instances.pred_boxes.tensor, tile).unbind(1)
    high, wide = _BORDER * (tile.bottom - tile.top), _BORDER * (tile.right - tile.left)
    cut = torch.zeros_like(x0, dtype=torch.bool)
    if tile.top > 0:
        cut |= y0 <= tile.top + high
    if tile.left > 0:
        cut |= x0 <= tile.left + wide
    if tile.bottom < size[0]:
        cut |= y1 >= tile.bottom - high
    if tile.right < size[1]:
        cut |= x1 >= tile.right - wide
    return instances[~cut]


def _shift(boxes: Tensor, tile: Tile) -> Tensor:
    """Move boxes (N, 4) from the coordinates of a tile to the coordinates of the image."""
    return boxes + boxes.new_tensor([tile.left, tile.top, tile.left, tile.top])


def _gather(
    name: str,
    found: list[Instances],
    tiles: list[Tile],
    chosen: list[tuple[int, int]],
    size: tuple[int, int],
) -> Tensor:
    """Gather a field of the chosen detections, in the coordinates of the image. ``chosen`` has for
    each detection the index of its tile, and its index in that tile."""
    if name != "pred_masks":
        values = [found[i].get(name)[j] for i, j in chosen]
        stacked = torch.stack(values) if values else found[0].get(name)[:0]
        if name == "pred_keypoints":  # (N, K, 3): x, y and score
            corners = [[tiles[i].left, tiles[i].top, 0] for i, _ in chosen]
            stacked = stacked + stacked.new_tensor(corners).view(-1, 1, 3)
        return stacked
    masks = torch.zeros(len(chosen), *size, dtype=torch.bool, device=found[0].pred_masks.device)
    for mask, (i, j) in zip(masks, chosen, strict=True):
        top, left, bottom, right = tiles[i]
        mask[top:bottom, left:right] = found[i].pred_masks[j]
    return masks
