# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""A detector is quantized on the images of a data set, and its accuracy is compared with float."""

import json
import logging
import random
import tempfile
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.evaluation import DatasetEvaluator, DatasetEvaluators
from detectron2.structures import pairwise_iou
from tabulate import tabulate
from torch import Tensor, nn

from ..atomic import atomic_write, write_text
from ..backends import use_backend
from ..backends.cache import export_dense_part, model_key
from ..backends.quantized import mark_quantized
from ..data.mapper import build_mapper
from ..data.own import register_own_data
from ..errors import UserKeyError, UserValueError
from ..export.int8 import Quantizer
from ..made import refuse_foreign
from ..timing import describe_environment
from ..words import counted
from .data_checks import check_data
from .evaluation import build_evaluator, check_evaluators
from .registered_data import load_metadata, register_package_data
from .trainer import Trainer

logger = logging.getLogger(__name__)

BACKEND = "onnxruntime"
"""The backend in which the float and the quantized detector are compared."""

CALIBRATION_IMAGES, CALIBRATION_SEED = 300, 0
"""The number of training images to calibrate on by default, and the seed that draws them."""

MIN_SCORE, MIN_IOU = 0.5, 0.9
"""Float detections with at least this score should be found again by INT8 in the same category,
with at least this IoU."""

_METRICS = ("AP", "PQ", "mIoU", "AP50")  # the first of these that a task has is reported

Record = dict[str, Any]


def find_images(cfg: CfgNode, data_set: str, number: int, seed: int) -> list[Record]:
    """Draw images to calibrate on, and check that the data sets of the evaluation are there.

    Args:
        data_set: the name of the data set, as in ``DATASETS``.
        number: the number of images to draw; a smaller data set gives all.

    Raises:
        FileNotFoundError: files of a data set are missing.
        KeyError: a data set is not registered.
        ValueError: the data set has no images, or the evaluation cannot be run.
    """
    _register_data(cfg)
    if data_set not in DatasetCatalog:
        raise UserKeyError(
            f"The data set {data_set!r} to calibrate on is not registered: give training data, "
            f"such as {', '.join(cfg.DATASETS.TRAIN) or 'digits_train'}."
        )
    load_metadata(data_set, evaluated=False)
    if data_set in cfg.DATASETS.TEST:
        logger.warning(
            "INT8 is calibrated on %s, and evaluated on it, too. Its AP on other images may be "
            "lower: calibrate on training data.",
            data_set,
        )
    if cfg.DATASETS.TEST:
        check_evaluation(cfg)
    return draw_images(data_set, number, seed)


def _register_data(cfg: CfgNode) -> None:
    register_package_data()
    register_own_data(cfg.DATASETS.OWN)


def check_evaluation(cfg: CfgNode) -> None:
    """Check that the data sets of ``DATASETS.TEST`` are there and can be evaluated. For the errors
    see :func:`find_images`."""
    _register_data(cfg)
    check_data(cfg, training=False)
    check_evaluators(cfg)


def draw_images(data_set: str, number: int, seed: int) -> list[Record]:
    """Draw images of a registered data set, see :func:`find_images`. Raise ValueError if it has no
    images."""
    records = DatasetCatalog.get(data_set)
    if not records:
        raise UserValueError(f"The data set {data_set} has no images to calibrate on.")
    if len(records) < number:
        logger.info("%s has %s: all are used.", data_set, counted(len(records), "images"))
    return random.Random(seed).sample(records, min(number, len(records)))


def quantize_detector(
    model: Any,
    cfg: CfgNode,
    records: Sequence[Record],
    folder: Path,
    *,
    keep_float: Sequence[str] | None = None,
    symmetric: bool = False,
    sensitivity: int = 0,
    about: dict[str, str] | None = None,
) -> dict[str, Any]:
    """Quantize the dense part of a detector to a file, and compare it with float.

    Args:
        model: the detector with its weights, on the CPU.
        cfg: the config of the detector. AP is measured on the first data set of ``DATASETS.TEST``,
            if there is one.
        records: images to calibrate on, see :func:`find_images`.
        folder: the folder for ``dense.int8.onnx``, and the report ``dense.int8.json`` and ``.md``.
        keep_float: see :meth:`Quantizer.select`.
        symmetric: quantize for TensorRT, see :class:`Quantizer`.
        sensitivity: the number of images on which the error of each layer is measured; 0 for none.
        about: further lines of the report.

    Returns:
        the report that the JSON file holds.

    Raises:
        ValueError: see :meth:`Quantizer.select` and :func:`export_dense_part`; or a file exists,
            and this package did not make it.
    """
    path, report_path = folder / "dense.int8.onnx", folder / "dense.int8.json"
    refuse_foreign([path, report_path, report_path.with_suffix(".md")])
    folder.mkdir(parents=True, exist_ok=True)
    float_path, _ = export_dense_part(model)
    images = preprocess(model, cfg, records)
    quantizer = Quantizer(float_path, images, symmetric=symmetric)
    layers = quantizer.select(keep_float)
    write_quantized(model, quantizer, layers, path)
    report = {
        **(about or {}),
        "environment": describe_environment("cpu"),
        "file": path.name,
        "form": "symmetric, for TensorRT" if symmetric else "for CPUs",
        "images": len(records),
        "megabytes": {
            "float32": round(float_path.stat().st_size / 1e6, 1),
            "INT8": round(path.stat().st_size / 1e6, 1),
        },
        "float layers": [name for name in quantizer.layers if name not in layers],
        **_compare(model, cfg, path),
    }
    if sensitivity:
        few = list(preprocess(model, cfg, records[:sensitivity]))
        report["sensitivity"] = quantizer.sensitivity(few)
    for file, text in (
        (report_path, json.dumps(report, indent=2) + "\n"),
        (report_path.with_suffix(".md"), to_markdown(report)),
    ):
        write_text(file, text)
    return report


