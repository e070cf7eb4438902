# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""The part of the trainer that evaluates a network."""

import logging
from collections.abc import Iterable
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import build_detection_test_loader
from detectron2.data import transforms as T
from detectron2.engine import DefaultTrainer
from detectron2.evaluation import DatasetEvaluator
from detectron2.modeling import GeneralizedRCNNWithTTA
from torch import nn

from ..data.mapper import AugmentedTestMapper, Mapper, build_augmentations, build_mapper
from ..data.unreadable import ReadableOnly, image_roots
from ..data.workers import attend_to_workers
from ..tiles import TiledDetector
from .evaluation import build_evaluator, main_metric
from .precision import autocast

logger = logging.getLogger(__name__)

Results = dict[str, Any]
"""The results of an evaluation, as :meth:`EvaluatingTrainer.test` returns them."""


class EvaluatingTrainer(DefaultTrainer):
    """The evaluation of the network that a config describes, on every kind of data set that
    Detectron2 has an evaluator for.

    All methods are class methods: an evaluation needs no training.
    """

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Iterable[Any]:
        mapper = build_mapper(cfg, is_train=False)
        if cfg.TEST.TILES:  # tiles are cut from an image in its own size
            mapper = Mapper(cfg, False, augmentations=[])
        readable = ReadableOnly(mapper, roots=image_roots([dataset_name]))
        loader = build_detection_test_loader(cfg, dataset_name, mapper=readable)
        return attend_to_workers(loader)

    @classmethod
    def main_metric(cls, cfg: CfgNode) -> str | None:
        """See :func:`vovnet_d2.engine.evaluation.main_metric`."""
        return main_metric(cfg)

    @classmethod
    def build_evaluator(
        cls, cfg: CfgNode, dataset_name: str, *, suffix: str = ""
    ) -> DatasetEvaluator:
        """See :func:`vovnet_d2.engine.evaluation.build_evaluator`."""
        return build_evaluator(cfg, dataset_name, suffix=suffix)

    @classmethod
    def test(
        cls, cfg: CfgNode, model: nn.Module, evaluators: list[DatasetEvaluator] | None = None
    ) -> Results:
        """Evaluate a network on the data sets of ``DATASETS.TEST``.

        Args:
            evaluators: one for each data set; by default :meth:`build_evaluator` builds them.

        Returns:
            on the main process, a dict with a dict of metrics for each task. If ``DATASETS.TEST``
            has several data sets, such a dict for each name of a data set.
        """
        if cfg.TEST.TILES:
            tiles, overlap = cfg.TEST.TILES, cfg.TEST.TILE_OVERLAP
            resize = T.AugmentationList(build_augmentations(cfg, is_train=False))
            model = TiledDetector(model, tiles, overlap, resize=resize)
        with autocast(cfg, enabled=cfg.TEST.AMP.ENABLED):
            return super().test(cfg, model, evaluators)

    @classmethod
    def test_all(cls, cfg: CfgNode, model: nn.Module) -> Results:
        """Evaluate by :meth:`test`. If ``TEST.AUG`` is enabled, also by :meth:`test_with_tta`."""
        results = cls.test(cfg, model)
        if cfg.TEST.AUG.ENABLED:
            results = merge_results(results, cls.test_with_tta(cfg, model))
        return results

    @classmethod
    def test_with_tta(cls, cfg: CfgNode, model: nn.Module) -> Results:
        """Evaluate as :meth:`test` does, with the augmentation of ``TEST.AUG``.

        The names of the tasks end with ``_TTA``.
        """
        logger.info("Evaluating with test-time augmentation ...")
        aug = cfg.TEST.AUG
        mapper = AugmentedTestMapper(aug.MIN_SIZES, aug.MAX_SIZE, flip=aug.FLIP)
        return cls.test_as("_TTA", cfg, GeneralizedRCNNWithTTA(cfg, model, mapper))

    @classmethod
    def test_as(cls, suffix: str, cfg: CfgNode, model: nn.Module) -> Results:
        """Evaluate as :meth:`test` does; the names of tasks and folders end with ``suffix``."""
        evaluators = [cls.build_evaluator(cfg, name, suffix=suffix) for name in cfg.DATASETS.TEST]
        results = cls.test(cfg, model, evaluators)
        if len(cfg.DATASETS.TEST) == 1:
            return _rename(results, suffix)
        return {name: _rename(tasks, suffix) for name, tasks in results.items()}


def merge_results(results: Results, more: Results) -> Results:
    """Merge the tasks of two results, with one data set or several."""
    common = {key: results[key] | more[key] for key in results.keys() & more.keys()}
    return {**results, **more, **common}


def _rename(tasks: Results, suffix: str) -> Results:
    return {f"{task}{suffix}": metrics for task, metrics in tasks.items()}
