# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Detectron2's evaluator of COCO-format data sets, on faster-coco-eval, which must be installed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from unittest import mock

from detectron2.evaluation import COCOEvaluator, coco_evaluation
from faster_coco_eval.core.coco import COCO
from faster_coco_eval.core.faster_eval_api import COCOeval_faster

__all__ = ["COCO", "FasterCOCOEvaluator", "FasterCOCOeval"]


class FasterCOCOeval(COCOeval_faster):
    """faster-coco-eval's evaluation, with all categories for keypoints, too."""

    def __init__(self, truth: COCO, detections: COCO, iou_type: str):
        super().__init__(truth, detections, iou_type)
        # For keypoints it leaves out the categories without any, and Detectron2 then misses them.
        self.params.catIds = sorted(truth.getCatIds())


class FasterCOCOEvaluator(COCOEvaluator):
    """Detectron2's evaluator with the results of pycocotools in a fraction of its time.

    Detectron2 looks both classes up in its module, so that is where they are replaced, for as long
    as this evaluator is at work.
    """

    def __init__(self, dataset_name: str, **arguments: Any):
        """
        Args:
            arguments: of :class:`detectron2.evaluation.COCOEvaluator`.
        """
        with _in_detectron2():
            super().__init__(dataset_name, use_fast_impl=True, **arguments)

    def evaluate(self, img_ids: Sequence[int] | None = None) -> dict[str, Any]:
        with _in_detectron2():
            return super().evaluate(img_ids)


def _in_detectron2() -> Any:
    return mock.patch.multiple(coco_evaluation, COCO=COCO, COCOeval_opt=FasterCOCOeval)
