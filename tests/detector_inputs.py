# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Tiny detectors of every kind, and images with objects as their inputs."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.modeling.meta_arch.fcos import FCOSHead
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from detectron2.structures import Boxes, Instances, Keypoints, PolygonMasks
from engine_runs import MASK_RCNN, RETINANET, tiny_config
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from vovnet_d2.engine import load_config
from vovnet_d2.modeling.gfl import GFLHead

FCOS = ["MODEL.FCOS.NORM", "", "MODEL.FCOS.INFERENCE_TH_TEST", "0.0"]
CASCADE = ["MODEL.ROI_HEADS.NAME", "CascadeROIHeads", "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG"]
KEYPOINTS = ["MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS", "(16,)"]
PANOPTIC = ["MODEL.META_ARCHITECTURE", "PanopticFPN", "MODEL.SEM_SEG_HEAD.CONVS_DIM", "32"]
WIDTHS = "(16, 16, 16, 16)"
SSD = ["MODEL.VOVNET.CONV_BODY", "V-27-slim", "MODEL.VOVNET.STEM_CHANNELS", "(16, 16, 16)"]
SSD += ["MODEL.VOVNET.STAGE_MID_CHANNELS", WIDTHS, "MODEL.VOVNET.STAGE_OUT_CHANNELS", WIDTHS]
SSD += ["MODEL.REFINEDET.TCB_CHANNELS", "16", "MODEL.REFINEDET.EXTRA_CHANNELS", "16"]
SSD += ["MODEL.REFINEDET.HEAD_CHANNELS", "16", "MODEL.SINGLE_SHOT.SCORE_THRESH_TEST", "0.0"]
DETECTORS: dict[str, tuple[str, list[str]]] = {
    "Mask R-CNN": (MASK_RCNN, []),
    "Cascade R-CNN": (MASK_RCNN, [*CASCADE, "True"]),
    "Keypoint R-CNN": ("COCO-Keypoints/keypoint_rcnn_V_39_eSE_FPN_3x.yaml", KEYPOINTS),
    "Panoptic FPN": (MASK_RCNN, PANOPTIC),
    "RetinaNet": (RETINANET, []),
    "FCOS": ("COCO-Detection/fcos_V_39_eSE_FPN_1x.yaml", FCOS),
    "GFL": ("COCO-Detection/gfl_V_39_eSE_FPN_1x.yaml", FCOS),
    "DSOD": ("PascalVOC-Detection/dsod300_V_27_slim_100k.yaml", SSD),
    "RefineDet": ("PascalVOC-Detection/refinedet320_V_39_120k.yaml", SSD),
}


def detector_config(name: str, *options: str) -> Any:
    """Return the config of a tiny detector. Single-shot detectors keep their image size."""
    config, own = DETECTORS[name]
    if own is not SSD:
        return tiny_config(config, Path("out"), *own, *options)
    return load_config(config, ["MODEL.DEVICE", "cpu", *own, *options])


def make_it_detect(model: Any) -> Any:
    """Make a dense head predict boxes with sides of a few strides and with different scores.

    The scores differ because equal scores have no fixed order. The norms take their statistics
    from one batch.
    """
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.momentum = 1.0
    head = getattr(model, "head", None)
    if isinstance(head, RetinaNetHead):
        for module in head.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
    if isinstance(head, GFLHead):
        bins = model.box2box_transform.bins
        head.bbox_pred.bias.data = -torch.arange(float(bins)).repeat(4)
    elif isinstance(head, FCOSHead):
        nn.init.constant_(head.bbox_pred.bias, 1.3)
    return model


def samples(name: str, *, labelled: bool) -> list[dict[str, Any]]:
    """Return two images for a detector, in Detectron2's form. Each has two objects if ``labelled``.

    The images are small. Only single-shot detectors get their usual size.
    """
    side = 320 if DETECTORS[name][1] is SSD else 160
    return [_sample(size, labelled=labelled) for size in ((side, side), (side, side * 9 // 10))]


def _sample(size: tuple[int, int], *, labelled: bool) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=generator)
    sample: dict[str, Any] = {"image": image, "height": size[0], "width": size[1]}
    if labelled:
        objects = Instances(size)
        boxes = torch.tensor([[8.0, 16, 120, 100], [150, 40, 280, 310]])
        objects.gt_boxes = Boxes(boxes * size[0] / 320)
        objects.gt_classes = torch.tensor([0, 0])
        corners = objects.gt_boxes.tensor.tolist()
        triangles = [np.array([x0, y0, x1, y0, x1, y1]) for x0, y0, x1, y1 in corners]
        objects.gt_masks = PolygonMasks([[triangle] for triangle in triangles])
        visible = torch.full((2, 1), 2.0)
        keypoint = torch.cat([objects.gt_boxes.get_centers(), visible], dim=1)
        objects.gt_keypoints = Keypoints(keypoint[:, None].repeat(1, 17, 1))
        sample |= {"instances": objects, "sem_seg": torch.ones(size, dtype=torch.int64)}
    return sample
