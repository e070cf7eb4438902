# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""The evaluator for a data set, chosen by its metadata."""

from __future__ import annotations

import os

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import COCOEvaluator, DatasetEvaluator

__all__ = ["build_evaluator"]


def build_evaluator(cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
    output_dir = os.path.join(cfg.OUTPUT_DIR, "inference")
    evaluator_type = MetadataCatalog.get(dataset_name).get("evaluator_type")
    if evaluator_type == "coco":
        return COCOEvaluator(dataset_name, output_dir=output_dir)
    raise ValueError(f"Data set {dataset_name!r} is of the unknown kind {evaluator_type!r}.")
