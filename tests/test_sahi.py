# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Detectors in SAHI, which docs/deploy.md describes.

SAHI itself is not needed. The tests load and call a detector as SAHI 0.12.8 does.
"""

from pathlib import Path

import numpy as np
import pytest
from detectron2.config import CfgNode, get_cfg
from detectron2.engine import DefaultPredictor
from export_models import FASTER_RCNN, MASK_RCNN
from predictor_runs import PICTURES, assert_close, save

from vovnet_d2 import Predictor
from vovnet_d2.data.image_file import read_image


def load_like_sahi(config_path: Path, weights: str) -> DefaultPredictor:
    cfg = get_cfg()
    cfg.set_new_allowed(True)
    cfg.merge_from_file(str(config_path))
    cfg.MODEL.WEIGHTS = weights
    cfg.MODEL.DEVICE = "cpu"
    return DefaultPredictor(cfg)


def predict_like_sahi(predictor: DefaultPredictor, rgb: np.ndarray) -> dict:
    return predictor(rgb[:, :, ::-1] if predictor.input_format == "BGR" else rgb)


@pytest.mark.parametrize(("config", "order"), [(MASK_RCNN, "BGR"), (FASTER_RCNN, "RGB")])
def test_a_saved_config_in_sahi(tmp_path: Path, config: str, order: str) -> None:
    """Compare detections with Predictor.

    For a network of RGB images, docs/deploy.md names an attribute to set. Without it, red and blue
    are swapped.
    """
    cfg: CfgNode = save(tmp_path, config, **{"INPUT.FORMAT": order})
    (tmp_path / "config.yaml").write_text(cfg.dump())
    predictor = load_like_sahi(tmp_path / "config.yaml", cfg.MODEL.WEIGHTS)
    assert predictor.input_format == order
    bgr = read_image(PICTURES[0])[::3, ::3]
    rgb = np.ascontiguousarray(bgr[:, :, ::-1])
    expected = Predictor(cfg)(bgr)
    if order == "RGB":
        boxes, swapped = (
            found["instances"].pred_boxes.tensor[:3]
            for found in (expected, predict_like_sahi(predictor, rgb))
        )
        assert not np.allclose(boxes, swapped, atol=1e-3)
        predictor.input_format = ""
    assert_close(predict_like_sahi(predictor, rgb), expected)
