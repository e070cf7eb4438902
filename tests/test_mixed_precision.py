# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Boxes, scores and keypoints of heads are float32 in mixed precision."""

import copy
import math

import pytest
import torch
from detector_inputs import DETECTORS, detector_config, make_it_detect, samples
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.roi_heads import FastRCNNOutputLayers, KRCNNConvDeconvUpsampleHead
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import nn

from vovnet_d2.engine import Trainer, load_config
from vovnet_d2.engine.precision import predict_in_float32

UNIT = 2.0**-8  # largest relative error of rounding to bfloat16
FAR = torch.tensor([[801.3, 700.6, 913.9, 790.2], [641.7, 530.1, 702.2, 899.9]])  # pixels


def mixed(model: nn.Module) -> nn.Module:
    return predict_in_float32(model, load_config("", ["SOLVER.AMP.ENABLED", "True"]))


def give_heads_bfloat16(backbone: nn.Module) -> None:
    """Let heads return bfloat16, but compute in float32, which is faster on some CPUs."""
    forward = backbone.forward

    def forward_in_float32(x: torch.Tensor) -> dict[str, torch.Tensor]:
        with torch.autocast("cpu", enabled=False):
            return {name: y.bfloat16() for name, y in forward(x).items()}

    backbone.forward = forward_in_float32


@pytest.mark.parametrize("name", DETECTORS)
def test_boxes_and_scores_are_float32(name: str) -> None:
    """Check dtypes, and that some scores have more digits than bfloat16."""
    torch.manual_seed(0)
    model = make_it_detect(Trainer.build_model(detector_config(name, "TEST.AMP.ENABLED", "True")))
    give_heads_bfloat16(model.backbone)
    with torch.autocast("cpu", torch.bfloat16):
        with EventStorage():
            losses = model.train()(samples(name, labelled=True))
        with torch.no_grad():
            found = model.eval()(samples(name, labelled=False))[0]["instances"]
    assert {loss.dtype for loss in losses.values()} == {torch.float32}
    assert len(found)
    fields = [found.pred_boxes.tensor, found.scores]
    if found.has("pred_keypoints"):
        fields += [found.pred_keypoints, found.pred_keypoint_heatmaps]
    for field in fields:
        assert field.dtype == torch.float32
        assert (field.bfloat16() != field).any()


def test_proposals_are_decoded_and_ranked_in_float32() -> None:
    model = mixed(build_model(detector_config("Mask R-CNN")))
    head = model.proposal_generator.rpn_head
    features = [torch.randn(1, head.conv.in_channels, 4, 4)]
    with torch.autocast("cpu", torch.bfloat16):
        logits, deltas = head(features)
        assert head.conv(features[0]).dtype == torch.bfloat16
    assert {x.dtype for x in (*logits, *deltas)} == {torch.float32}


def test_without_mixed_precision_a_model_gets_no_hooks() -> None:
    model = build_model(detector_config("Keypoint R-CNN"))
    predict_in_float32(model, load_config("", []))
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_regions_are_pooled_at_their_boxes() -> None:
    plain = ROIPooler(7, scales=(1 / 4,), sampling_ratio=2, pooler_type="ROIAlignV2")
    features = torch.randn(1, 8, 256, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = plain([features.float()], [Boxes(FAR)])
    with torch.autocast("cpu", torch.bfloat16):
        pooled = mixed(copy.deepcopy(plain))([features], [Boxes(FAR)])
        rounded = plain([features], [Boxes(FAR)]).float()
    torch.testing.assert_close(pooled, expected, rtol=0, atol=0)
    assert (rounded - expected).abs().max() > 0.1


def test_keypoints_are_centers_of_pixels() -> None:
    """Check that keypoints are centers of the whole pixels into which a box is divided."""
    torch.manual_seed(0)
    shape = ShapeSpec(channels=8, height=7, width=7)
    head = KRCNNConvDeconvUpsampleHead(shape, num_keypoints=3, conv_dims=(8,))
    found = Instances((1000, 1000), pred_boxes=Boxes(FAR))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        mixed(head).eval()(torch.randn(2, 8, 7, 7), [found])
    corners, sides = FAR[:, None, :2], (FAR[:, 2:] - FAR[:, :2])[:, None]
    index = (found.pred_keypoints[:, :, :2] - corners) / (sides / sides.ceil()) - 0.5
    assert (index - index.round()).abs().max() < 1e-3


def test_predictions_of_a_box_are_near_those_of_float64() -> None:
    """Compare with a tolerance for the rounding of inputs, weights, bias and result to bfloat16.

    The relative error of a product of two rounded factors is at most 2 u + u². The result is
    rounded once more. An eighth is added because the order of additions depends on the CPU.
    """
    torch.manual_seed(0)
    transform = Box2BoxTransform(weights=(10.0, 10.0, 5.0, 5.0))
    shape = ShapeSpec(channels=64)
    layer = FastRCNNOutputLayers(shape, box2box_transform=transform, num_classes=3)
    nn.init.normal_(layer.bbox_pred.weight, std=0.02)
    nn.init.normal_(layer.cls_score.weight, std=0.1)
    x = torch.rand(2, 64)
    exact = copy.deepcopy(layer).double()
    with torch.no_grad():
        logits, deltas = exact(x.double())
        with torch.autocast("cpu", torch.bfloat16):
            near_logits, near_deltas = mixed(layer)(x)
            proposals = [Instances((1000, 1000), proposal_boxes=Boxes(FAR))]
            (boxes,) = layer.predict_boxes((near_logits, near_deltas), proposals)
            (scores,) = layer.predict_probs((near_logits, near_deltas), proposals)

    def tolerance(linear: nn.Linear, result: torch.Tensor) -> torch.Tensor:
        products = x.double() @ linear.weight.double().abs().T
        error = (2 * UNIT + UNIT**2) * products + UNIT * linear.bias.abs()
        return 1.125 * (error + UNIT * (result.abs() + error))

    by_delta = tolerance(exact.bbox_pred, deltas)
    by_logit = tolerance(exact.cls_score, logits)
    assert ((near_deltas - deltas).abs() <= by_delta).all()
    assert ((near_logits - logits).abs() <= by_logit).all()

    # A delta moves a center, and exp of a delta scales a side.
    sides = (FAR[:, 2:] - FAR[:, :2]).double().repeat(1, 3).view(2, 3, 2)
    centre, scale = by_delta.view(2, 3, 4).split(2, dim=2)
    side = sides * (deltas.view(2, 3, 4)[:, :, 2:] / 5).exp()
    limit = sides * centre / 10 + side / 2 * ((scale / 5).exp() - 1) + 1e-3
    expected = exact.box2box_transform.apply_deltas(deltas, FAR).view(2, 3, 2, 2)
    difference = (boxes.view(2, 3, 2, 2) - expected).abs()
    assert (difference <= limit[:, :, None]).all()
    assert limit.max() < 1  # much less than 4 pixels, the step of bfloat16 from 512 on
    by_score = math.e ** (2 * by_logit.max()) - 1
    exact_scores = logits.softmax(dim=1)
    assert ((scores - exact_scores).abs() <= by_score * exact_scores).all()
