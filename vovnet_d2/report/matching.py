# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Predictions are matched with objects, for the confusion matrix and the ranking of images.

Predictions below a score threshold are left out. In each image, the pairs of a prediction and an
object whose boxes overlap with an IoU of at least 0.5 are taken in order, from the greatest IoU to
the least, and among equal ones from the greatest score. A pair becomes a match if neither has a
match yet. Classes do not matter here: a match of different classes is a confusion. As in COCO's
evaluation, crowds are left out, and so are unmatched predictions that lie by half or more in a
crowd of their class.

AP has another matching, which is made class by class and for every score.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as mask_util
from pycocotools.coco import COCO

MIN_IOU = 0.5

Annotation = dict[str, Any]


@dataclass(frozen=True)
class ImageMatches:
    """Holds the matches between the objects and the predictions of an image.

    Attributes:
        objects: annotations other than crowds.
        predictions: the predictions that count.
        pairs: the matches, as indices into ``objects`` and ``predictions``.
    """

    image_id: int
    objects: list[Annotation]
    predictions: list[Annotation]
    pairs: list[tuple[int, int]]

    @property
    def correct(self) -> int:
        """Count the matches of the same class."""
        return sum(
            self.objects[i]["category_id"] == self.predictions[j]["category_id"]
            for i, j in self.pairs
        )

    @property
    def confused(self) -> int:
        return len(self.pairs) - self.correct

    @property
    def missed(self) -> int:
        return len(self.objects) - len(self.pairs)

    @property
    def spurious(self) -> int:
        return len(self.predictions) - len(self.pairs)

    @property
    def f1(self) -> float | None:
        """Return the harmonic mean of precision and recall; None where there are no objects and no
        predictions."""
        total = len(self.objects) + len(self.predictions)
        return 2 * self.correct / total if total else None


def match_images(
    truth: COCO, predictions: Iterable[Annotation], *, min_score: float
) -> list[ImageMatches]:
    """Match predictions, in COCO's results format, in every image of a data set."""
    by_image: dict[int, list[Annotation]] = defaultdict(list)
    for prediction in predictions:
        if prediction["score"] >= min_score:
            by_image[prediction["image_id"]].append(prediction)
    return [_match(i, truth.imgToAnns[i], by_image[i]) for i in sorted(truth.imgs)]


def _match(
    image_id: int, annotations: Sequence[Annotation], predictions: list[Annotation]
) -> ImageMatches:
    objects = [annotation for annotation in annotations if not annotation.get("iscrowd")]
    crowds = [annotation for annotation in annotations if annotation.get("iscrowd")]
    ious = _overlaps(objects, predictions)
    candidates = sorted(
        np.argwhere(ious >= MIN_IOU).tolist(),
        key=lambda pair: (-ious[pair[0], pair[1]], -predictions[pair[1]]["score"]),
    )
    match_of_object: dict[int, int] = {}
    taken: set[int] = set()
    for i, j in candidates:
        if i not in match_of_object and j not in taken:
            match_of_object[i] = j
            taken.add(j)
    in_crowds = _overlaps(crowds, predictions, crowds=True)
    kept = [
        j
        for j, prediction in enumerate(predictions)
        if j in taken
        or not any(
            in_crowds[i, j] >= MIN_IOU and crowd["category_id"] == prediction["category_id"]
            for i, crowd in enumerate(crowds)
        )
    ]
    pairs = [(i, kept.index(j)) for i, j in sorted(match_of_object.items())]
    return ImageMatches(image_id, objects, [predictions[j] for j in kept], pairs)


def _overlaps(
    objects: list[Annotation], predictions: list[Annotation], *, crowds: bool = False
) -> NDArray[np.float64]:
    """Return the IoU of boxes, (objects, predictions). For crowds the overlap is divided by the
    area of the prediction."""
    if not objects or not predictions:
        return np.zeros((len(objects), len(predictions)))
    boxes = [[item["bbox"] for item in items] for items in (predictions, objects)]
    return mask_util.iou(*boxes, [int(crowds)] * len(objects)).T


def confusion_matrix(
    images: Iterable[ImageMatches], category_ids: Sequence[int]
) -> NDArray[np.int64]:
    """Return the matrix (K + 1, K + 1) that counts objects by their category in the rows and by the
    predicted category in the columns.

    The last row counts predictions where there is no object. The last column counts objects that
    were not found.
    """
    place = {category_id: k for k, category_id in enumerate(category_ids)}
    background = len(place)
    matrix = np.zeros((background + 1, background + 1), dtype=np.int64)
    for image in images:
        rows = [place[annotation["category_id"]] for annotation in image.objects]
        columns = [place[prediction["category_id"]] for prediction in image.predictions]
        for i, j in image.pairs:
            matrix[rows[i], columns[j]] += 1
        for i in set(range(len(rows))) - {i for i, _ in image.pairs}:
            matrix[rows[i], background] += 1
        for j in set(range(len(columns))) - {j for _, j in image.pairs}:
            matrix[background, columns[j]] += 1
    return matrix


def rank_images(images: Iterable[ImageMatches]) -> list[ImageMatches]:
    """Sort images from the best to the worst F1, then by more correct predictions, then by fewer
    errors. Images without objects and predictions are left out."""
    return sorted(
        (image for image in images if image.f1 is not None),
        key=lambda image: (
            -(image.f1 or 0.0),
            -image.correct,
            image.confused + image.missed + image.spurious,
            image.image_id,
        ),
    )
