# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""The files that a run leaves in its folder: results.md, results.json, and two pictures."""

import argparse
import datetime
import json
import logging
import math
import os
import platform
from collections.abc import Callable
from typing import Any

import detectron2
import torch
import torchvision
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from tabulate import tabulate
from torch import nn

from ..atomic import write_text
from ..backends import TORCH
from ..drawing.curves import draw_curves
from ..words import counted
from .detection_limit import explain_crowding
from .pictures import draw_predictions

logger = logging.getLogger(__name__)

# Meta-architecture to the node and key that hold its score threshold.
_SCORE_THRESHOLDS = {
    "GeneralizedRCNN": ("ROI_HEADS", "SCORE_THRESH_TEST"),
    "PanopticFPN": ("ROI_HEADS", "SCORE_THRESH_TEST"),
    "RetinaNet": ("RETINANET", "SCORE_THRESH_TEST"),
    "FCOS": ("FCOS", "INFERENCE_TH_TEST"),
}


def write_report(
    cfg: CfgNode,
    model: nn.Module,
    results: dict[str, Any],
    *,
    args: argparse.Namespace,
    seconds: float,
    earlier_seconds: float = 0.0,
    length: str = "",
) -> None:
    """Log the results as a table, and write the report to ``OUTPUT_DIR``.

    Args:
        cfg: the config of the run.
        model: the model at the end of the run.
        results: the results of :meth:`Trainer.test`.
        args: command-line arguments; their ``command``, if there is one, goes into the report.
        seconds: wall time of the run.
        earlier_seconds: wall time of the training before this run resumed it.
        length: iterations and epochs of a training; empty for an evaluation.
    """
    notes = _describe_crowding(cfg, results)
    table = "\n\n".join([format_results(cfg, results), *notes])
    logger.info("Results:\n%s", table)
    facts = _describe_run(cfg, args, length, seconds, earlier_seconds)
    content = {"run": facts, "results": _without_nan(_by_dataset(cfg, results))}
    content |= {"notes": notes} if notes else {}
    _write(cfg, "results.json", json.dumps(content, indent=2) + "\n")
    paths = _draw(draw_curves, cfg.OUTPUT_DIR), _draw(draw_predictions, cfg, model)
    pictures = [f"![]({os.path.basename(path)})" for path in paths if path]
    rows = tabulate(facts.items(), headers=["run", ""], tablefmt="pipe", disable_numparse=True)
    _write(cfg, "results.md", "\n\n".join(["# Results", table, rows, *pictures]) + "\n")
    folder = os.path.abspath(cfg.OUTPUT_DIR)
    logger.info("The report is in %s. As a page: python tools/report.py %s", folder, folder)


def _draw(draw: Callable[..., str | None], *args: Any) -> str | None:
    """Draw a picture and return its path. If that fails, log a warning and return None, so that the
    results are not lost.
    """
    try:
        return draw(*args)
    except Exception:
        logger.warning("A picture could not be drawn and is missing in the report:", exc_info=True)
        return None


def format_results(cfg: CfgNode, results: dict[str, Any]) -> str:
    """Format results as Markdown tables: a row for each task, a table for each set of metrics.

    Metrics of single categories, such as ``AP-dog``, are left out. A metric that could not be
    computed is shown as "–". If a task has no other metric, a sentence says why.
    """
    tables: dict[tuple[str, ...], list[list[str]]] = {}
    notes = []
    for dataset, tasks in _by_dataset(cfg, results).items():
        if not tasks:
            notes.append(f"{dataset} has no annotations to compare the predictions with.")
        for task, metrics in tasks.items():
            metrics = {name: value for name, value in metrics.items() if "-" not in name}
            cells = [f"{v:.2f}" if _is_known(v) else "–" for v in metrics.values()]
            tables.setdefault(tuple(metrics), []).append([dataset, task, *cells])
            if metrics and not any(map(_is_known, metrics.values())):
                notes.append(f"{task}: {_explain_missing(cfg, dataset)}")
    parts = [
        tabulate(rows, headers=["data", "task", *names], tablefmt="pipe", disable_numparse=True)
        for names, rows in tables.items()
    ]
    return "\n\n".join(parts + list(dict.fromkeys(notes))) or "Nothing was evaluated."


def _describe_crowding(cfg: CfgNode, results: dict[str, Any]) -> list[str]:
    """Return a sentence for each data set with more objects than a network may find."""
    data_sets = [name for name, tasks in _by_dataset(cfg, results).items() if "bbox" in tasks]
    found = {name: explain_crowding(cfg, DatasetCatalog.get(name)) for name in data_sets}
    return [f"{name}: {sentence}." for name, sentence in found.items() if sentence]


def _is_known(value: float) -> bool:
    """Return True if a metric has a value.

    COCO's metrics are NaN, and LVIS's negative, if there is nothing to compute them from.
    """
    return math.isfinite(value) and value >= 0


def _explain_missing(cfg: CfgNode, dataset: str) -> str:
    if not any(record.get("annotations") for record in DatasetCatalog.get(dataset)):
        return f"{dataset} has no annotated objects, so there is nothing to compare with."
    node, key = _SCORE_THRESHOLDS.get(cfg.MODEL.META_ARCHITECTURE, ("", ""))
    threshold = f" (MODEL.{node}.{key} {cfg.MODEL[node][key]})" if node else ""
    return (
        f"no predictions above the score threshold{threshold} on {dataset}. The network has "
        "learned too little yet, or its weights were not loaded."
    )


def _by_dataset(cfg: CfgNode, results: dict[str, Any]) -> dict[str, Any]:
    """Return results by the name of the data set, which Detectron2 leaves out for a single one."""
    return {cfg.DATASETS.TEST[0]: results} if len(cfg.DATASETS.TEST) == 1 else results


def _describe_run(
    cfg: CfgNode, args: argparse.Namespace, length: str, seconds: float, earlier_seconds: float
) -> dict[str, str]:
    device = torch.device(cfg.MODEL.DEVICE)
    if device.type == "cuda":
        name = f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}"
    else:
        name = f"CPU ({platform.machine()}), {counted(torch.get_num_threads(), 'threads')}"
    facts = {
        "config": args.config_file or "none",
        "weights": cfg.MODEL.WEIGHTS or "none",
        "command": getattr(args, "command", ""),
        "kind": f"training, {length}" if length else "evaluation",
        "device": name,
        "backend": "" if length else _describe_backend(cfg),
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}, "
        f"torchvision {torchvision.__version__}, detectron2 {detectron2.__version__}",
        "wall time": _format_time(earlier_seconds + seconds)
        + (f", of which {_format_time(seconds)} since --resume" if earlier_seconds else ""),
        "date": datetime.date.today().isoformat(),
    }
    return {key: value for key, value in facts.items() if value}


def _describe_backend(cfg: CfgNode) -> str:
    if cfg.TEST.BACKEND == TORCH:
        return ""
    precision = f"INT8 ({cfg.TEST.INT8})" if cfg.TEST.INT8 else "float32"
    if cfg.TEST.AMP.ENABLED and not cfg.TEST.INT8:
        precision = "half precision"
    return f"{cfg.TEST.BACKEND}, {precision}"


def _format_time(seconds: float) -> str:
    return str(datetime.timedelta(seconds=round(seconds)))


def _without_nan(value: Any) -> Any:
    """Replace NaN, which JSON lacks, by None."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    return float(value) if math.isfinite(value) else None


def _write(cfg: CfgNode, name: str, text: str) -> None:
    write_text(os.path.join(cfg.OUTPUT_DIR, name), text)
