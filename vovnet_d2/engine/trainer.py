# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Detectron2's DefaultTrainer with this package's parts."""

from __future__ import annotations

from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer
from detectron2.evaluation import DatasetEvaluator

from .evaluation import build_evaluator

__all__ = ["Trainer"]


class Trainer(DefaultTrainer):
    """Trains and evaluates what a config describes."""

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
        return build_evaluator(cfg, dataset_name)
