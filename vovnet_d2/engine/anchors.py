# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Anchors that fit the boxes of a data set, by k-means."""

import random
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import transforms as T
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.structures import BoxMode
from numpy.typing import NDArray

from ..data.stream import seeded
from ..errors import UserImportError, UserValueError
from .in_features import build_explained

Array = NDArray[np.float64]

_MOST_IMAGES = 500


class Anchors(NamedTuple):
    """Anchors as Detectron2's DefaultAnchorGenerator takes them.

    Attributes:
        sizes: for each feature map, the square roots of the areas of its anchors, in pixels.
        ratios: for each feature map, the heights over the widths.
        strides: the strides of the feature maps, the finest first.
        offset: the distance of the first anchor's centre from the image's corner, in strides.
    """

    sizes: list[list[float]]
    ratios: list[list[float]]
    strides: list[int]
    offset: float


class TrainingBoxes(NamedTuple):
    """Holds the boxes of the training data, with the sizes of their images and their classes.

    Attributes:
        corners: (N, 4), XYXY in pixels of the network's input.
        sides: (N, 2), width and height of the images that the boxes are in.
        classes: (N,), numbers of the classes.
    """

    corners: Array
    sides: Array
    classes: NDArray[np.int64]


class Fit(NamedTuple):
    """Holds the anchors that were fitted to boxes, and how well they fit.

    Attributes:
        anchors: the anchors with the highest mean best IoU; they may be the earlier ones.
        num_boxes: the number of boxes in the measurement.
        before: the mean best IoU of the earlier anchors.
        after: the mean best IoU of ``anchors``.
    """

    anchors: Anchors
    num_boxes: int
    before: float
    after: float


def read_anchors(cfg: CfgNode) -> Anchors:
    """Read the anchors of a config; the network's feature maps give the strides. Raise ValueError
    if the network has no anchors that a size and a ratio describe."""
    name, network = cfg.MODEL.ANCHOR_GENERATOR.NAME, cfg.MODEL.META_ARCHITECTURE
    meta = cfg.clone()
    meta.defrost()
    meta.MODEL.DEVICE = "meta"
    with torch.device("meta"):  # shapes without values
        modules: list[Any] = list(build_explained(meta).modules())
    found = [module for module in modules if type(module) is DefaultAnchorGenerator]
    # FCOS gets its locations from a generator of anchors that the config does not describe.
    if not found or network == "FCOS" or name != DefaultAnchorGenerator.__name__:
        raise UserValueError(
            "--fit-anchors needs a network that learns from the anchors of "
            f"{DefaultAnchorGenerator.__name__}. MODEL.META_ARCHITECTURE {network} with "
            f"MODEL.ANCHOR_GENERATOR.NAME {name} does not: leave it out."
        )
    node, strides = cfg.MODEL.ANCHOR_GENERATOR, list(found[0].strides)
    return Anchors(
        per_level(node.SIZES, strides), per_level(node.ASPECT_RATIOS, strides), strides, node.OFFSET
    )


def per_level(values: Sequence[Any], strides: Sequence[int]) -> list[list[float]]:
    """Return a list for each feature map. Detectron2 also allows one list for all feature maps."""
    lists = values if isinstance(values[0], Iterable) else [values]
    return [list(each) for each in (lists if len(lists) > 1 else [*lists] * len(strides))]


def collect_boxes(
    records: Sequence[dict[str, Any]], augmentations: T.AugmentationList
) -> TrainingBoxes:
    """Collect the boxes of a data set as training sees them, resized and cropped.

    Args:
        records: images in Detectron2's format. Of more than 500 images, 500 are drawn.
        augmentations: the augmentations of training. They are applied to blank images.
    """
    chosen = random.Random(0).sample(list(records), min(len(records), _MOST_IMAGES))
    found: list[tuple[Any, ...]] = []
    with seeded(0):
        for record in chosen:
            objects = [a for a in record.get("annotations", ()) if not a.get("iscrowd", 0)]
            corners = np.array(
                [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in objects]
            ).reshape(-1, 4)
            blank = np.zeros((record["height"], record["width"], 3), np.uint8)
            seen = T.AugInput(blank, boxes=corners)
            augmentations(seen)
            height, width = seen.image.shape[:2]
            boxes = np.clip(seen.boxes, 0, [width, height, width, height])
            kept = ((boxes[:, 2:] - boxes[:, :2]) >= 1).all(axis=1)
            sides = np.tile([float(width), float(height)], (len(boxes), 1))
            classes = np.array([a["category_id"] for a in objects], np.int64)
            found.append((boxes[kept], sides[kept], classes[kept]))
    return TrainingBoxes(*(np.concatenate(each) for each in zip(*found, strict=True)))


