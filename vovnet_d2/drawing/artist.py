# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Draw objects, label maps and segments on pictures by OpenCV.

Detectron2's visualizer draws by matplotlib, which takes several times as long as a small network.
"""

import math
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import matplotlib
import numpy as np
import torch
from detectron2.data.catalog import Metadata
from detectron2.structures import Instances
from detectron2.utils.colormap import colormap
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from pycocotools import mask as mask_util

Pixels = NDArray[np.uint8]

_FONT = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
_MIN_FONT_SIZE = 12  # pixels
_MIN_KEYPOINT_SCORE = 0.05  # as Detectron2's visualizer has it
_MOST_TEXT = 0.2  # part of a picture that labels may cover before some are left out


class Shown(NamedTuple):
    """The content to draw on a picture, on the CPU. Any part may be None.

    Attributes:
        instances: objects in Detectron2's output format. Scores and masks may be missing. Masks may
            also be a list of pycocotools' RLEs, with None for objects without a mask. A field
            "texts" has labels that take the place of names and scores.
        labels: (H, W), the index of each pixel's category in ``stuff_classes``. Other numbers are
            not drawn.
        panoptic: (H, W) ids of segments, and a dict for each segment that is drawn.
    """

    instances: Instances | None = None
    labels: torch.Tensor | None = None
    panoptic: tuple[torch.Tensor, list[dict[str, Any]]] | None = None


class Artist:
    """Draws on one picture after the other; each category has its colour in all of them."""

    def __init__(self, metadata: Metadata):
        """Take the names and colours of the categories from the metadata."""
        self._things: list[str] = metadata.get("thing_classes", [])
        self._stuff: list[str] = metadata.get("stuff_classes", [])
        self._thing_colors = _colors(metadata.get("thing_colors"), len(self._things))
        self._stuff_colors = _colors(metadata.get("stuff_colors"), len(self._stuff))
        numbers = {name: i for i, name in enumerate(metadata.get("keypoint_names") or ())}
        self._limbs = [
            (numbers[one], numbers[other], tuple(reversed(color)))
            for one, other, color in metadata.get("keypoint_connection_rules") or ()
        ]

    def draw(self, pixels: Pixels, shown: Shown, *, scale: float = 1.0) -> Pixels:
        """Draw a prediction or annotations on a copy of a picture.

        Args:
            pixels: (H, W, 3), BGR.
            scale: enlarge the picture by this factor before something is drawn.

        Returns:
            (scale * H, scale * W, 3), BGR.
        """
        canvas = np.ascontiguousarray(_enlarge(pixels, scale)).copy()
        font_size = max(_MIN_FONT_SIZE, round(math.sqrt(canvas.shape[0] * canvas.shape[1]) / 60))
        if shown.panoptic:
            ids = _enlarge(shown.panoptic[0].numpy(), scale)
            regions = [self._segment(ids, segment) for segment in shown.panoptic[1]]
            _draw_regions(canvas, regions, font_size)
            return canvas
        if shown.labels is not None:
            labels = _enlarge(shown.labels.numpy(), scale)
            numbers = [n for n in np.unique(labels) if 0 <= n < len(self._stuff)]
            regions = [(labels == n, self._stuff_colors[n], self._stuff[n]) for n in numbers]
            _draw_regions(canvas, regions, font_size)
        if shown.instances is not None:
            self._draw_instances(canvas, shown.instances, scale, font_size)
        return canvas

    def _segment(
        self, ids: NDArray[Any], segment: dict[str, Any]
    ) -> tuple[NDArray[np.bool_], Pixels, str]:
        number, is_thing = segment["category_id"], segment["isthing"]
        names = self._things if is_thing else self._stuff
        colors = self._thing_colors if is_thing else self._stuff_colors
        return ids == segment["id"], colors[number], _describe(names[number], segment.get("score"))

    def _draw_instances(
        self, canvas: Pixels, instances: Instances, scale: float, font_size: int
    ) -> None:
        boxes = scale * instances.pred_boxes.tensor.numpy()
        numbers = instances.pred_classes.tolist()
        texts = instances.texts if instances.has("texts") else self._texts(instances)
        # Small objects are drawn last, so that large ones do not hide them.
        order = np.argsort(-instances.pred_boxes.area().numpy(), kind="stable")
        for i in order:
            color = self._thing_colors[numbers[i] % len(self._thing_colors)]
            x1, y1, x2, y2 = (int(value) for value in np.rint(boxes[i]))
            if instances.has("pred_masks"):
                rows, columns = slice(max(y1 - 1, 0), y2 + 2), slice(max(x1 - 1, 0), x2 + 2)
                mask = _decode(instances.pred_masks[i], scale)
                if mask is not None:
                    _blend(canvas[rows, columns], mask[rows, columns], color)
            cv2.rectangle(canvas, (x1, y1), (x2, y2), color.tolist(), max(1, font_size // 8))
        if instances.has("pred_keypoints"):
            for points in instances.pred_keypoints.numpy():
                enlarged = points * np.array([scale, scale, 1], np.float32)
                self._draw_keypoints(canvas, enlarged, max(2, font_size // 5))
        written = [_render(text, font_size) for text in texts]
        is_legible = _leave_out_texts(canvas, boxes, written)
        for i in order[is_legible[order]]:
            x, y = (int(value) for value in boxes[i][:2])
            _write(canvas, written[i], x, y)

    def _texts(self, instances: Instances) -> list[str]:
        names = [name_of(number, self._things) for number in instances.pred_classes.tolist()]
        if not instances.has("scores"):
            return names
        return list(map(_describe, names, instances.scores.tolist()))

    def _draw_keypoints(self, canvas: Pixels, points: NDArray[np.float32], radius: int) -> None:
        """Draw keypoints (K, 3), each with x, y and a score, and the limbs between them."""
        places = [(int(x), int(y)) for x, y, _ in np.rint(points)]
        visible = points[:, 2] > _MIN_KEYPOINT_SCORE
        for one, other, color in self._limbs:
            if visible[one] and visible[other]:
                cv2.line(canvas, places[one], places[other], color, radius)
        for place, is_visible in zip(places, visible, strict=True):
            if is_visible:
                cv2.circle(canvas, place, radius, (0, 0, 255), -1)


def name_of(number: int, names: Sequence[str]) -> str:
    """Return the name of a category, or its number where a data set has no names."""
    return str(names[number] if number < len(names) else number)


def _colors(rgb: list[list[int]] | None, count: int) -> Pixels:
    """Return BGR colours for at least ``count`` categories: the data set's, or Detectron2's."""
    if rgb:
        return np.array(rgb, dtype=np.uint8)[:, ::-1]
    known = colormap(rgb=False, maximum=255).astype(np.uint8)
    return known[np.arange(max(count, len(known))) % len(known)]


def _enlarge(values: NDArray[Any], scale: float) -> NDArray[Any]:
    """Enlarge pixels (H, W, 3) smoothly, and numbers (H, W) by repeating them."""
    if scale == 1:
        return values
    height, width = (max(1, round(scale * side)) for side in values.shape[:2])
    if values.ndim == 3:
        return cv2.resize(values, (width, height))
    rows, columns = ((np.arange(side) / scale).astype(int) for side in (height, width))
    return values[rows.clip(max=values.shape[0] - 1)][:, columns.clip(max=values.shape[1] - 1)]


def _decode(mask: Any, scale: float) -> NDArray[np.bool_] | None:
    if mask is None:
        return None
    pixels = mask_util.decode(mask).astype(bool) if isinstance(mask, dict) else mask.numpy()
    return _enlarge(pixels, scale)


def _draw_regions(
    canvas: Pixels, regions: Iterable[tuple[NDArray[np.bool_], Pixels, str]], font_size: int
) -> None:
    """Draw regions by their masks, colours and texts; a text stands in the middle of its region."""
    places = []
    for mask, color, text in regions:
        if mask.any():
            _blend(canvas, mask, color)
            y, x = (int(np.median(index)) for index in np.nonzero(mask))
            places.append((text, x, y))
    for text, x, y in places:
        _write(canvas, _render(text, font_size), x, y)


def _blend(canvas: Pixels, mask: NDArray[np.bool_], color: Pixels) -> None:
    """Mix the pixels under a mask with a colour, half and half."""
    canvas[mask] = (canvas[mask].astype(np.uint16) + color) // 2


def _leave_out_texts(
    canvas: Pixels, boxes: NDArray[np.float32], texts: Sequence[Pixels]
) -> NDArray[np.bool_]:
    """Return which objects get their text: all, unless the texts would hide the picture. Then only
    those whose box is larger than the text."""
    covered = np.array([text.size for text in texts])
    if covered.sum() <= _MOST_TEXT * canvas[..., 0].size:
        return np.ones(len(texts), dtype=bool)
    return (boxes[:, 2:] - boxes[:, :2]).prod(axis=1) > covered


def _describe(name: str, score: float | None) -> str:
    return name if score is None else f"{name} {score:.0%}"


def _write(canvas: Pixels, letters: Pixels, x: int, y: int) -> None:
    """Write white text on a dark box, with its upper left corner at (x, y) or as near as fits."""
    height, width = canvas.shape[:2]
    y = min(max(y, 0), max(height - letters.shape[0], 0))
    x = min(max(x, 0), max(width - letters.shape[1], 0))
    region = canvas[y : y + letters.shape[0], x : x + letters.shape[1]]
    letters = letters[: region.shape[0], : region.shape[1], None]
    region[:] = np.maximum(region // 3, letters)


@lru_cache(maxsize=1024)
def _render(text: str, size: int) -> Pixels:
    """Draw a line of text, white on black, (H, W). OpenCV's own fonts have only ASCII."""
    text = " ".join(text.splitlines())  # names of categories may have line breaks
    font = ImageFont.truetype(str(_FONT), size)
    margin = max(1, size // 6)
    right, bottom = (int(side) for side in font.getbbox(text)[2:])
    image = Image.new("L", (right + 2 * margin, bottom + 2 * margin))
    ImageDraw.Draw(image).text((margin, margin), text, fill=255, font=font)
    return np.asarray(image)
