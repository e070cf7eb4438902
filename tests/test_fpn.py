# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from detectron2.modeling import FPN
from detectron2.modeling.backbone.fpn import LastLevelMaxPool, LastLevelP6P7
from reference import assert_same_maps, thin

from vovnet_d2 import VOVNET_SPECS, VoVNet
from vovnet_d2.modeling.fpn import attach_fpn, strided_top_block

V19 = thin(VOVNET_SPECS["V-19-slim-eSE"])
STAGES = ["stage2", "stage3", "stage4", "stage5"]


def backbone(out_features=STAGES, **args) -> VoVNet:
    return VoVNet(V19, out_features=out_features, **args).eval()


def top_maps(block, x: torch.Tensor) -> list[torch.Tensor]:
    """Compute P6, and P7 if the block has it, from their definition."""
    maps = [F.conv2d(x, block.p6.weight, block.p6.bias, stride=2, padding=1)]
    if block.num_levels == 2:
        maps.append(F.conv2d(maps[0].relu(), block.p7.weight, block.p7.bias, stride=2, padding=1))
    return maps


@pytest.mark.parametrize("num_levels", [1, 2])
@pytest.mark.parametrize(("in_feature", "channels"), [("stage4", 48), ("stage5", 64), ("p5", 16)])
def test_strided_top_block(in_feature, channels, num_levels):
    block = strided_top_block(backbone(), 16, in_feature, num_levels)
    assert (block.in_feature, block.num_levels) == (in_feature, num_levels)
    assert block.p6.weight.shape == (16, channels, 3, 3)
    assert not block.p6.bias.any()
    bound = (3 / (channels * 9)) ** 0.5  # Xavier initialisation of Caffe2, as in Detectron2
    assert bound * 0.95 < block.p6.weight.abs().max() <= bound
    x = torch.randn(2, channels, 5, 4)
    actual, expected = block(x), top_maps(block, x)
    assert len(actual) == num_levels
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_no_top_levels():
    assert strided_top_block(backbone(), 16, "p5", 0) is None


@pytest.mark.parametrize("in_feature", ["stage5", "p5"])
@pytest.mark.parametrize("num_levels", [0, 1, 2])
def test_fpn_over_vovnet(num_levels, in_feature):
    bottom_up = backbone()
    top = strided_top_block(bottom_up, 16, in_feature, num_levels)
    model = attach_fpn(bottom_up, in_features=STAGES, out_channels=16, top_block=top).eval()
    levels = ["p2", "p3", "p4", "p5", "p6", "p7"][: 4 + num_levels]
    assert {n: s.stride for n, s in model.output_shape().items()} == {
        level: 2**exponent for exponent, level in enumerate(levels, start=2)
    }
    assert model.size_divisibility == 32
    x = torch.randn(1, 3, 128, 96)
    maps = model(x)
    assert list(maps) == levels
    for level, map_ in maps.items():
        stride = model.output_shape()[level].stride
        assert map_.shape == (1, 16, -(-128 // stride), -(-96 // stride))
    if top is not None:
        source = bottom_up(x)["stage5"] if in_feature == "stage5" else maps["p5"]
        assert_same_maps(
            dict(zip(levels[4:], [maps[level] for level in levels[4:]], strict=True)),
            dict(zip(levels[4:], top_maps(top, source), strict=True)),
        )


@pytest.mark.parametrize("fuse_type", ["sum", "avg"])
@pytest.mark.parametrize("norm", ["", "GN"])
def test_fpn_equals_that_of_detectron2(norm, fuse_type):
    """Compare with the FPN and the top block of Detectron2's ResNet with the same weights."""
    args = {"out_channels": 32, "norm": norm, "fuse_type": fuse_type}
    bottom_up = backbone()
    ours = attach_fpn(
        bottom_up,
        in_features=STAGES[1:],
        top_block=strided_top_block(bottom_up, 32, "stage5"),
        **args,
    ).eval()
    theirs = FPN(backbone(), STAGES[1:], top_block=LastLevelP6P7(64, 32, "stage5"), **args).eval()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(1, 3, 64, 96)
    assert_same_maps(ours(x), theirs(x), tolerance=0)


@pytest.mark.parametrize("num_levels", [-1, 3, None])
def test_wrong_number_of_top_levels(num_levels):
    message = f"top levels is {num_levels}: choose 0, 1 (P6) or 2 (P6, P7)"
    with pytest.raises(ValueError, match=re.escape(message)):
        strided_top_block(backbone(), 16, "p5", num_levels)


@pytest.mark.parametrize("in_feature", ["stage5", "res5", "p6"])
def test_wrong_source_of_top_levels(in_feature):
    message = f"from '{in_feature}': choose from stage2, stage3, p5; a stage must be among the"
    with pytest.raises(ValueError, match=re.escape(message)):
        strided_top_block(backbone(["stage2", "stage3"]), 16, in_feature)


@pytest.mark.parametrize(
    ("args", "in_features", "message"),
    [
        ({"out_features": STAGES[:3]}, STAGES, "asks for stage5, but the backbone returns st"),
        ({}, ["res4", "res5"], "asks for res4, res5, but the backbone returns stage2, stage3,"),
        ({}, [], "asks for nothing, but the backbone returns stage2, stage3, stage4, stage5:"),
        ({}, ["stage5", "stage4"], "stage5, stage4, with strides [32, 16]: FPN needs feature maps"),
        ({}, ["stage3", "stage5"], "stage3, stage5, with strides [8, 32]: FPN needs feature maps"),
        ({"stage5_dilation": 2}, STAGES, "with strides [4, 8, 16, 16]: FPN needs feature maps"),
        ({}, STAGES[:3], "from 'p5', but the FPN over stage2, stage3, stage4 has p2, p3, p4:"),
        (
            {"out_features": ["stem", "stage2"]},
            ["stem", "stage2"],
            "with strides [4, 4]: FPN needs feature maps whose strides double",
        ),
    ],
)
def test_features_that_do_not_fit(args, in_features, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        attach_fpn(
            backbone(**args),
            in_features=in_features,
            out_channels=16,
            top_block=LastLevelMaxPool(),
        )


def test_pooled_stem_can_be_a_level():
    bottom_up = VoVNet(replace(V19, stem="pooled"), out_features=["stem", *STAGES])
    model = attach_fpn(
        bottom_up, in_features=["stem", *STAGES], out_channels=16, top_block=LastLevelMaxPool()
    )
    shapes = {name: tuple(m.shape[2:]) for name, m in model(torch.zeros(1, 3, 64, 96)).items()}
    assert shapes == {
        "p1": (32, 48),
        "p2": (16, 24),
        "p3": (8, 12),
        "p4": (4, 6),
        "p5": (2, 3),
        "p6": (1, 2),
    }