def write_quantized(model: Any, quantizer: Quantizer, layers: Collection[str], path: Path) -> None:
    """Write a file for :func:`use_backend` with the dense part of a model, some layers of which are
    quantized."""
    quantized = quantizer.quantize(layers)
    mark_quantized(quantized, model_key(model), symmetric=quantizer.symmetric)
    with atomic_write(path) as partial:
        Path(partial).write_bytes(quantized.SerializeToString())


def preprocess(model: Any, cfg: CfgNode, records: Sequence[Record]) -> Iterator[Tensor]:
    """Yield each image as the detector gives it to its backbone: resized, normalised, padded."""
    mapper = build_mapper(cfg, is_train=False)
    for record in records:
        yield model.preprocess_image([mapper(record)]).tensor


class _Detections(DatasetEvaluator):
    """Keeps the detections of each image."""

    def __init__(self) -> None:
        self.found: list[Any] = []

    def reset(self) -> None:
        self.found = []

    def process(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        kept = (o["instances"].to("cpu") for o in outputs if "instances" in o)
        self.found += [(i.pred_boxes, i.scores, i.pred_classes) for i in kept]


def _compare(model: Any, cfg: CfgNode, int8: Path) -> dict[str, Any]:
    """Evaluate the detector in float and in INT8, and compare their detections."""
    if not cfg.DATASETS.TEST:
        return {}
    results, found = {}, {}
    for name, file in (("float32", ""), ("INT8", int8)):
        detections = _Detections()
        results[name] = evaluate(use_backend(model, BACKEND, int8=file), cfg, detections)
        found[name] = detections.found
    return {
        "data set": cfg.DATASETS.TEST[0],
        "results": results,
        "agreement": _agreement(found["float32"], found["INT8"]),
    }


def evaluate(model: nn.Module, cfg: CfgNode, *others: DatasetEvaluator) -> dict[str, float]:
    """Evaluate a detector on the first data set of ``DATASETS.TEST``.

    Args:
        others: evaluators that see the same predictions.

    Returns:
        the main metric of each task, such as ``{"bbox AP": 40.1, "segm AP": 36.2}``.
    """
    with tempfile.TemporaryDirectory() as folder:
        own = cfg.clone()
        own.OUTPUT_DIR, own.DATASETS.TEST = folder, cfg.DATASETS.TEST[:1]
        evaluator = build_evaluator(own, own.DATASETS.TEST[0])
        tasks = Trainer.test(own, model, [DatasetEvaluators([evaluator, *others])])
    return {
        f"{task} {metric}": values[metric]
        for task, values in tasks.items()
        for metric in [next(m for m in _METRICS if m in values)]
    }


def _agreement(expected: Sequence[Any], found: Sequence[Any]) -> dict[str, float]:
    """Compare the detections in INT8 (``found``) with those in float (``expected``). Each image has
    its boxes, scores and classes."""
    count = matched = 0
    differences: list[Tensor] = []
    for (boxes, scores, classes), (other_boxes, other_scores, other_classes) in zip(
        expected, found, strict=True
    ):
        sure = scores >= MIN_SCORE
        count += int(sure.sum())
        if not len(other_scores) or not sure.any():
            continue
        iou = pairwise_iou(boxes[sure], other_boxes)
        iou[classes[sure][:, None] != other_classes] = 0
        best, index = iou.max(dim=1)
        same = best >= MIN_IOU
        matched += int(same.sum())
        differences.append((other_scores[index] - scores[sure])[same].abs())
    return {
        "detections": count,
        "matched": matched / count if count else 1.0,
        "score difference": torch.cat(differences).mean().item() if matched else 0.0,
    }


def to_markdown(report: dict[str, Any]) -> str:
    """Write the report of :func:`quantize_detector` as a page."""
    facts = {k: v for k, v in report.items() if isinstance(v, str | int)} | report["environment"]
    rows = [["size of the file (MB)", *report["megabytes"].values()]]
    results = report.get("results", {"float32": {}})
    rows += [[name, *(f"{r[name]:.2f}" for r in results.values())] for name in results["float32"]]
    lines = [
        "# INT8",
        "",
        *(f"- {name}: {value}" for name, value in facts.items()),
        f"- not quantized: {', '.join(report['float layers']) or 'nothing'}",
        "",
        tabulate(rows, ["", "float32", "INT8"], tablefmt="github", disable_numparse=True),
        "",
    ]
    agreement = report.get("agreement")
    if agreement and not agreement["detections"]:
        lines += [f"There is no float32 detection with a score of at least {MIN_SCORE}.", ""]
    elif agreement:
        lines += [
            f"INT8 finds {agreement['matched']:.1%} of the {agreement['detections']} float32 "
            f"detections (score at least {MIN_SCORE}) again, with an IoU of at least {MIN_IOU}. "
            f"Their scores differ by {agreement['score difference']:.4f} on average. A box that "
            "has moved by a few pixels may not count as found again, so look at the AP first.",
            "",
        ]
    if errors := report.get("sensitivity"):
        table = [[name, f"{error:.5f}"] for name, error in errors.items()]
        headers = ["layer, quantized alone", "relative error of the outputs"]
        lines += [tabulate(table, headers, tablefmt="github", disable_numparse=True), ""]
    return "\n".join(lines)
