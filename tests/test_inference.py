# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
import copy
import ctypes
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from detectron2.modeling import build_model
from detectron2.structures import Instances
from reference import (
    STRUCTURES,
    assert_same_maps,
    features,
    random_state,
    random_tensor,
    short,
    thin,
)
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_map

from vovnet_d2 import VoVNet, VoVNetSpec, optimize_for_inference
from vovnet_d2.engine import load_config
from vovnet_d2.modeling import allocation

STAGES = ("stem", "stage2", "stage3", "stage4", "stage5")
NET = thin(STRUCTURES["eSE in all"])
TOLERANCE = 1e-5  # in float32, relative to the largest value of a feature map


def build(net=NET, norm="FrozenBN", stages=STAGES) -> VoVNet:
    """Build a network in training mode, with norms as in a trained network."""
    model = VoVNet(VoVNetSpec(**vars(net)), norm=norm, out_features=stages)
    model.load_state_dict(random_state(net), strict=False)
    return model


def norms(model: nn.Module) -> list[nn.Module]:
    kinds = (_BatchNorm, FrozenBatchNorm2d, nn.GroupNorm)
    return [module for module in model.modules() if isinstance(module, kinds)]


def rms_error(maps: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the error of each feature map, relative to its largest value."""
    return torch.stack(
        [(maps[k] - x).square().mean().sqrt() / x.abs().max() for k, x in exact.items()]
    )


@pytest.mark.parametrize(
    ("structure", "norm", "divisor"),
    [
        *((structure, "FrozenBN", 8) for structure in STRUCTURES),
        *(("eSE in all", norm, 8) for norm in ("SyncBN", "nnSyncBN")),
        *((structure, "BN", 2) for structure in ("eSE in all", "depthwise")),
    ],
)
def test_errors_are_as_small_as_those_of_the_model(structure, norm, divisor):
    net = thin(STRUCTURES[structure], divisor)
    model = build(net, norm)
    state = {name: tensor.double() for name, tensor in random_state(net).items()}
    x = torch.randn(2, 3, 65, 96)
    optimized = optimize_for_inference(model)
    assert norms(optimized) == []
    exact = features(net, state, x.double())
    with torch.no_grad():
        eager = rms_error(model.eval()(x), exact)
    assert (rms_error(optimized(x), exact) <= 2 * eager).all()
    assert (eager < TOLERANCE).all()


def test_the_model_is_not_changed():
    model = build(norm="BN")
    before = copy.deepcopy(model.state_dict())
    optimized = optimize_for_inference(model)
    assert model.training
    assert model.stem.conv1.weight.requires_grad
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not optimized.training
    assert not any(p.requires_grad for p in optimized.parameters())
    assert optimized.output_shape() == model.output_shape()


def test_the_process_is_not_changed(monkeypatch):
    """Check that settings of the C library are not changed. A program decides about them."""

    def fail(*args):
        raise AssertionError(args)

    allocation.keep_freed_memory.cache_clear()
    monkeypatch.setattr(allocation.ctypes, "CDLL", fail)  # conftest.py has replaced it
    monkeypatch.setattr(ctypes, "CDLL", fail)
    optimize_for_inference(build())(torch.randn(1, 3, 64, 64))


def test_other_norms_are_kept():
    model = build(norm="GN")
    x = torch.randn(1, 3, 64, 64)
    optimized = optimize_for_inference(model)
    assert len(norms(optimized)) == len(norms(model)) > 0
    assert_same_maps(optimized(x), model.eval()(x), TOLERANCE)


def test_norms_without_running_statistics_are_kept():
    """Optimize norms without running statistics, which cannot be fused."""
    model = build(norm=lambda channels: nn.BatchNorm2d(channels, track_running_stats=False))
    x = torch.randn(2, 3, 64, 64)
    optimized = optimize_for_inference(model)
    assert len(norms(optimized)) == len(norms(model)) > 0
    # Statistics in stage5 are over eight values per channel, so the order of summation matters.
    assert_same_maps(optimized(x), model.eval()(x), 10 * TOLERANCE)


def test_bias_and_missing_scale():
    conv = Conv2d(4, 6, 3, bias=True, norm=nn.BatchNorm2d(6, affine=False), activation=torch.relu_)
    conv.norm.running_mean.normal_()
    conv.norm.running_var.uniform_(0.5, 1.5)
    x = torch.randn(1, 4, 9, 9)
    torch.testing.assert_close(optimize_for_inference(conv)(x), conv.eval()(x))


def test_memory_format():
    def weights(model):
        return [c.weight for c in model.modules() if isinstance(c, Conv2d)]

    model = build()
    last, first = torch.channels_last, torch.contiguous_format
    model.to(memory_format=last)
    optimized = optimize_for_inference(model, memory_format=first)
    assert all(w.is_contiguous() for w in weights(optimized))
    optimized = optimize_for_inference(build(), memory_format=last)
    assert all(w.is_contiguous(memory_format=last) for w in weights(optimized))
    assert optimized(torch.randn(1, 3, 64, 64))["stage5"].is_contiguous(memory_format=last)


# Rounding errors of half a step, 2^-9 and 2^-12, add up over the layers.
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.bfloat16, 2**-5), (torch.float16, 2**-8)], ids=str
)
def test_lower_precision(dtype, tolerance):
    model = build()
    x = torch.randn(1, 3, 64, 64)
    maps = optimize_for_inference(model, dtype=dtype)(x)
    expected = model.eval()(x)
    assert all(y.dtype == torch.float32 for y in maps.values())
    assert_same_maps(maps, expected, tolerance)
    assert not torch.allclose(maps["stage5"], expected["stage5"], rtol=1e-5)


class Listing(nn.Module):
    """Backbone that returns a list with None for one level."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return [self.conv(x), None, (x,)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_backbones_that_do_not_return_dicts(dtype):
    model = Listing().eval()
    x = torch.randn(1, 3, 9, 9)
    first, nothing, (third,) = optimize_for_inference(model, dtype=dtype)(x)
    assert nothing is None
    assert first.dtype == third.dtype == torch.float32
    torch.testing.assert_close(first, model(x)[0], rtol=2**-5, atol=2**-5)


def test_unknown_precision():
    with pytest.raises(ValueError, match=r"dtype is torch.int8: choose from torch.float32"):
        optimize_for_inference(build(), dtype=torch.int8)


@pytest.mark.slow
def test_compiled():
    """Compare a compiled network. Three blocks are enough, because torch compiles each block.

    The compiler packs the weights of convolutions only if they are constants.
    """
    model = build(short(NET), stages=STAGES[:3])
    optimized = optimize_for_inference(model, compile=True)
    model.eval()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch.no_grad():
        for size in ((65, 96), (70, 131), (65, 96)):
            x = torch.randn(2, 3, *size)
            assert_same_maps(optimized(x), model(x), TOLERANCE)
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 2
    convolutions = sum(isinstance(module, nn.Conv2d) for module in model.modules())
    assert counters["inductor"]["mkldnn_conv_weight_pack_matcher_count"] == 2 * convolutions


def test_a_copy_of_a_compiled_network_has_its_own_weights(monkeypatch, tmp_path):
    """Compare copies, in memory and in a file, whose weights are zero, with zero."""
    compiled = []

    def compile_function(forward, **_):
        compiled.append(forward)
        return forward

    monkeypatch.setattr(torch, "compile", compile_function)
    optimized = optimize_for_inference(build(short(NET)), compile=True)
    x = torch.randn(1, 3, 64, 64)
    expected = optimized(x)
    torch.save(optimized, tmp_path / "model.pth")
    for other in (
        copy.deepcopy(optimized),
        torch.load(tmp_path / "model.pth", weights_only=False),
        optimize_for_inference(optimized),
    ):
        for name, value in other(x).items():
            torch.testing.assert_close(value, expected[name])
        for tensor in other.state_dict().values():
            tensor.zero_()
        assert not any(value.any() for value in other(x).values())
    assert len(compiled) == 1
    assert all(value.any() for value in optimized(x).values())


def test_graphs_of_a_gpu(monkeypatch):
    """Check, with a stand-in for the compiler, that a call does not change earlier feature maps."""
    asked, kept = [], {"stage2": torch.zeros(1)}

    def compile_function(forward, **options):
        asked.append(options)

        def replay(x):
            kept["stage2"].copy_(x)
            return kept

        return replay

    monkeypatch.setattr(torch, "compile", compile_function)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    optimized = optimize_for_inference(build(short(NET)), compile=True)
    assert asked == [{"dynamic": False, "options": {"triton.cudagraphs": True}}]
    first, second = (optimized.forward(torch.tensor([x]))["stage2"] for x in (1.0, 2.0))
    assert (first.item(), second.item()) == (1, 2)


@pytest.mark.gpu
def test_compiled_on_a_gpu():
    model = build(short(NET), stages=STAGES[:3]).cuda()
    optimized = optimize_for_inference(model, compile=True)
    images = [torch.randn(2, 3, *size).cuda() for size in ((64, 96), (96, 64), (64, 96))]
    with torch.no_grad():
        found = [optimized(x) for x in images]
        for maps, x in zip(found, images, strict=True):
            assert_same_maps(maps, model.eval()(x), TOLERANCE)


def small_detector(name: str) -> CfgNode:
    spec = {f"MODEL.VOVNET.{k.upper()}": v for k, v in vars(thin(NET, 2)).items()}
    options = {
        "MODEL.DEVICE": "cpu",
        "MODEL.WEIGHTS": "",
        "MODEL.FPN.NORM": "BN",
        "MODEL.FPN.OUT_CHANNELS": 16,
        "MODEL.ROI_BOX_HEAD.FC_DIM": 16,
        "MODEL.ROI_MASK_HEAD.NORM": "SyncBN",
        "MODEL.ROI_MASK_HEAD.CONV_DIM": 16,
        "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.0,
        "MODEL.RETINANET.SCORE_THRESH_TEST": 0.0,
        "MODEL.PIXEL_STD": [58.0, 57.0, 57.0],  # otherwise scores would all be 0 or 1
        "TEST.DETECTIONS_PER_IMAGE": 20,
        **spec,
    }
    return load_config(name, [str(word) for option in options.items() for word in option])


def build_detector(name: str) -> nn.Module:
    """Build a detector with norms as in a trained network and with different scores.

    The layers before the output of RetinaNet, which start near zero, are random, too.
    """
    model = build_model(small_detector(name)).eval()
    generator = torch.Generator().manual_seed(0)
    for name, module in model.named_modules():
        if module in norms(model) or name == "head.cls_subnet":
            state = module.state_dict()
            drawn = {k: random_tensor(k, tuple(t.shape), generator) for k, t in state.items()}
            module.load_state_dict(drawn)
    return model


def in_float64(model: nn.Module) -> nn.Module:
    """Return a copy in float64 whose predictions are float32, as Detectron2 needs them."""

    def to_float32(module: nn.Module, args: Any, outputs: Any) -> Any:
        return tree_map(torch.Tensor.float, outputs)

    model = copy.deepcopy(model).double()
    for name, module in model.named_modules():
        if name in ("head", "proposal_generator.rpn_head", "roi_heads.box_predictor"):
            module.register_forward_hook(to_float32)
    return model


def numbers(found: Instances) -> dict[str, torch.Tensor]:
    return {"scores": found.scores, "boxes": found.pred_boxes.tensor}


DETECTORS = (
    "COCO-InstanceSegmentation/mask_rcnn_V_19_slim_eSE_FPN_3x.yaml",
    "COCO-Detection/retinanet_V_19_slim_eSE_FPN_3x.yaml",
)


@pytest.mark.parametrize("config", DETECTORS)
def test_whole_detector(config):
    model = build_detector(config)
    optimized = optimize_for_inference(model)
    assert norms(optimized) == []
    inputs = [{"image": torch.rand(3, 90, 120) * 255, "height": 180, "width": 240}]
    x = model.preprocess_image(inputs).tensor
    with torch.no_grad():
        exact_model = in_float64(model)
        exact_maps = exact_model.backbone(x.double())
        error = rms_error(model.backbone(x), exact_maps)
        assert (rms_error(optimized.backbone(x), exact_maps) <= 2 * error).all()
        exact, found = (m(inputs)[0]["instances"] for m in (exact_model, optimized))
    assert found.image_size == (180, 240)
    assert found.get_fields().keys() == exact.get_fields().keys()
    assert len(found) == len(exact) == 20
    assert torch.equal(found.pred_classes, exact.pred_classes)
    # With so few numbers, their error may be several times that of eager by chance.
    assert (rms_error(numbers(found), numbers(exact)) < TOLERANCE).all()
    if exact.has("pred_masks"):  # pixels at the threshold may differ
        assert 0.01 < exact.pred_masks.float().mean() < 0.99
        assert (found.pred_masks != exact.pred_masks).float().mean() < 2e-5


@pytest.mark.parametrize("config", DETECTORS)
def test_detector_in_lower_precision(config):
    """Compare feature maps, because small errors may change which boxes are the best."""
    model = build_detector(config)
    optimized = optimize_for_inference(model, dtype=torch.bfloat16)
    assert norms(optimized) == []
    image = torch.rand(3, 96, 128) * 255
    with torch.no_grad():
        x = model.preprocess_image([{"image": image}]).tensor
        assert (rms_error(optimized.backbone(x), model.backbone(x)) < 2**-5).all()
        (found,) = optimized([{"image": image}])
    assert len(found["instances"]) == 20
    for name, tensor in optimized.state_dict().items():
        assert tensor.dtype == (torch.bfloat16 if name.startswith("backbone.") else torch.float32)
    assert optimized.pixel_mean.dtype == torch.float32
