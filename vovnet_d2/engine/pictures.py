# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Pictures of a run: its curves, and its predictions beside the ground truth."""

from __future__ import annotations

import json
import logging
import os
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.catalog import Metadata
from detectron2.evaluation import inference_context
from detectron2.structures import Instances
from torch import nn

from ..checkpoint.atomic import atomic_write
from ..data.image_file import read_image, read_labels
from ..data.label_colors import with_stuff_colors
from ..data.mapper import build_mapper
from ..data.records import find_absurd
from .checks import find_num_classes
from .plain_text import plain_text
from .precision import autocast

__all__ = [
    "SCORES",
    "Series",
    "draw_curves",
    "draw_predictions",
    "drawable",
    "enlargement",
    "read_metrics",
    "without_thin_masks",
]

logger = logging.getLogger(__name__)

_NUM_IMAGES = 6
# Pixels to enlarge small images to, and thin ones at most; the labels stay the same.
_SHORT_SIDE, _LONG_SIDE = 300, 1200
_MIN_SCORE = 0.5

Series = dict[str, list[tuple[int, float]]]


def read_metrics(path: str) -> Series:
    """Detectron2's ``metrics.json`` as ``{name: [(iteration, value), ...]}``.

    Runs append to the file. A run that starts anew or resumes takes the place of what an earlier
    one wrote for the same iterations. A line that was cut, as by a kill, is left out, as is any
    other that Detectron2 does not write.
    """
    series: Series = {}
    last = -1
    with open(path, encoding="utf-8") as file:
        for line in file:
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue
            if not isinstance(row, dict) or "iteration" not in row:
                continue
            iteration = row.pop("iteration")
            if "total_loss" in row:  # rows of evaluations are not in order
                if iteration <= last:
                    series = {
                        name: [point for point in points if point[0] < iteration]
                        for name, points in series.items()
                    }
                last = iteration
            for name, value in row.items():
                series.setdefault(name, []).append((iteration, value))
    return {name: points for name, points in series.items() if points}


def draw_curves(folder: str) -> str | None:
    """Draw the losses in ``folder/metrics.json``, and AP where it was evaluated.

    Returns:
        the path of the picture, or None if nothing was trained.
    """
    metrics = os.path.join(folder, "metrics.json")
    if not os.path.isfile(metrics):
        return None
    series = read_metrics(metrics)
    losses = {name: points for name, points in series.items() if "loss" in name}
    scores = {name: points for name, points in series.items() if name.endswith(SCORES)}
    if not losses:
        return None
    from matplotlib.figure import Figure  # draws without a display, unlike pyplot

    figure = Figure(figsize=(10, 8 if scores else 5), layout="constrained")
    panels = figure.subplots(2 if scores else 1, sharex=True, squeeze=False)[:, 0]
    with plain_text():
        _draw_panel(panels[0], losses, "loss (median of 20 iterations)")
        if scores:
            _draw_panel(panels[1], scores, "on the validation data (%)")
    panels[-1].set_xlabel("iteration")
    panels[-1].xaxis.get_major_locator().set_params(integer=True)
    path = os.path.join(folder, "loss_curve.png")
    with atomic_write(path) as partial:
        figure.savefig(partial, dpi=120, format="png")
    return path


# The metrics among the series that sum an evaluation up.
SCORES = ("/AP", "/mIoU", "/IoU", "/PQ", "/top1")


def _draw_panel(panel: Any, series: Series, label: str) -> None:
    for name, points in sorted(series.items(), key=lambda item: item[0] != "total_loss"):
        panel.plot(
            *zip(*points, strict=True),
            label=name,
            linewidth=2.5 if name == "total_loss" else 1.2,
            color="black" if name == "total_loss" else None,
            marker="o" if len(points) < 20 else None,
            markersize=4,
        )
    panel.set_ylabel(label)
    panel.set_ylim(bottom=0)
    panel.grid(alpha=0.3)
    panel.legend(fontsize=9, loc="upper left", bbox_to_anchor=(1, 1))  # beside the curves