def mean_best_iou(anchors: Anchors, boxes: TrainingBoxes) -> float:
    """Return the mean IoU of the boxes with the best anchor at the locations of the feature maps.

    Each class has the same weight, as in AP, however many boxes it has. Among the anchors of one
    shape, the anchor whose centre is nearest in x and in y overlaps most.
    """
    generator = DefaultAnchorGenerator(
        sizes=anchors.sizes,
        aspect_ratios=anchors.ratios,
        strides=anchors.strides,
        offset=anchors.offset,
    )
    low, high = boxes.corners[:, :2], boxes.corners[:, 2:]
    best = np.zeros(len(low))
    for stride, cells in zip(anchors.strides, generator.cell_anchors, strict=True):
        places = np.round((low + high) / (2 * stride) - anchors.offset)
        places = np.clip(places, 0, np.ceil(boxes.sides / stride) - 1)
        centres = (places + anchors.offset) * stride
        for left, top, right, bottom in cells.double().tolist():
            start, end = centres + np.array([left, top]), centres + np.array([right, bottom])
            overlap = np.clip(np.minimum(high, end) - np.maximum(low, start), 0, None).prod(axis=1)
            areas = (high - low).prod(axis=1) + (right - left) * (bottom - top)
            best = np.maximum(best, overlap / (areas - overlap))
    return float(np.mean([best[boxes.classes == number].mean() for number in set(boxes.classes)]))


def fit_anchors(anchors: Anchors, boxes: TrainingBoxes) -> Fit:
    """Fit sizes and ratios to boxes. Each feature map keeps its numbers of sizes and ratios.

    The logarithms of the sizes and of the ratios of the boxes are clustered. The feature maps get
    the sizes in ascending order. The anchors of a coarse feature map are too far apart for small
    objects, so the coarsest feature maps may keep their earlier sizes. The choice with the highest
    mean best IoU is taken.

    Raises:
        ImportError: scikit-learn is not installed.
        ValueError: there are fewer boxes than sizes or ratios.
    """
    before = mean_best_iou(anchors, boxes)
    choices = [(mean_best_iou(choice, boxes), choice) for choice in _choices(anchors, boxes)]
    after, chosen = max(choices, key=lambda each: each[0])
    if after <= before:
        after, chosen = before, anchors
    return Fit(chosen, len(boxes.corners), before, after)


def _choices(anchors: Anchors, boxes: TrainingBoxes) -> Iterator[Anchors]:
    counts = [len(sizes) for sizes in anchors.sizes]
    num_ratios = len(anchors.ratios[0])
    needed = max(sum(counts), num_ratios)
    if len(boxes.corners) < needed:
        raise UserValueError(
            f"--fit-anchors needs at least {needed} boxes, and finds {len(boxes.corners)} that are "
            "at least a pixel wide and high: leave it out."
        )
    width, height = (boxes.corners[:, 2:] - boxes.corners[:, :2]).T
    fitted = [[round(ratio, 2) for ratio in _cluster(height / width, num_ratios)]] * len(counts)
    for number in range(1, len(counts) + 1):
        means = iter(_cluster(np.sqrt(width * height), sum(counts[:number])))
        fine = [[round(next(means), 1) for _ in range(count)] for count in counts[:number]]
        for ratios in (anchors.ratios, fitted):
            yield anchors._replace(sizes=fine + anchors.sizes[number:], ratios=ratios)


def _cluster(values: Array, number: int) -> list[float]:
    """Return the means of clusters of logarithms, ascending."""
    try:
        from sklearn.cluster import KMeans
    except ImportError as error:
        raise UserImportError(
            "--fit-anchors needs scikit-learn: pip install scikit-learn, or leave it out."
        ) from error
    logarithms = np.log(values)
    number_found = min(number, len(np.unique(logarithms)))
    found = KMeans(number_found, n_init=10, random_state=0).fit(logarithms[:, None])
    means = np.exp(np.sort(found.cluster_centers_[:, 0])).tolist()
    return means + means[-1:] * (number - number_found)
