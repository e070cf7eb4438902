# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Detectron2's evaluation of PASCAL VOC, for annotations with fractions of pixels too."""

from __future__ import annotations

from functools import cache
from typing import Any
from unittest.mock import patch

from detectron2.evaluation import PascalVOCDetectionEvaluator, pascal_voc_evaluation

from ..data.voc import parse_annotations, read_objects

__all__ = ["VOCEvaluator"]


class VOCEvaluator(PascalVOCDetectionEvaluator):
    """A :class:`PascalVOCDetectionEvaluator` that reads coordinates as they are written, where
    Detectron2's fails on fractions."""

    def evaluate(self) -> dict[str, Any] | None:
        @cache  # each file is needed for every class and threshold
        def parse(path: str) -> list[dict[str, Any]]:
            return read_objects(parse_annotations(path))

        with patch.object(pascal_voc_evaluation, "parse_rec", parse):
            return super().evaluate()
