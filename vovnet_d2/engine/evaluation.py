# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""The evaluator of a data set, chosen by its metadata, and the metric that sums it up."""

import importlib.util
import logging
import os
from collections.abc import Callable
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import (
    CityscapesInstanceEvaluator,
    CityscapesSemSegEvaluator,
    COCOEvaluator,
    COCOPanopticEvaluator,
    DatasetEvaluator,
    DatasetEvaluators,
    LVISEvaluator,
    SemSegEvaluator,
)

from ..data.image_file import read_labels
from ..data.own import match_categories
from ..errors import UserValueError
from .coco_evaluators import PlainCOCOEvaluator, convert_anew
from .detection_limit import evaluated_detections
from .old_numpy import old_numpy
from .voc_evaluation import VOCEvaluator

logger = logging.getLogger(__name__)

_COCO_APIS = ("auto", "pycocotools", "faster-coco-eval")

_INSTALL = {
    "faster_coco_eval": "pip install faster-coco-eval",
    "lvis": "pip install lvis",
    "cityscapesscripts": "pip install cityscapesscripts",
    "panopticapi": "pip install git+https://github.com/cocodataset/panopticapi.git",
}


def build_evaluator(cfg: CfgNode, dataset_name: str, *, suffix: str = "") -> DatasetEvaluator:
    """Build the evaluator for the ``evaluator_type`` in the metadata of a data set.

    The files of the evaluator go to ``OUTPUT_DIR/inference``. If ``DATASETS.TEST`` has several data
    sets, each has a folder below it, whose name ends with ``suffix``.

    Raise ValueError if the type or ``TEST.COCO_API`` is unknown, or needs a package that is
    missing.
    """
    folder = os.path.join(cfg.OUTPUT_DIR, "inference" + suffix)
    if len(cfg.DATASETS.TEST) > 1:
        folder = os.path.join(folder, dataset_name)
    return _find_builder(cfg, dataset_name)(cfg, dataset_name, folder)


def check_evaluators(cfg: CfgNode) -> None:
    """Raise ValueError if a data set of ``DATASETS.TEST`` cannot be evaluated here."""
    for name in cfg.DATASETS.TEST:
        _find_builder(cfg, name)


def main_metric(cfg: CfgNode) -> str | None:
    """Return the name of the metric that tells how good a network is, such as ``"segm/AP"``.

    This is the form in which Detectron2 logs results. The first data set counts. Without a data set
    the result is None.
    """
    if not cfg.DATASETS.TEST:
        return None
    name = cfg.DATASETS.TEST[0]
    metric = {
        "pascal_voc": "bbox/AP50",
        "sem_seg": "sem_seg/mIoU",
        "cityscapes_sem_seg": "sem_seg/IoU",
        "cityscapes_instance": "segm/AP",
    }.get(_evaluator_type(name))
    if metric is None and _evaluator_type(name) == "coco_panoptic_seg" and _has("panopticapi"):
        metric = "panoptic_seg/PQ"
    if metric is None:
        metric = "segm/AP" if cfg.MODEL.MASK_ON else "bbox/AP"
        metric = "keypoints/AP" if cfg.MODEL.KEYPOINT_ON else metric
        if cfg.MODEL.META_ARCHITECTURE == "ProposalNetwork":
            metric = "box_proposals/AR@1000"
    return metric if len(cfg.DATASETS.TEST) == 1 else f"{name}/{metric}"


_Builder = Callable[[CfgNode, str, str], DatasetEvaluator]


def _find_builder(cfg: CfgNode, dataset_name: str) -> _Builder:
    kind = _evaluator_type(dataset_name)
    if kind not in _BUILDERS:
        raise UserValueError(
            f"Data set {dataset_name} has evaluator_type {kind!r} in its metadata, which must be "
            f"one of {', '.join(_BUILDERS)}."
        )
    package, builder = _BUILDERS[kind]
    if package and not _has(package):
        raise UserValueError(
            f"The evaluation of {dataset_name} needs {package}: {_INSTALL[package]}"
        )
    if kind.startswith("coco"):
        _is_faster_api_chosen(cfg)
    return builder


def _evaluator_type(dataset_name: str) -> str:
    return MetadataCatalog.get(dataset_name).get("evaluator_type", "")


