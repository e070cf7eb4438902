# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Average precision by class and size, and the curves of precision over recall, by COCO's rules."""

import contextlib
import io
import logging
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
from detectron2.evaluation.coco_evaluation import _evaluate_predictions_on_coco
from numpy.typing import NDArray
from pycocotools.cocoeval import COCOeval

from ..data.check.crowding import DEFAULT_LIMIT
from ..engine.evaluation import has_faster_coco
from .detections import Detections

logger = logging.getLogger(__name__)

# Each metric has an IoU threshold (None: the mean over .50, .55, ..., .95) and a range of areas.
METRICS: dict[str, tuple[float | None, str]] = {
    "AP": (None, "all"),
    "AP50": (0.5, "all"),
    "AP75": (0.75, "all"),
    "APs": (None, "small"),
    "APm": (None, "medium"),
    "APl": (None, "large"),
}

Curves = dict[str, NDArray[np.float64]]


@dataclass(frozen=True)
class AveragePrecision:
    """The average precision of one task: "bbox", "segm" or "keypoints".

    Attributes:
        recalls: (R,), from 0 to 1; the precision is given at these recalls.
        precision: (T, R, K, A), for IoU thresholds, recalls, categories and ranges of areas; -1
            where a category has no objects.
        thresholds: (T,) of IoU, or of object keypoint similarity.
        areas: the names of the ranges.
        category_ids: the ids of the K categories.
        counts: annotated objects by category id.
    """

    task: str
    recalls: NDArray[np.float64]
    precision: NDArray[np.float64]
    thresholds: NDArray[np.float64]
    areas: list[str]
    category_ids: list[int]
    counts: dict[int, int]

    def metrics(self, category_id: int | None = None) -> dict[str, float]:
        """Return the metrics in percent of a category, or with None their mean over the categories
        that have objects; NaN where there are none."""
        chosen = self._of_category(category_id)
        return {
            name: 100 * _mean_of_known(self._at(chosen[..., self.areas.index(area)], threshold))
            for name, (threshold, area) in METRICS.items()
            if area in self.areas
        }

    def curves(self, category_id: int | None = None) -> Curves:
        """Return the precision (R,) at the recalls for "AP50", "AP75" and "AP". The mean of a curve
        is the metric of its name; it is NaN where there are no objects."""
        chosen = self._of_category(category_id)[..., self.areas.index("all")]
        curves = {}
        for name in ("AP50", "AP75", "AP"):
            values = self._at(chosen, METRICS[name][0])
            by_recall = values.transpose(1, 0, 2).reshape(len(self.recalls), -1)
            curves[name] = np.array([_mean_of_known(row) for row in by_recall])
        return curves

    def _of_category(self, category_id: int | None) -> NDArray[np.float64]:
        if category_id is None:
            return self.precision
        return self.precision[:, :, [self.category_ids.index(category_id)]]

    def _at(self, values: NDArray[np.float64], threshold: float | None) -> NDArray[np.float64]:
        return values if threshold is None else values[np.isclose(self.thresholds, threshold)]


def _mean_of_known(values: NDArray[np.float64]) -> float:
    known = values[values > -1]
    return float(known.mean()) if known.size else float("nan")


def evaluate(
    detections: Detections, task: str, api: str = "auto", *, limit: int = DEFAULT_LIMIT
) -> AveragePrecision:
    """Evaluate with Detectron2's function, as the run did. It measures the sizes of masks by their
    area.

    Args:
        api: ``TEST.COCO_API`` of the run. If faster-coco-eval is not installed or fails, for
            example for ids that are text, pycocotools is used, which gives the same numbers.
        limit: how many detections of a category in an image count.
    """
    if api != "pycocotools" and has_faster_coco():
        try:
            return _evaluate(detections, task, limit, fast=True)
        except Exception:  # pycocotools may still work, as in the evaluation of the run
            logger.info("pycocotools evaluates, as faster-coco-eval fails.")
    return _evaluate(detections, task, limit, fast=False)


def _evaluate(detections: Detections, task: str, limit: int, *, fast: bool) -> AveragePrecision:
    truth, evaluation = detections.truth, COCOeval
    classes: AbstractContextManager[Any] = contextlib.nullcontext()
    if fast:
        from ..engine.faster_coco import COCO, FasterCOCOeval, in_detectron2

        truth, evaluation = COCO(truth.dataset, use_deepcopy=True), FasterCOCOeval
        classes = in_detectron2()
    with classes, contextlib.redirect_stdout(io.StringIO()):
        coco_eval = _evaluate_predictions_on_coco(
            truth,
            _with_task(detections, task),
            task,
            cocoeval_fn=evaluation,
            max_dets_per_image=[1, 10, limit],
        )
    params = coco_eval.params
    return AveragePrecision(
        task=task,
        recalls=params.recThrs,
        precision=coco_eval.eval["precision"][..., -1],  # for the most detections per image
        thresholds=params.iouThrs,
        areas=list(params.areaRngLbl),
        category_ids=list(params.catIds),
        counts=_count_objects(detections, task),
    )


def _with_task(detections: Detections, task: str) -> list[dict[str, Any]]:
    """Copy the predictions that have the task, because the evaluation changes them."""
    key = {"segm": "segmentation"}.get(task, task)
    return [dict(p) for p in detections.predictions if key in p]


def _count_objects(detections: Detections, task: str) -> dict[int, int]:
    counts = dict.fromkeys(detections.truth.cats, 0)
    for annotation in detections.truth.anns.values():
        ignored = annotation.get("iscrowd") or (
            task == "keypoints" and not annotation.get("num_keypoints")
        )
        counts[annotation["category_id"]] += not ignored
    return counts
