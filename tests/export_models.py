# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Untrained detectors that still find something, for the tests of export."""

from dataclasses import replace

import export_model
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from reference import TABLE, random_state, thin
from sklearn.datasets import load_sample_images
from torch import Tensor, from_numpy, nn

from vovnet_d2.engine import load_config

# Blocks have one layer, because exporters take long for each. test_vovnet.py exports longer chains.
NET = replace(thin(TABLE["V-19-slim-eSE"]), layers_per_block=1)

RETINANET = "COCO-Detection/retinanet_V_19_slim_eSE_FPN_3x.yaml"
GFL = "COCO-Detection/gfl_V_19_slim_eSE_FPN_3x.yaml"
FASTER_RCNN = "COCO-Detection/faster_rcnn_V_19_slim_eSE_FPN_3x.yaml"
MASK_RCNN = "COCO-InstanceSegmentation/mask_rcnn_V_19_slim_eSE_FPN_3x.yaml"

OPTIONS = {
    "MODEL.DEVICE": "cpu",
    "MODEL.WEIGHTS": "",
    "MODEL.PIXEL_STD": [57.4, 57.1, 58.4],
    **{f"MODEL.VOVNET.{field.upper()}": value for field, value in vars(NET).items()},
    "MODEL.FPN.OUT_CHANNELS": 32,
    "MODEL.ROI_BOX_HEAD.FC_DIM": 32,
    "MODEL.ROI_MASK_HEAD.CONV_DIM": 32,
    "MODEL.ROI_HEADS.NUM_CLASSES": 5,
    "MODEL.RETINANET.NUM_CLASSES": 5,
    "MODEL.FCOS.NUM_CLASSES": 5,
    "MODEL.FCOS.NORM": "",  # group norm refuses feature maps of one pixel
    # These options give many boxes that do not cover the whole picture.
    "MODEL.FCOS.REG_MAX": 2,
    "MODEL.FCOS.PRIOR_PROB": 0.2,
}


def small_config(name: str, **options) -> CfgNode:
    options = OPTIONS | {key.replace("__", "."): value for key, value in options.items()}
    return load_config(name, [str(word) for option in options.items() for word in option])


def build_detector(cfg: CfgNode) -> nn.Module:
    """Build a detector with random weights whose scores are spread over (0, 1).

    After the usual initialisation the scores are almost equal, so rounding would decide which
    boxes are kept.
    """
    model = build_model(cfg).eval()
    model.backbone.bottom_up.load_state_dict(random_state(NET), strict=False)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and not name.startswith("backbone.bottom_up"):
            nn.init.kaiming_normal_(parameter)
            if "bbox" in name or "deltas" in name:
                parameter.data *= 0.1
            if name == "head.cls_score.weight":
                parameter.data *= 0.25
    return model


def pictures() -> list[Tensor]:
    """Return three photographs (1, 3, H, W) in BGR. Two of the three sizes are odd."""
    china, flower = (
        from_numpy(image.transpose(2, 0, 1)[None, ::-1].copy()).float()
        for image in load_sample_images().images
    )
    return [china[..., ::2, ::2], flower[..., 100:301:2, 200:451:2], china[..., 31:220, 67:300]]


def run_export(words: list[str]) -> None:
    """Run tools/export_model.py, but let errors be raised instead of printed."""
    export_model.run(export_model.argument_parser().parse_args(words))