def _has(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def has_faster_coco() -> bool:
    """Return True if faster-coco-eval is installed."""
    return _has("faster_coco_eval")


def _is_faster_api_chosen(cfg: CfgNode) -> bool:
    api, installed = cfg.TEST.COCO_API, has_faster_coco()
    if api not in _COCO_APIS:
        raise UserValueError(
            f"TEST.COCO_API is {api!r}: choose from {', '.join(map(repr, _COCO_APIS))}."
        )
    if api == "faster-coco-eval" and not installed:
        raise UserValueError(
            f"TEST.COCO_API {api} needs that package: {_INSTALL['faster_coco_eval']}. With auto, "
            "pycocotools is used if the package is missing."
        )
    return installed and api != "pycocotools"


def _coco(cfg: CfgNode, name: str, folder: str) -> DatasetEvaluator:
    convert_anew(name, folder)
    evaluator: COCOEvaluator | None = None
    metadata = MetadataCatalog.get(name)
    limit = evaluated_detections(cfg.TEST.DETECTIONS_PER_IMAGE, metadata)
    options = {
        "output_dir": folder,
        "kpt_oks_sigmas": cfg.TEST.KEYPOINT_OKS_SIGMAS,
        "max_dets_per_image": limit,
    }
    if _is_faster_api_chosen(cfg):
        from .faster_coco import FasterCOCOEvaluator

        chosen = cfg.TEST.COCO_API != "auto"
        try:
            evaluator = FasterCOCOEvaluator(name, fall_back=not chosen, **options)
        except ValueError as error:
            if chosen:
                raise
            logger.info("%s", str(error).partition(": set TEST.COCO_API")[0])
    used = "faster-coco-eval" if evaluator else "pycocotools"
    logger.info("%s is evaluated by %s, with %d detections per image.", name, used, limit)
    evaluator = evaluator or PlainCOCOEvaluator(name, **options)
    match_categories(evaluator._coco_api, metadata)
    return evaluator


def _sem_seg(cfg: CfgNode, name: str, folder: str) -> DatasetEvaluator:
    return SemSegEvaluator(name, output_dir=folder, sem_seg_loading_fn=_read_labels)


def _read_labels(file_name: str, dtype: Any = None) -> np.ndarray:
    return read_labels(file_name).astype(dtype)


def _panoptic(cfg: CfgNode, name: str, folder: str) -> DatasetEvaluator:
    evaluators = [_coco(cfg, name, folder), _sem_seg(cfg, name, folder)]
    if _has("panopticapi"):
        evaluators.append(COCOPanopticEvaluator(name, folder))
    else:
        logger.warning(
            "No panoptic quality (PQ) for %s without panopticapi (%s): boxes, masks and semantics "
            "are evaluated.",
            name,
            _INSTALL["panopticapi"],
        )
    return DatasetEvaluators(evaluators)


class _WithOldNumPy(DatasetEvaluator):
    def evaluate(self) -> dict[str, Any] | None:
        with old_numpy():
            return super().evaluate()


class _LVISEvaluator(_WithOldNumPy, LVISEvaluator):
    pass


class _CityscapesInstanceEvaluator(_WithOldNumPy, CityscapesInstanceEvaluator):
    pass


class _CityscapesSemSegEvaluator(_WithOldNumPy, CityscapesSemSegEvaluator):
    pass


# For each evaluator_type: the package that it needs, and the function that builds the evaluator.
_BUILDERS: dict[str, tuple[str, _Builder]] = {
    "coco": ("", _coco),
    "coco_panoptic_seg": ("", _panoptic),
    "sem_seg": ("", _sem_seg),
    "pascal_voc": ("", lambda cfg, name, folder: VOCEvaluator(name)),
    "lvis": ("lvis", lambda cfg, name, folder: _LVISEvaluator(name, output_dir=folder)),
    "cityscapes_instance": (
        "cityscapesscripts",
        lambda cfg, name, folder: _CityscapesInstanceEvaluator(name),
    ),
    "cityscapes_sem_seg": (
        "cityscapesscripts",
        lambda cfg, name, folder: _CityscapesSemSegEvaluator(name),
    ),
}
