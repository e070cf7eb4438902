# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Detectron2's evaluation of PASCAL VOC, also for coordinates with fractions and for classes
without objects."""

import logging
import math
from collections import OrderedDict, defaultdict
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

from detectron2.evaluation import PascalVOCDetectionEvaluator, pascal_voc_evaluation

from ..data.voc import parse_annotations, read_objects
from ..words import listed

logger = logging.getLogger(__name__)


class VOCEvaluator(PascalVOCDetectionEvaluator):
    """A :class:`PascalVOCDetectionEvaluator` that takes coordinates with fractions.

    The mean AP is over the classes that the test set has objects of, as in COCO's evaluation. In
    Detectron2's own evaluator, the other classes count with an AP of 0.
    """

    def evaluate(self) -> dict[str, Any] | None:
        @cache  # each file is needed for every class and threshold
        def parse(path: str) -> list[dict[str, Any]]:
            return read_objects(parse_annotations(path))

        lines = Path(self._image_set_path).read_text(encoding="utf-8").splitlines()
        paths = [self._anno_file_template.format(line.strip()) for line in lines if line.strip()]
        objects = [item for path in paths for item in parse(path)]
        there = {item["name"] for item in objects if not item["difficult"]}
        kept = [number for number, name in enumerate(self._class_names) if name in there]
        self._say_what_is_missing(kept)
        if not kept:
            return OrderedDict(bbox=dict.fromkeys(("AP", "AP50", "AP75"), math.nan))
        predictions = {
            i: self._predictions[n] for i, n in enumerate(kept) if n in self._predictions
        }
        class_names = [self._class_names[number] for number in kept]
        with (
            patch.object(pascal_voc_evaluation, "parse_rec", parse),
            patch.object(self, "_class_names", class_names),
            patch.object(self, "_predictions", defaultdict(list, predictions)),
        ):
            return super().evaluate()

    def _say_what_is_missing(self, kept: list[int]) -> None:
        missing = [n for i, n in enumerate(self._class_names) if i not in kept]
        if missing:
            logger.info(
                "%s has no object that counts (difficult ones do not) of %d of the %d classes: "
                "they are left out of the mean. They are %s.",
                *(self._dataset_name, len(missing), len(self._class_names)),
                listed(missing, most=20),
            )
