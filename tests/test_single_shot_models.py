# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""RefineDet, DSOD and SSD as whole networks: their cost in the tables of the VoVNet paper, their
parts, training steps and inference."""

import inspect
import math
from functools import cache
from typing import Any

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from devices import shapes_alone
from test_single_shot_parts import slow_encode, slow_iou, slow_losses
from torch import nn
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
from torchvision.models.detection.ssd import SSD

from vovnet_d2 import VoVNet, optimize_for_inference
from vovnet_d2.analysis.complexity import analyze
from vovnet_d2.engine import load_config
from vovnet_d2.engine.solver import build_optimizer
from vovnet_d2.modeling.fpn import attach_fpn
from vovnet_d2.modeling.single_shot.extras import BackboneWithExtras, DSODExtra, SSDExtra
from vovnet_d2.modeling.single_shot.heads import TransferConnection
from vovnet_d2.modeling.single_shot.layers import L2Norm, Predictor, ResidualBlock

# Cost ---------------------------------------------------------------------------------------------


@cache
def on_meta(name: str) -> nn.Module:
    cfg = load_config(name, ["MODEL.DEVICE", "meta"])
    with shapes_alone():
        return build_model(cfg)


def count(name: str) -> dict[str, float]:
    """Return the multiply-adds of convolutions in units of 10^9, and three numbers in millions.

    These numbers are the weights of convolutions, the learned parameters, and the learned
    parameters with running statistics."""
    model, size = on_meta(name), load_config(name).INPUT.FIXED_SIZE
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)]
    learned = sum(p.numel() for p in model.parameters())
    running = [b for n, b in model.named_buffers() if n.endswith(("running_mean", "running_var"))]
    return {
        "multiply_adds": analyze(model, (size, size)).total.multiply_adds / 1e9,
        "weights": sum(m.weight.numel() for m in convs) / 1e6,
        "learned": learned / 1e6,
        "all": (learned + sum(b.numel() for b in running)) / 1e6,
    }


# Independent counts to three decimals of the networks in the tables of the VoVNet paper.
COUNTED = {
    "COCO-Detection/refinedet320_R_50_400k.yaml": {"multiply_adds": 25.399, "learned": 63.459},
    "COCO-Detection/refinedet320_V_39_400k.yaml": {"multiply_adds": 32.626, "learned": 56.284},
    "COCO-Detection/refinedet320_R_101_400k.yaml": {"multiply_adds": 32.975, "learned": 82.452},
    "COCO-Detection/refinedet320_V_57_400k.yaml": {"multiply_adds": 36.418, "learned": 70.324},
    "PascalVOC-Detection/dsod300_V_27_slim_100k.yaml": {
        "multiply_adds": 5.663, "weights": 5.957, "learned": 5.972, "all": 5.985,
    },
    "PascalVOC-Detection/dsod300_V_27_slim_bottleneck_100k.yaml": {
        "multiply_adds": 4.644, "weights": 4.855, "learned": 4.872,
    },
    "COCO-Detection/refinedet320_DenseNet_201_400k.yaml": {
        "multiply_adds": 24.585, "learned": 56.127,
    },
    "COCO-Detection/refinedet320_DenseNet_161_400k.yaml": {
        "multiply_adds": 32.668, "learned": 66.755,
    },
    "PascalVOC-Detection/dsod300_DenseNet_67_100k.yaml": {
        "multiply_adds": 5.298, "learned": 5.833, "all": 5.872,
    },
}  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=[pytest.mark.slow] if "DenseNet_" in n and "COCO" in n else [])
        for n in COUNTED
    ],
)
def test_cost(name: str) -> None:
    counted = count(name)
    for quantity, expected in COUNTED[name].items():
        # The tolerance is 0.0006, because some of these numbers are rounded and some are cut off.
        assert counted[quantity] == pytest.approx(expected, abs=6e-4), quantity


@pytest.mark.parametrize(
    ("name", "multiply_adds", "parameters"),
    [
        ("PascalVOC-Detection/pelee304_PeleeNet_120k.yaml", 1.205, 5.42),
        ("PascalVOC-Detection/ssd300_MobileNet_120k.yaml", 1.149, 5.78),
    ],
)
def test_cost_of_the_small_peers(name: str, multiply_adds: float, parameters: float) -> None:
    """Compare with published costs within two per cent, because some details are not published."""
    counted = count(name)
    assert counted["multiply_adds"] == pytest.approx(multiply_adds, rel=0.02)
    assert counted["learned"] == pytest.approx(parameters, rel=0.02)


def test_feature_map_sizes_of_the_paper() -> None:
    for name, strides in (
        (
            "COCO-Detection/refinedet320_V_39_400k.yaml",
            {320: (40, 20, 10, 5), 512: (64, 32, 16, 8)},
        ),
        ("PascalVOC-Detection/dsod300_V_27_slim_100k.yaml", {300: (37, 18, 9, 5, 3, 2)}),
    ):
        backbone = on_meta(name).backbone
        for size, expected in strides.items():
            maps = backbone(torch.empty(1, 3, size, size, device="meta"))
            assert tuple(m.shape[-1] for m in maps.values()) == expected
            shapes = backbone.output_shape()
            assert [shapes[n].channels for n in maps] == [m.shape[1] for m in maps.values()]


# Parts --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_top", [False, True])
def test_a_transfer_connection_equals_its_steps(is_top: bool) -> None:
    """Compute a transfer connection step by step.

    It has two convolutions, the sum with the coarser level, ReLU and another convolution. Without a
    coarser level there is no sum."""
    block = TransferConnection(4, 6, is_top=is_top, norm="BN").eval()
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.4)
    x, coarser = torch.randn(2, 4, 8, 6), torch.randn(2, 6, 4, 3)

    def convolve(conv: nn.Module, y: torch.Tensor) -> torch.Tensor:
        return conv.norm(nn.functional.conv2d(y, conv.weight, padding=1))

    y = convolve(block.conv2, convolve(block.conv1, x).relu())
    if not is_top:
        up = nn.functional.conv_transpose2d(coarser, block.upsample.weight, stride=2)
        y = y + block.upsample.norm(up)
    torch.testing.assert_close(
        block(x, None if is_top else coarser), convolve(block.conv3, y.relu()).relu()
    )


def test_down_block_pools_in_ceil_mode() -> None:
    block = DSODExtra(6, 8, norm="BN").eval()
    nn.init.constant_(block.pooled.norm.bias, 3)  # keeps most values above zero in ReLU
    x = torch.randn(2, 6, 9, 7) - 2  # most values are negative
    pooled = nn.functional.max_pool2d(x, 2, ceil_mode=True)
    out = block(x)
    assert out.shape == (2, 8, 5, 4)
    assert torch.equal(out[:, 4:], block.pooled(pooled))
    assert torch.equal(out[:, :4], block.learned(x))


def test_ssd_extra_without_padding() -> None:
    block = SSDExtra(6, 8, norm="BN", stride=1).eval()
    assert block(torch.randn(1, 6, 5, 5)).shape == (1, 8, 3, 3)
    assert block(torch.randn(1, 6, 3, 3)).shape == (1, 8, 1, 1)
    bottom_up = VoVNet("V-19-slim-dw-eSE", out_features=["stage3"])
    channels = bottom_up.output_shape()["stage3"].channels
    stages = [SSDExtra(channels, 6, norm="BN"), block]
    backbone = BackboneWithExtras(bottom_up, ["stage3"], stages)
    assert [shape.stride for shape in backbone.output_shape().values()] == [8, 16, 16]
    fpn = attach_fpn(bottom_up, in_features=["stage3"], out_channels=6, top_block=None)
    for given, divisor in ((0, 8), (16, 16)):  # the FPN needs multiples of its stride
        backbone = BackboneWithExtras(fpn, ["p3"], [block], size_divisibility=given)
        assert backbone.size_divisibility == divisor


def test_values_of_ssd() -> None:
    """Compare the values that no config sets with torchvision, which also takes them from SSD."""
    words = inspect.signature(SSD).parameters
    node = load_config().MODEL.SINGLE_SHOT
    assert words["score_thresh"].default == node.SCORE_THRESH_TEST
    assert words["nms_thresh"].default == node.NMS_THRESH_TEST
    assert [words["iou_thresh"].default] * 2 == node.IOU_THRESHOLDS
    assert 1 / words["positive_fraction"].default == 1 + node.NEGATIVE_RATIO
    coder = SSD(nn.Identity(), DefaultBoxGenerator([[]]), (8, 8), 2, head=nn.Identity()).box_coder
    assert coder.weights == node.BBOX_REG_WEIGHTS
    assert pytest.approx(1 - 0.999) == node.NORM_MOMENTUM  # the moving average of Caffe


def test_l2_norm() -> None:
    layer = L2Norm(5, 20.0)
    x = torch.randn(2, 5, 3, 4)
    expected = 20 * x / x.pow(2).sum(dim=1, keepdim=True).sqrt()
    assert torch.allclose(layer(x), expected, atol=1e-5)


def test_residual_block_projects_at_equal_widths() -> None:
    block = ResidualBlock(8, 8, 2, norm="BN").eval()
    x = torch.randn(1, 8, 4, 4)
    assert not torch.equal(block.shortcut(x), x)
    branch = block.conv3(block.conv2(block.conv1(x)))
    assert torch.equal(block(x), (block.shortcut(x) + branch).relu())


def test_initialisation() -> None:
    model = build_tiny("refinedet")
    xavier, gaussian = set(), set()
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            bound = math.sqrt(3 / layer.weight[0].numel())  # Xavier initialisation in Caffe
            if bound * 0.9 < layer.weight.abs().max() <= bound:
                xavier.add(name)
            elif layer.weight.std().item() == pytest.approx(0.01, rel=0.2):
                gaussian.add(name)
    convs = {n for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)}
    predictors = {n for n, m in model.named_modules() if isinstance(m, Predictor)}
    assert xavier == predictors | {n for n in convs if n.startswith("backbone.bottom_up.")}
    assert gaussian == convs - xavier


# Training and inference ---------------------------------------------------------------------------

TINY: dict[str, Any] = {
    "MODEL.DEVICE": "cpu",
    "MODEL.VOVNET.CONV_BODY": "V-27-slim",
    "MODEL.VOVNET.STEM_CHANNELS": (8, 8, 8),
    "MODEL.VOVNET.STAGE_MID_CHANNELS": (8, 8, 8, 8),
    "MODEL.VOVNET.STAGE_OUT_CHANNELS": (16, 16, 24, 24),
    "MODEL.VOVNET.LAYERS_PER_BLOCK": 1,
    "MODEL.SINGLE_SHOT.NUM_CLASSES": 3,
    "MODEL.SINGLE_SHOT.EXTRA_CHANNELS": [16, 16, 16],
    "MODEL.REFINEDET.EXTRA_CHANNELS": 64,
    "MODEL.REFINEDET.TCB_CHANNELS": 16,
    "MODEL.REFINEDET.HEAD_CHANNELS": 32,
    "INPUT.FIXED_SIZE": 128,
}
CONFIGS = {
    "refinedet": "COCO-Detection/refinedet320_V_39_400k.yaml",
    "dsod": "PascalVOC-Detection/dsod300_V_27_slim_100k.yaml",
}


def tiny_config(kind: str, **options: Any):
    options = TINY | {key.replace("__", "."): value for key, value in options.items()}
    return load_config(CONFIGS[kind], [str(word) for pair in options.items() for word in pair])


def build_tiny(kind: str, **options: Any) -> Any:
    return build_model(tiny_config(kind, **options))


@pytest.mark.parametrize("kind", CONFIGS)
def test_backbones_have_the_xavier_initialisation_of_caffe(kind: str) -> None:
    """Check that weights are uniform up to the square root of 3 / fan-in."""
    for name, layer in build_tiny(kind).backbone.bottom_up.named_modules():
        if isinstance(layer, nn.Conv2d) and layer.weight.numel() > 500:
            bound = (3 / layer.weight[0].numel()) ** 0.5
            assert 0.9 * bound < layer.weight.abs().max() <= bound, name


def samples(numbers: tuple[int, ...] = (2, 0, 1), size: int = 128) -> list[dict[str, Any]]:
    found = []
    for number in numbers:
        corners = torch.rand(number, 2) * size / 2
        boxes = torch.cat([corners, corners + torch.rand(number, 2) * 50 + 10], dim=1)
        truth = Instances((size, size), gt_boxes=Boxes(boxes))
        truth.gt_classes = torch.arange(number)
        image = torch.randint(0, 256, (3, size, size), dtype=torch.uint8)
        found.append({"image": image, "instances": truth, "height": 50, "width": 300})
    return found


LOSSES = {
    "refinedet": {"loss_arm_cls", "loss_arm_box_reg", "loss_odm_cls", "loss_odm_box_reg"},
    "dsod": {"loss_cls", "loss_box_reg"},
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_parameter_gets_a_gradient(kind: str) -> None:
    model = build_tiny(kind)
    with EventStorage():
        losses = model(samples())
    assert losses.keys() == LOSSES[kind]
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    assert {m.momentum for m in model.modules() if isinstance(m, nn.BatchNorm2d)} == {0.001}


@pytest.mark.parametrize("kind", CONFIGS)
def test_batch_without_objects(kind: str) -> None:
    model = build_tiny(kind)
    losses = model(samples((0, 0)))
    assert all(loss == 0 for loss in losses.values())
    sum(losses.values()).backward()


def test_refinedet_pads_images_to_its_coarsest_stride() -> None:
    model = build_tiny("refinedet").eval()
    strides = [shape.stride for shape in model.backbone.output_shape().values()]
    assert model.backbone.size_divisibility == max(strides) == 64
    with torch.no_grad():
        model([{"image": torch.zeros(3, 96, 160)}])  # multiples of 32 are enough


@pytest.mark.parametrize("kind", CONFIGS)
def test_detections_are_in_pixels_of_the_original_image(kind: str) -> None:
    model = build_tiny(kind, MODEL__SINGLE_SHOT__SCORE_THRESH_TEST=0.0).eval()
    batch = samples()
    with torch.no_grad():
        together = [output["instances"] for output in model(batch)]
        alone = [model([sample])[0]["instances"] for sample in batch]
    for a, b in zip(together, alone, strict=True):
        assert a.image_size == (50, 300)
        assert 0 < len(a) <= 500
        assert (a.pred_boxes.tensor <= torch.tensor([300, 50, 300, 50])).all()
        assert torch.allclose(a.scores, b.scores, atol=1e-5)
        assert a.scores.tolist() == sorted(a.scores.tolist(), reverse=True)


@pytest.mark.parametrize("thresholds", [(0.5, 0.5), (0.3, 0.7)])
def test_refinedet_losses(thresholds: tuple[float, float]) -> None:
    """Compute the losses of both stages again from the predictions, anchor by anchor."""
    model = build_tiny("refinedet", MODEL__REFINEDET__ARM_IOU_THRESHOLDS=list(thresholds))
    # The objectness of some anchors is below the threshold, because predictions vary.
    for module in model.head.modules():
        if isinstance(module, Predictor):
            nn.init.normal_(module.weight, std=0.3)
    batch = samples((2, 0, 3))
    model.train()
    images = model.preprocess_image(batch)
    features = [model.backbone(images.tensor)[name] for name in model.head_in_features]
    predictions = model.head(features)
    truth = [sample["instances"] for sample in batch]
    losses = model.forward_training(images, features, predictions, truth)

    def flat(levels: list[torch.Tensor], dims: int) -> list:
        """Return predictions in the order of rows, columns, and anchors at a location."""
        per_level = [
            x.detach().double().reshape(len(x), -1, dims, *x.shape[2:]).permute(0, 3, 4, 1, 2)
            for x in levels
        ]
        return torch.cat([x.reshape(len(x), -1, dims) for x in per_level], dim=1).tolist()

    arm_logits, arm_deltas = flat(predictions[0], 2), flat(predictions[1], 4)
    odm_logits, odm_deltas = flat(predictions[2], 4), flat(predictions[3], 4)
    anchors = Boxes.cat(model.anchor_generator(features)).tensor.tolist()
    boxes = [t.gt_boxes.tensor.tolist() for t in truth]
    arm = slow_losses(
        arm_logits, arm_deltas, [anchors] * 3, boxes,
        [[0] * len(b) for b in boxes], 3.0, thresholds,
    )  # fmt: skip

    def refine(anchor: list[float], delta: list[float]) -> list[float]:
        w, h = anchor[2] - anchor[0], anchor[3] - anchor[1]
        cx, cy = anchor[0] + w / 2 + delta[0] * 0.1 * w, anchor[1] + h / 2 + delta[1] * 0.1 * h
        w, h = w * math.exp(delta[2] * 0.2), h * math.exp(delta[3] * 0.2)
        return [cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2]

    refined = [[refine(a, d) for a, d in zip(anchors, each, strict=True)] for each in arm_deltas]
    unlikely = [
        [math.exp(a) / (math.exp(a) + math.exp(b)) < 0.01 for a, b in each] for each in arm_logits
    ]
    assert any(map(any, unlikely))
    labels = [t.gt_classes.tolist() for t in truth]
    odm = slow_losses(
        odm_logits, odm_deltas, refined, boxes, labels, 3.0, (0.5, 0.5), excluded=unlikely
    )
    found = [
        losses[f"loss_{n}"].item() for n in ("arm_cls", "arm_box_reg", "odm_cls", "odm_box_reg")
    ]
    assert found == pytest.approx([*arm, *odm], rel=1e-4)
    # No gradient of the ODM stage reaches the ARM stage.
    (losses["loss_odm_cls"] + losses["loss_odm_box_reg"]).backward()
    assert all(p.grad is None for p in model.head.arm.parameters())


def test_unlikely_anchors_have_no_score() -> None:
    model = build_tiny("refinedet", MODEL__SINGLE_SHOT__SCORE_THRESH_TEST=0.0).eval()
    with torch.no_grad():
        for index, level in enumerate(model.head.arm.levels):
            level.logits.weight.zero_()
            # The objectness is 0.5 on the finest feature map, and lower on the others.
            level.logits.bias.view(-1, 2)[:, 1] = 0 if index == 0 else 18
        found = model([{"image": samples()[0]["image"]}])[0]["instances"]
        model.objectness_threshold = 0.6
        assert len(model([{"image": samples()[0]["image"]}])[0]["instances"]) == 0
    sizes = found.pred_boxes.tensor[:, 2:] - found.pred_boxes.tensor[:, :2]
    assert len(found) > 0
    assert sizes.max() < 64  # the smallest anchors are 32 wide


def test_solver() -> None:
    cfg = tiny_config("refinedet")
    model = build_model(cfg)
    optimizer = build_optimizer(cfg, model)
    settings = {
        id(p): (g["lr"] / cfg.SOLVER.BASE_LR, g["weight_decay"])
        for g in optimizer.param_groups
        for p in g["params"]
    }
    assert len(settings) == len(list(model.parameters()))
    for name, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            expected = (1, 0.0 if isinstance(module, nn.BatchNorm2d) else 5e-4)
            if isinstance(module, Predictor) and key == "bias":
                expected = (2, 0)
            assert settings[id(parameter)] == expected, f"{name}.{key}"


def test_solver_of_dsod_decays_all_norms_but_the_predictors() -> None:
    cfg = tiny_config("dsod")
    model = build_model(cfg)
    groups = build_optimizer(cfg, model).param_groups
    settings = {id(p): (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    predictors = {
        id(p) for m in model.modules() if isinstance(m, Predictor) for p in m.norm.parameters()
    }
    assert predictors
    for parameter in model.parameters():
        decay = 0 if id(parameter) in predictors else 5e-4
        assert settings[id(parameter)] == (0.1, decay)
    assert {m.norm.eps for m in model.modules() if isinstance(m, Predictor)} == {1e-3}


@pytest.mark.parametrize("kind", CONFIGS)
def test_optimized_for_inference(kind: str) -> None:
    model = build_tiny(kind, MODEL__SINGLE_SHOT__SCORE_THRESH_TEST=0.0)
    model.train()
    for _ in range(3):
        model(samples((2, 1)))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.5
    with torch.no_grad():
        model(samples((2, 1)))
        model.eval()
        fast = optimize_for_inference(model)
        image = {"image": samples()[0]["image"]}
        a, b = (m([image])[0]["instances"] for m in (model, fast))
    assert torch.allclose(a.scores[:20], b.scores[:20], atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"MODEL__SINGLE_SHOT__IN_FEATURES": ["stage3", "res4"]}, "asks for res4"),
        ({"MODEL__SINGLE_SHOT__IN_FEATURES": ["stage3", "stage5"]}, "whose strides double"),
    ],
)
def test_refinedet_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_tiny("refinedet", **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"MODEL__SINGLE_SHOT__IN_FEATURES": []}, "asks for nothing"),
        ({"MODEL__SINGLE_SHOT__EXTRA_TYPE": "fpn"}, "'fpn': choose from dsod, ssd"),
        ({"MODEL__SINGLE_SHOT__EXTRA_STRIDES": [2]}, "one for each"),
        ({"MODEL__SINGLE_SHOT__ANCHOR_STEPS": [8, 16]}, "2 steps for 6 feature maps"),
    ],
)
def test_ssd_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_tiny("dsod", **options)


def test_slow_coding_is_the_inverse_of_the_refinement() -> None:
    """Check that the slow functions of these tests are inverse to each other."""
    anchor, box = [10.0, 10.0, 30.0, 50.0], [12.0, 8.0, 40.0, 44.0]
    assert slow_iou(anchor, anchor) == 1
    assert slow_encode(anchor, anchor) == [0, 0, 0, 0]
    assert slow_encode(anchor, box)[0] == pytest.approx(((26 - 20) / 20) / 0.1)
