# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Small detectors that are saved for Predictor, and functions that compare predictions."""

from pathlib import Path

import sklearn.datasets
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.structures import Instances
from export_models import FASTER_RCNN, GFL, MASK_RCNN, RETINANET, build_detector, small_config

PICTURES = sorted((Path(sklearn.datasets.__file__).parent / "images").glob("*.jpg"))

SMALL = {
    "INPUT.MIN_SIZE_TEST": 96,
    "INPUT.MAX_SIZE_TEST": 128,
    "MODEL.RPN.POST_NMS_TOPK_TEST": 60,
    "TEST.DETECTIONS_PER_IMAGE": 15,
}
SEMANTIC = {"MODEL.META_ARCHITECTURE": "SemanticSegmentor"}
PANOPTIC = {"MODEL.META_ARCHITECTURE": "PanopticFPN"}
STUFF = {"MODEL.SEM_SEG_HEAD.NUM_CLASSES": 7, "MODEL.SEM_SEG_HEAD.CONVS_DIM": 16}
STUFF |= {
    "MODEL.SEM_SEG_HEAD.IN_FEATURES": ["p2", "p3"],
    "MODEL.SEM_SEG_HEAD.NORM": "",
    "MODEL.PANOPTIC_FPN.COMBINE.INSTANCES_CONFIDENCE_THRESH": 0.2,
    "MODEL.PANOPTIC_FPN.COMBINE.STUFF_AREA_LIMIT": 100,
}
KEYPOINTS = {
    "MODEL.KEYPOINT_ON": True,
    "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS": "(16,)",
    "MODEL.CHANNELS_LAST": False,
    "MODEL.ROI_HEADS.NUM_CLASSES": 1,
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.0,
    "TEST.DETECTIONS_PER_IMAGE": 5,  # keypoint heat maps are resized to the size of each box
}
DETECTORS = {
    "Mask R-CNN": (MASK_RCNN, {}),
    "Faster R-CNN, RGB": (FASTER_RCNN, {"INPUT.FORMAT": "RGB"}),
    "RetinaNet": (RETINANET, {"MODEL.RETINANET.SCORE_THRESH_TEST": 0.01}),
    "GFL": (GFL, {}),
    "Keypoint R-CNN": (FASTER_RCNN, KEYPOINTS),
    "semantic FPN": (MASK_RCNN, SEMANTIC | STUFF),
    "panoptic FPN": (MASK_RCNN, PANOPTIC | STUFF),
}


def save(folder: Path, config: str = MASK_RCNN, **options) -> CfgNode:
    """Return a config, and save the weights that it names in ``folder``."""
    options = SMALL | options
    cfg = small_config(config, **options)
    DetectionCheckpointer(build_detector(cfg), str(folder)).save("weights")
    cfg.MODEL.WEIGHTS = str(folder / "weights.pth")
    return cfg


def assert_close(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if name == "instances":
            assert_same_instances(found[name], value)
        elif name == "panoptic_seg":
            assert (found[name][0] != value[0]).float().mean() < 0.002
            assert [s["category_id"] for s in found[name][1]] == [
                s["category_id"] for s in value[1]
            ]
        else:
            torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-3)


def assert_same_instances(found: Instances, expected: Instances) -> None:
    assert found.image_size == expected.image_size
    assert len(found) == len(expected)
    torch.testing.assert_close(found.scores, expected.scores, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(
        found.pred_boxes.tensor, expected.pred_boxes.tensor, rtol=1e-3, atol=0.02
    )
    assert torch.equal(found.pred_classes, expected.pred_classes)
    if expected.has("pred_masks"):
        assert (found.pred_masks != expected.pred_masks).float().mean() < 0.002
    if expected.has("pred_keypoints"):  # x and y may belong to another maximum of the same height
        close = (found.pred_keypoints - expected.pred_keypoints).abs() < 0.1
        assert close.float().mean() > 0.99
