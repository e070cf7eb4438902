# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""The predictions at the end of a run are drawn next to the ground truth."""

import logging
import os
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import inference_context
from numpy.typing import NDArray
from torch import nn

from ..data.image_file import read_image
from ..data.mapper import Mapper, build_mapper
from ..data.record_files import spread
from .compilation import run_eagerly
from .num_classes import find_num_classes
from .precision import autocast

logger = logging.getLogger(__name__)

_NUM_IMAGES = 6
_MIN_SCORE = 0.5


def draw_predictions(cfg: CfgNode, model: nn.Module) -> str | None:
    """Draw the annotations of some images of the first data set in ``DATASETS.TEST``, and to the
    right of them the predictions of the model. Return the path of the picture, or None if there is
    no such data set, no image in it, or no OpenCV."""
    if not cfg.DATASETS.TEST or cfg.DATASETS.TEST[0] not in DatasetCatalog:
        return None
    try:
        from ..drawing.artist import Artist
        from ..drawing.sheet import write_sheet
    except ImportError as error:
        logger.warning("No picture of predictions (%s): pip install 'vovnet_d2[demo]'.", error)
        return None

    name = cfg.DATASETS.TEST[0]
    records = DatasetCatalog.get(name)
    records = [record for record in records if record.get("annotations")] or records
    if not records:
        return None
    chosen = {record["file_name"]: record for record in spread(records, _NUM_IMAGES)}.values()
    artist = Artist(MetadataCatalog.get(name))
    mapper = build_mapper(cfg, is_train=False)  # one for all images, as each logs a line
    title = f"ground truth · {_predictions_title(cfg)}"
    path = os.path.join(cfg.OUTPUT_DIR, "predictions.png")
    pairs = [_draw_pair(cfg, model, record, artist, mapper) for record in chosen]
    write_sheet(path, [(title, pair) for pair in pairs])
    return path


def _predictions_title(cfg: CfgNode) -> str:
    """Return the title of a picture of predictions. Label maps have no scores."""
    has_scores = "thing_classes" in find_num_classes(cfg) or not find_num_classes(cfg)
    return f"predictions (score ≥ {_MIN_SCORE:.0%})" if has_scores else "predictions"


def _draw_pair(
    cfg: CfgNode, model: nn.Module, record: dict[str, Any], artist: Any, mapper: Mapper
) -> NDArray[np.uint8]:
    """Return a picture (H, 2 W, 3), RGB."""
    from ..drawing.artist import Shown
    from ..drawing.sheet import enlargement
    from ..drawing.shown import from_record

    image = read_image(record["file_name"])
    metadata = MetadataCatalog.get(cfg.DATASETS.TEST[0])
    truth = from_record(record, image.shape[:2], metadata)
    precision = autocast(cfg, enabled=cfg.TEST.AMP.ENABLED)
    with inference_context(model), torch.no_grad(), precision, run_eagerly(cfg):
        output = model([mapper(record)])[0]
    found = Shown()
    if "instances" in output:
        instances = output["instances"].to("cpu")
        found = Shown(instances[instances.scores >= _MIN_SCORE])
    elif "sem_seg" in output:
        found = Shown(labels=output["sem_seg"].argmax(dim=0).cpu())
    scale = enlargement(image)
    drawn = [artist.draw(image, shown, scale=scale) for shown in (truth, found)]
    return np.concatenate(drawn, axis=1)[:, :, ::-1]