def draw_predictions(cfg: CfgNode, model: nn.Module) -> str | None:
    """Draw predictions on some images of the first data set in ``DATASETS.TEST``, beside what is
    annotated there.

    Returns:
        the path of the picture, or None if there is no such data set, no image in it, or no OpenCV.
    """
    if not cfg.DATASETS.TEST or cfg.DATASETS.TEST[0] not in DatasetCatalog:
        return None
    try:
        from detectron2.utils import visualizer  # noqa: F401
    except ImportError as error:
        logger.warning("No picture of predictions (%s): pip install 'vovnet_d2[demo]'.", error)
        return None
    from matplotlib.figure import Figure

    name = cfg.DATASETS.TEST[0]
    metadata = with_stuff_colors(MetadataCatalog.get(name))
    records = DatasetCatalog.get(name)
    records = [record for record in records if record.get("annotations")] or records
    if not records:
        return None
    chosen = [records[i * len(records) // _NUM_IMAGES] for i in range(_NUM_IMAGES)]
    chosen = list({record["file_name"]: record for record in chosen}.values())
    pairs = [_draw_pair(cfg, model, record, metadata) for record in chosen]

    rows = (len(pairs) + 1) // 2
    figure = Figure(figsize=(16, 4.2 * rows), layout="constrained")
    panels = figure.subplots(rows, 4, squeeze=False)
    for panel in panels.flat:
        panel.set_axis_off()
    for panel, image, title in zip(
        panels.flat,
        [image for pair in pairs for image in pair],
        ["ground truth", _predictions_title(cfg)] * len(pairs),
        strict=False,
    ):
        panel.imshow(image)
        panel.set_title(title, fontsize=11)
    path = os.path.join(cfg.OUTPUT_DIR, "predictions.png")
    with atomic_write(path) as partial:
        figure.savefig(partial, dpi=120, format="png")
    return path


def drawable(record: dict[str, Any], image: np.ndarray) -> dict[str, Any]:
    """Make a record one that Detectron2's visualizer draws as training reads it: of objects with
    absurd numbers none, masks and keypoints where all objects have them, and the label map.

    Raises:
        FileNotFoundError, ValueError: see :func:`read_labels`; or its size is not the image's.
    """
    annotations = []
    for index, annotation in enumerate(record.get("annotations", [])):
        if problem := find_absurd(annotation, *image.shape[1::-1]):
            logger.warning("Object %d of %s has %s.", index, record["file_name"], problem)
        else:
            annotations.append(annotation)
    for key in ("segmentation", "keypoints"):
        if not all(annotation.get(key) for annotation in annotations):
            annotations = [{k: v for k, v in a.items() if k != key} for a in annotations]
    record = {**record, "annotations": annotations}
    if "sem_seg_file_name" in record:
        labels = read_labels(file := record["sem_seg_file_name"])
        if labels.shape != image.shape[:2]:
            sizes = " and ".join(f"{s[1]} x {s[0]}" for s in (labels.shape, image.shape))
            raise ValueError(f"{file} is not of the size of its picture: {sizes} pixels.")
        record["sem_seg"] = labels
    return record


def without_thin_masks(found: Instances) -> Instances:
    """Leave out masks that are two pixels wide, which Detectron2's visualizer refuses."""
    if not found.has("pred_masks") or found.image_size[1] != 2:
        return found
    fields = {name: value for name, value in found.get_fields().items() if name != "pred_masks"}
    return Instances(found.image_size, **fields)


def enlargement(image: np.ndarray) -> float:
    """Return the factor by which an image (H, W, 3) is enlarged to be drawn on."""
    short, long = sorted(image.shape[:2])
    return max(1.0, min(_SHORT_SIDE / short, _LONG_SIDE / long))


def _predictions_title(cfg: CfgNode) -> str:
    """Label maps have no scores."""
    has_scores = "thing_classes" in find_num_classes(cfg) or not find_num_classes(cfg)
    return f"predictions (score ≥ {_MIN_SCORE:.0%})" if has_scores else "predictions"


@plain_text()
def _draw_pair(
    cfg: CfgNode, model: nn.Module, record: dict[str, Any], metadata: Metadata
) -> tuple[np.ndarray, np.ndarray]:
    """Pictures (H, W, 3) of the annotations and of the predictions for one image."""
    from detectron2.utils.visualizer import Visualizer

    image = read_image(record["file_name"], "RGB")
    scale = enlargement(image)
    truth = Visualizer(image, metadata, scale=scale)
    truth = truth.draw_dataset_dict(drawable(record, image))

    with inference_context(model), torch.no_grad(), autocast(cfg, enabled=cfg.TEST.AMP.ENABLED):
        output = model([build_mapper(cfg, is_train=False)(record)])[0]
    canvas = Visualizer(image, metadata, scale=scale)
    if "instances" in output:
        instances = output["instances"].to("cpu")
        shown = without_thin_masks(instances[instances.scores >= _MIN_SCORE])
        drawn = canvas.draw_instance_predictions(shown)
    elif "sem_seg" in output:
        drawn = canvas.draw_sem_seg(output["sem_seg"].argmax(dim=0).cpu())
    else:
        drawn = canvas.get_output()
    return truth.get_image(), drawn.get_image()
