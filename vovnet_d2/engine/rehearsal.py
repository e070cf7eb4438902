# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""The evaluation of a run is tried before the first iteration, not after hours of training."""

import contextlib
import io
import logging
import math
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import (
    COCOEvaluator,
    DatasetEvaluator,
    PascalVOCDetectionEvaluator,
    SemSegEvaluator,
)
from detectron2.structures import Boxes, BoxMode, Instances
from detectron2.utils import comm

from ..data.check.masks import has_mask
from ..data.image_file import read_labels
from ..data.record_files import check_files, has_size_of_file, spread
from ..data.records import check_records
from ..data.unreadable import image_roots
from ..errors import UserValueError, describe
from ..words import counted
from .detection_limit import explain_crowding
from .interruption import is_lost_connection
from .num_classes import find_num_classes
from .quiet import errors_only
from .registered_data import load_records
from .trainer import Trainer

logger = logging.getLogger(__name__)

Record = dict[str, Any]

_MOST_IMAGES = 50
_PERFECT = 99.0  # AP of predictions that equal the annotations


def rehearse_evaluation(cfg: CfgNode, trainer: type[Trainer]) -> None:
    """Check the annotations and files of ``DATASETS.TEST``. Run the evaluators without predictions
    and with perfect predictions for some images. All processes call this function.

    Only Detectron2's evaluators for COCO, PASCAL VOC and label maps are tried. Nothing is written
    to ``OUTPUT_DIR``. Raise ValueError if annotations cannot be used, or if the evaluation fails.
    """
    for name in cfg.DATASETS.TEST:
        records = load_records(name)
        check_records(records, name, num_classes=find_num_classes(cfg).get("thing_classes"))
        check_files(records, name, roots=image_roots([name]))
        if crowding := explain_crowding(cfg, records):
            logger.warning("Data set %s: %s.", name, crowding)
        if MetadataCatalog.get(name).get("evaluator_type") in ("coco", "pascal_voc", "sem_seg"):
            _rehearse(cfg, trainer, name, records)


def _rehearse(cfg: CfgNode, trainer: type[Trainer], name: str, records: list[Record]) -> None:
    # Masks have the size that a record gives, which could be absurdly large.
    if not (chosen := [r for r in spread(records, _MOST_IMAGES) if has_size_of_file(r)]):
        return
    for perfect in (False, True):
        with tempfile.TemporaryDirectory() as folder, _quiet():
            own = cfg.clone()
            own.defrost()
            own.OUTPUT_DIR = folder
            try:
                evaluator = trainer.build_evaluator(own, name)
                if hasattr(evaluator, "_output_dir"):  # an evaluator of a LazyConfig has its own
                    evaluator._output_dir = folder
                results = _run(evaluator, cfg, chosen, perfect=perfect)
            except Exception as error:  # whatever an evaluation ends with would end the run
                if is_lost_connection(error):  # no fault of the data
                    raise
                what = "perfect predictions" if perfect else "no predictions"
                raise UserValueError(
                    f"Data set {name} cannot be evaluated: with {what} the evaluation ends in "
                    f"{describe(error)}. tools/check_dataset.py lists "
                    "what is wrong with annotations in COCO's format."
                ) from error
        if perfect:
            _say_if_imperfect(name, results or {}, len(chosen))


def _run(
    evaluator: DatasetEvaluator, cfg: CfgNode, records: Sequence[Record], *, perfect: bool
) -> dict[str, Any] | None:
    if not isinstance(evaluator, COCOEvaluator | PascalVOCDetectionEvaluator | SemSegEvaluator):
        return None
    evaluator.reset()
    predict = _sem_seg if isinstance(evaluator, SemSegEvaluator) else _instances
    if comm.is_main_process():
        for record in records:
            output = predict(cfg, record, perfect=perfect)
            evaluator.process([record], [output])
    if isinstance(evaluator, COCOEvaluator):
        return evaluator.evaluate(img_ids=[record["image_id"] for record in records])
    return evaluator.evaluate()


def _instances(cfg: CfgNode, record: Record, *, perfect: bool) -> dict[str, Any]:
    annotations = [a for a in record.get("annotations", ()) if not a.get("iscrowd", 0) and perfect]
    annotations = annotations[: cfg.TEST.DETECTIONS_PER_IMAGE]
    size = record["height"], record["width"]
    found = Instances(size)
    boxes = [
        BoxMode.convert(list(a["bbox"]), a["bbox_mode"], BoxMode.XYXY_ABS) for a in annotations
    ]
    found.pred_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    found.scores = torch.ones(len(annotations))
    found.pred_classes = torch.tensor([a["category_id"] for a in annotations], dtype=torch.int64)
    if cfg.MODEL.MASK_ON and all(map(has_mask, annotations)):
        masks = [_decode(a["segmentation"], size) for a in annotations]
        found.pred_masks = torch.from_numpy(np.array(masks, dtype=bool).reshape(-1, *size))
    if cfg.MODEL.KEYPOINT_ON and all(a.get("keypoints") for a in annotations):
        points = np.array([a["keypoints"] for a in annotations], dtype=np.float32)
        number = cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS
        found.pred_keypoints = torch.from_numpy(points.reshape(len(annotations), number, 3))
    return {"instances": found}


def _decode(mask: Any, size: tuple[int, int]) -> np.ndarray:
    if isinstance(mask, np.ndarray):
        return mask.astype(bool)
    if isinstance(mask, dict):
        encoded = mask_util.frPyObjects(mask, *size) if isinstance(mask["counts"], list) else mask
    else:
        polygons = [np.asarray(polygon, dtype=float).tolist() for polygon in mask]
        encoded = mask_util.merge(mask_util.frPyObjects(polygons, *size))
    return mask_util.decode(encoded).astype(bool)


def _sem_seg(cfg: CfgNode, record: Record, *, perfect: bool) -> dict[str, Any]:
    labels = read_labels(record["sem_seg_file_name"])
    classes = cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
    if not perfect:
        labels = np.zeros_like(labels)
    known = torch.from_numpy(np.where(labels < classes, labels, 0))
    return {"sem_seg": torch.nn.functional.one_hot(known, classes).permute(2, 0, 1)}


def _say_if_imperfect(name: str, results: dict[str, Any], count: int) -> None:
    for task, metric in (("bbox", "AP"), ("segm", "AP"), ("sem_seg", "mIoU")):
        score = results.get(task, {}).get(metric, math.nan)
        if "AP50" in results.get(task, {}) and "APs" not in results[task]:
            continue  # PASCAL VOC's evaluation covers all images
        if score < _PERFECT:
            logger.warning(
                "Perfect predictions for %s of %s score %s %s %.1f: no network can reach "
                "more. Causes are images with more objects than TEST.DETECTIONS_PER_IMAGE, "
                "annotations that repeat each other, and annotation ids of 0.",
                *(counted(count, "images"), name, task, metric, score),
            )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Run without the tables and messages of evaluators."""
    loggers = errors_only("detectron2.evaluation", "detectron2.data", __package__)
    with loggers, contextlib.redirect_stdout(io.StringIO()):
        yield
