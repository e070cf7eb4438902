# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Networks on a GPU, tested without a GPU by torch's fake tensors.

A fake tensor has a device and a shape, and its operators refuse operands on different devices. It
has no values, so targets, losses and the selection of boxes cannot be tested. The backward pass of
fake tensors needs a GPU.
"""

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from detectron2.modeling import build_model
from devices import INITIALISATIONS
from engine_runs import MASK_RCNN, RETINANET, tiny_config
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_leaves

from vovnet_d2.engine import load_config

CONFIGS = {
    MASK_RCNN: {},
    RETINANET: {},
    "COCO-Detection/fcos_V_39_eSE_FPN_1x.yaml": {"MODEL.FCOS.NORM": ""},
    "COCO-Detection/gfl_V_39_eSE_FPN_1x.yaml": {"MODEL.FCOS.NORM": ""},
    "COCO-Keypoints/keypoint_rcnn_V_39_eSE_FPN_3x.yaml": {},
    "PascalVOC-Detection/dsod300_V_27_slim_100k.yaml": None,
    "PascalVOC-Detection/refinedet320_V_39_120k.yaml": None,
}


def build_on_fake_gpu(name: str) -> Any:
    """Build a network without initialisation, because fake parameters have no values."""
    own = CONFIGS[name]
    words = [word for pair in ({"MODEL.DEVICE": "cuda"} | (own or {})).items() for word in pair]
    cfg = load_config(name, words) if own is None else tiny_config(name, Path("out"), *words)
    nothing = dict.fromkeys(INITIALISATIONS, lambda tensor, *args, **options: tensor)
    with (
        mock.patch.multiple(nn.init, **nothing),
        mock.patch.object(nn.Module, "to", lambda self, *_: self),  # they are on the GPU
        torch.device("cuda"),
    ):
        return build_model(cfg).train()


def dense_part(model: Any, images: Tensor) -> list[Any]:
    """Return the outputs that do not depend on values: feature maps, predictions and anchors."""
    features = model.backbone(images)
    generator: Any = getattr(model, "proposal_generator", None)
    if generator is not None:  # two stages
        maps = [features[name] for name in generator.in_features]
        return [features, generator.rpn_head(maps), generator.anchor_generator(maps)]
    names = getattr(model, "head_in_features", None) or list(features)
    maps = [features[name] for name in names]
    return [features, model.head(maps), model.anchor_generator(maps)]


def fake_tensors_need_a_driver() -> bool:
    """Return True for torch 2.6, whose operators ask the CUDA driver even for fake tensors."""
    with FakeTensorMode():
        try:
            torch.empty(1, device="cuda").uniform_()
        except RuntimeError as error:
            if "driver" not in str(error).lower():
                raise
            return True
    return False


@pytest.mark.skipif(fake_tensors_need_a_driver(), reason="this torch needs a CUDA driver")
@pytest.mark.parametrize("name", CONFIGS)
def test_everything_is_on_the_gpu(name: str) -> None:
    with FakeTensorMode():
        model = build_on_fake_gpu(name)
        assert {p.device.type for p in (*model.parameters(), *model.buffers())} == {"cuda"}
        images = torch.empty(2, 3, 320, 320, device="cuda")
        leaves = tree_leaves(dense_part(model, images))
        found = [getattr(each, "tensor", each) for each in leaves]
        assert {(x.device.type, x.dtype) for x in found} == {("cuda", torch.float32)}
