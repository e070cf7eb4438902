# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Detectron2's evaluator of COCO-format data sets, on faster-coco-eval, which must be installed."""

import io
import logging
from collections.abc import Sequence
from contextlib import redirect_stdout
from typing import Any
from unittest import mock

import pycocotools.coco
from detectron2.evaluation import coco_evaluation
from detectron2.evaluation.coco_evaluation import COCOevalMaxDets
from faster_coco_eval.core.coco import COCO
from faster_coco_eval.core.faster_eval_api import COCOeval_faster

from ..data.own import match_categories
from ..errors import UserValueError, describe, one_line
from .coco_evaluators import CategoriesByName

logger = logging.getLogger(__name__)

_LIMIT = 2**53  # ids that a double holds exactly


class FasterCOCOeval(COCOeval_faster):
    """faster-coco-eval's evaluation, which keeps all categories for keypoints too."""

    def __init__(self, truth: COCO, detections: COCO, iou_type: str):
        super().__init__(truth, detections, iou_type)
        # faster-coco-eval leaves out categories without keypoints, which Detectron2 needs.
        self.params.catIds = sorted(truth.getCatIds())


class FasterCOCOEvaluator(CategoriesByName):
    """Detectron2's evaluator with the results of pycocotools in a fraction of its time.

    Detectron2 finds the classes of pycocotools in its own module, where this evaluator replaces
    them while it works. For a limit other than 100 detections Detectron2 uses another class, which
    :class:`FasterCOCOeval` replaces, too.
    """

    def __init__(self, dataset_name: str, *, fall_back: bool = False, **arguments: Any):
        """
        Args:
            fall_back: True to let pycocotools evaluate if faster-coco-eval fails.
            arguments: the arguments of :class:`detectron2.evaluation.COCOEvaluator`.

        Raises:
            ValueError: faster-coco-eval does not take the ids of the annotations.
        """
        self._fall_back = fall_back
        try:
            with in_detectron2():
                super().__init__(dataset_name, use_fast_impl=True, **arguments)
        except (AssertionError, KeyError, OverflowError, TypeError, ValueError) as error:
            raise UserValueError(
                f"faster-coco-eval does not take the annotations of {dataset_name} "
                f"({one_line(error)}): set TEST.COCO_API pycocotools."
            ) from error
        for image in self._coco_api.dataset["images"]:
            # faster-coco-eval turns text into numbers if it can. Predictions then have other ids.
            if not isinstance(image["id"], int) or abs(image["id"]) >= _LIMIT:
                raise UserValueError(
                    f"faster-coco-eval takes no image ids such as {image['id']!r} in "
                    f"{dataset_name}: set TEST.COCO_API pycocotools."
                )

    def evaluate(self, img_ids: Sequence[int] | None = None) -> dict[str, Any]:
        with in_detectron2():
            return super().evaluate(img_ids)

    def _eval_predictions(
        self, predictions: list[dict[str, Any]], img_ids: Sequence[int] | None = None
    ) -> None:
        # Detectron2 changes the ids of categories in these.
        kept = [p | {"instances": [dict(r) for r in p["instances"]]} for p in predictions]
        try:
            super()._eval_predictions(predictions, img_ids=img_ids)
        except Exception as error:  # faster-coco-eval may raise any error
            if not self._fall_back:
                raise
            logger.warning("faster-coco-eval fails (%s): pycocotools takes over.", describe(error))
            truth = self._coco_api
            with redirect_stdout(io.StringIO()):
                self._coco_api = pycocotools.coco.COCO(self._metadata.json_file)
            match_categories(self._coco_api, self._metadata)
            self._use_fast_impl = False
            plain = {"COCO": pycocotools.coco.COCO, "COCOevalMaxDets": COCOevalMaxDets}
            with mock.patch.multiple(coco_evaluation, **plain):
                super()._eval_predictions(kept, img_ids=img_ids)
            self._coco_api, self._use_fast_impl = truth, True


def in_detectron2() -> Any:
    """Return a context in which Detectron2's evaluation uses faster-coco-eval."""
    return mock.patch.multiple(
        coco_evaluation,
        COCO=COCO,
        COCOeval_opt=FasterCOCOeval,
        COCOevalMaxDets=FasterCOCOeval,
    )
