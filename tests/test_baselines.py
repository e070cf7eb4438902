# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""The backbones that VoVNet is compared with: DenseNet-67, PeleeNet, and those of timm and
torchvision.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision.models
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode, get_cfg
from detectron2.layers import FrozenBatchNorm2d, ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone, build_backbone, build_model
from devices import shapes_alone
from huggingface_hub import constants
from torch import nn

from vovnet_d2 import (
    VoVNet,
    VoVNetCheckpointer,
    add_vovnet_config,
    convert_state_dict,
    optimize_for_inference,
)
from vovnet_d2.analysis.complexity import analyze
from vovnet_d2.engine.initial_weights import check_initialisation
from vovnet_d2.modeling import build
from vovnet_d2.modeling.baselines.densenet import DenseNet67, halve
from vovnet_d2.modeling.baselines.peleenet import PeleeNet, average_halve
from vovnet_d2.modeling.baselines.timm_backbone import TimmBackbone
from vovnet_d2.modeling.baselines.torchvision_backbone import TorchvisionBackbone
from vovnet_d2.modeling.specs import VOVNET_SPECS

STAGES = ("stage2", "stage3", "stage4", "stage5")

# One small network of each family, with further arguments.
TIMM: dict[str, dict[str, Any]] = {
    "resnet10t": {},
    "efficientnet_b0": {},
    "mobilenetv1_100": {},
    "mobilenetv2_035": {},
    "mobilenetv3_small_050": {},
    "convnext_atto": {},
    "densenet121": {},  # timm rewrites this network to extract features
    "hrnet_w18_small": {},  # this network extracts features itself
    "ese_vovnet19b_slim_dw": {},
    "swin_tiny_patch4_window7_224": {"depths": (1, 1, 1, 1), "dynamic_img_size": True},  # NHWC
}
TORCHVISION = {
    "shufflenet_v2_x0_5": ("stage2", "stage3", "conv5"),
    "mobilenet_v2": ("features.3", "features.6", "features.13", "features.18"),
    "resnet18": ("layer1", "layer2", "layer3"),
}


def make(kind: str, **options: Any) -> Backbone:
    """Build a backbone by its name: of timm, of torchvision, or of this package."""
    if kind in TIMM:
        return TimmBackbone(kind, arguments=TIMM[kind], **options)
    if kind in TORCHVISION:
        return TorchvisionBackbone(kind, TORCHVISION[kind], **options)
    return {"DenseNet-67": DenseNet67, "PeleeNet": PeleeNet}[kind](**options)


ALL = (*TIMM, *TORCHVISION, "DenseNet-67", "PeleeNet")


def random_norms(network: nn.Module) -> None:
    """Give the norms random statistics and weights, unlike those of a new norm."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d | FrozenBatchNorm2d):
            for tensor in (module.weight, module.running_var):
                nn.init.uniform_(tensor, 0.5, 1.5)
            for tensor in (module.bias, module.running_mean):
                nn.init.normal_(tensor, std=0.1)


# All backbones --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ALL)
def test_strides_channels_and_gradients(kind: str) -> None:
    """Check the sizes and channels of feature maps, and that every parameter gets a gradient.

    At odd sizes, the size of a feature map may be rounded up or down.
    """
    model = make(kind)
    assert all(module.training for module in model.modules())
    random_norms(model)  # some norms start with zero weights
    # Two of the networks only take sizes that their strides divide.
    height, width = (160, 128) if kind.startswith(("swin", "hrnet")) else (163, 131)
    maps = model(torch.randn(2, 3, height, width))
    shapes = model.output_shape()
    assert list(maps) == list(shapes)
    for name, shape in shapes.items():
        channels, *size = maps[name].shape[1:]
        assert channels == shape.channels
        for found, whole in zip(size, (height, width), strict=True):
            assert found in (whole // shape.stride, -(-whole // shape.stride)), name
        if name.startswith("stage"):
            assert shape.stride == 2 ** int(name.removeprefix("stage"))
    sum((m * torch.randn_like(m)).sum() for m in maps.values()).backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


@pytest.mark.parametrize("kind", ["efficientnet_b0", "shufflenet_v2_x0_5", "PeleeNet"])
def test_optimized_for_inference(kind: str) -> None:
    model = make(kind).eval()
    random_norms(model)
    x = torch.randn(1, 3, 96, 65)
    with torch.no_grad():
        expected, found = model(x), optimize_for_inference(model)(x)
    for name in expected:
        size = expected[name].abs().max()
        torch.testing.assert_close(found[name] / size, expected[name] / size, rtol=0, atol=1e-5)


# timm and torchvision -------------------------------------------------------------------------


@pytest.mark.parametrize("name", TIMM)
def test_timm_feature_maps_equal_features_only(name: str) -> None:
    """Compare the feature maps with those of timm's ``features_only``."""
    model = TimmBackbone(name, out_features=["stage3", "stage4", "stage5"], arguments=TIMM[name])
    random_norms(model)
    peer = timm.create_model(name, features_only=True, **TIMM[name])
    weights = model.network.state_dict()
    peer.load_state_dict({k: weights[k] for k in peer.state_dict()})
    x = torch.randn(1, 3, 128, 160)
    with torch.no_grad():
        maps, expected = model.eval()(x), peer.eval()(x)
    by_channels_and_size = {}
    for found in expected:
        found = found.permute(0, 3, 1, 2) if name.startswith("swin") else found
        by_channels_and_size[128 // found.shape[2]] = found
    for stage, stride in {"stage3": 8, "stage4": 16, "stage5": 32}.items():
        assert torch.equal(maps[stage], by_channels_and_size[stride])


def test_the_order_of_out_features_does_not_matter() -> None:
    stages = ["stage4", "stage2", "stage5"]
    model = TimmBackbone("efficientnet_b0", out_features=stages)
    with torch.no_grad():
        maps = model.eval()(torch.randn(1, 3, 64, 96))
    shapes = model.output_shape()
    assert set(maps) == set(shapes) == set(stages)
    for stage, found in maps.items():
        stride = 2 ** int(stage[-1])
        assert shapes[stage].stride == stride
        assert found.shape[1:] == (shapes[stage].channels, 64 // stride, 96 // stride)


def test_timm_features_equal_those_of_the_whole_network() -> None:
    whole = timm.create_model("efficientnet_b0")
    model = TimmBackbone("efficientnet_b0")
    random_norms(whole)
    weights = whole.state_dict()
    model.network.load_state_dict({k: weights[k] for k in model.network.state_dict()})
    x = torch.randn(1, 3, 96, 64)
    with torch.no_grad():
        last = model.eval()(x)["stage5"]
        whole = whole.eval()
        torch.testing.assert_close(whole.bn2(whole.conv_head(last)), whole.forward_features(x))


def test_vovnet_of_timm_equals_ours() -> None:
    theirs = TimmBackbone("ese_vovnet19b_dw").eval()
    random_norms(theirs)
    peer = timm.create_model("ese_vovnet19b_dw").eval()
    state = peer.state_dict()
    renamed = {
        k.replace("stem_", "stem.").replace("stages_", "stages."): v
        for k, v in theirs.network.state_dict().items()
    }
    assert set(renamed) == {k for k in state if not k.startswith("head")}
    spec = replace(VOVNET_SPECS["V-19-dw-eSE"], ese="last")
    ours = VoVNet(spec, norm="BN", out_features=STAGES).eval()
    ours.load_state_dict(convert_state_dict(renamed, to="native"))
    x = torch.randn(1, 3, 97, 64)
    with torch.no_grad():
        expected, found = ours(x), theirs(x)
    assert ours.output_shape() == theirs.output_shape()
    for name in STAGES:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision_feature_maps_equal_its_feature_extractor(name: str) -> None:
    model = TorchvisionBackbone(name, TORCHVISION[name])
    peer = torchvision.models.get_model(name)
    random_norms(peer)
    weights = peer.state_dict()
    network = model.network.graph
    network.load_state_dict({k: weights[k] for k in network.state_dict()})
    expected = {}
    for node in TORCHVISION[name]:
        peer.get_submodule(node).register_forward_hook(
            lambda module, inputs, output, node=node: expected.__setitem__(node, output)
        )
    x = torch.randn(1, 3, 96, 65)
    with torch.no_grad():
        found = model.eval()(x)
        peer.eval()(x)
    for node, output in zip(TORCHVISION[name], found.values(), strict=True):
        assert torch.equal(output, expected[node])


def test_later_layers_are_left_out() -> None:
    short = TimmBackbone("resnet10t", out_features=["stage3"])
    assert {n.split(".")[1] for n, _ in short.named_parameters()} == {
        *("conv1", "bn1", "layer1", "layer2")
    }
    short = TorchvisionBackbone("resnet18", ["layer2"])
    assert {n.split(".")[2] for n, _ in short.named_parameters()} == {
        *("conv1", "bn1", "layer1", "layer2")
    }


@pytest.mark.parametrize("name", ["resnet10t", "efficientnet_b0", "resnet18"])
@pytest.mark.parametrize("norm", ["FrozenBN", "SyncBN"])
def test_norms(name: str, norm: str) -> None:
    """Check that other norms replace every batch norm and compute the same in inference."""
    x = torch.randn(1, 3, 64, 64)
    torch.manual_seed(1)
    plain = make(name)
    torch.manual_seed(1)
    model = make(name, norm=norm)
    kinds = {type(m) for m in model.modules() if isinstance(m, nn.modules.batchnorm._NormBase)}
    if norm == "FrozenBN":
        assert kinds == set()
        assert not any("bn" in n for n, _ in model.named_parameters())
    else:
        assert kinds
        assert all(issubclass(kind, nn.SyncBatchNorm) for kind in kinds)
    with torch.no_grad():
        if norm == "FrozenBN":  # synchronised norms need a GPU
            found, expected = model(x), plain.eval()(x)
            for stage in expected:
                torch.testing.assert_close(found[stage], expected[stage], rtol=1e-4, atol=1e-4)
        else:
            assert {k: v.shape for k, v in plain.state_dict().items()} == {
                k: v.shape for k, v in model.state_dict().items()
            }


@pytest.mark.parametrize(
    ("name", "freeze_at", "frozen", "free"),
    [
        ("resnet10t", 1, {"conv1"}, {"layer1", "layer2", "layer3", "layer4"}),
        ("resnet10t", 2, {"conv1", "layer1"}, {"layer2", "layer3", "layer4"}),
        ("resnet18", 3, {"conv1", "layer1", "layer2"}, {"layer3"}),
        (
            "mobilenetv3_small_050",
            2,
            {"conv_stem", "blocks.0"},
            {f"blocks.{i}" for i in range(1, 6)},
        ),
        ("PeleeNet", 2, {"stem", "stage2"}, {"stage3", "stage4", "stage5"}),
    ],
)
def test_freezing(name: str, freeze_at: int, frozen: set[str], free: set[str]) -> None:
    model = make(name, freeze_at=freeze_at)
    found: dict[bool, set[str]] = {True: set(), False: set()}
    for key, parameter in model.named_parameters():
        key = key.removeprefix("network.").removeprefix("graph.")
        parts = 2 if key.startswith("blocks") else 1
        found[parameter.requires_grad].add(".".join(key.split(".")[:parts]))
    assert found == {False: frozen, True: free}
    before = {k: v.clone() for k, v in model.state_dict().items() if "running" in k}
    model.train()(torch.randn(2, 3, 64, 64))
    moved = {k for k, v in before.items() if not torch.equal(model.state_dict()[k], v)}
    trained = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(moved) == 2 * len(trained) > 0


# Arguments that a backbone refuses, and a part of its message.
TIMM_ERRORS = (
    ({"name": "resnet5O"}, "timm has no network 'resnet5O'. Close to it: 'resnet50'"),
    ({"out_features": ["stage6"]}, "no feature map stage6: choose from stage1, stage2, stage3"),
    ({"out_features": []}, r"no feature map \(none asked for\)"),
    ({"norm": "GN"}, "NORM is 'GN', .*choose BN, .*FrozenBN or SyncBN"),
    ({"arguments": {"with_wings": True}}, "cannot make .*'resnet10t' .*with_wings"),
    ({"name": "gmlp_s16_224"}, "of one size only: .*dynamic_img_size|cannot make"),
    ({"name": "swin_tiny_patch4_window7_224"}, "of one size only: .*dynamic_img_size"),
    ({"name": "nfnet_f7", "pretrained": True}, "no trained weights of 'nfnet_f7'"),
    ({"name": "convnext_atto", "freeze_at": 1}, "FREEZE_AT is 1, .*strides 4, 8, 16, 32"),
    ({"name": "vit_small_patch14_dinov2"}, "stride 14.*powers of 2|one size only"),
)
TORCHVISION_ERRORS = (
    ({"name": "shufflenet"}, "no network 'shufflenet'. Close to it: 'shufflenet_v2"),
    ({"nodes": ["layer7"]}, "no node 'layer7'. Close to it: 'layer"),
    ({"nodes": []}, "NODES is empty: choose .*layer1"),
    ({"nodes": ["fc"]}, r"Node fc gives \(1, 1000\), which is no feature map"),
    ({"nodes": ["avgpool"]}, r"Node avgpool gives \(1, 512, 1, 1\), which is no feature map"),
    ({"nodes": ["layer1.0", "layer1.1"]}, "layer1.1 has stride 4, and so has another"),
    ({"norm": "GN"}, "NORM is 'GN'"),
    ({"freeze_at": 2}, "FREEZE_AT is 2, .*the feature maps have strides 8"),
)


@pytest.mark.parametrize(("options", "message"), TIMM_ERRORS)
def test_timm_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message), shapes_alone():
        TimmBackbone(**{"name": "resnet10t", **options})


@pytest.mark.parametrize(("options", "message"), TORCHVISION_ERRORS)
def test_torchvision_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message), shapes_alone():
        TorchvisionBackbone(**{"name": "resnet18", "nodes": ["layer2"], **options})


def test_pretrained_weights_that_are_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        FileNotFoundError, match=r"'resnet10t' are not on this machine .*PRETRAINED"
    ):
        TimmBackbone("resnet10t", pretrained=True)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def unreachable(*args: Any, **kwargs: Any) -> None:
        raise URLError("no route")

    monkeypatch.setattr("torch.hub.urlopen", unreachable)
    with pytest.raises(FileNotFoundError, match=r"'resnet18' are not .*no route.*PRETRAINED"):
        TorchvisionBackbone("resnet18", ["layer1"], pretrained=True)


def test_pretrained_weights_are_loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Let timm load a local file instead of a download."""
    peer = timm.create_model("resnet10t")
    random_norms(peer)
    torch.save(peer.state_dict(), tmp_path / "weights.pth")
    overlay = {"file": str(tmp_path / "weights.pth")}
    model = TimmBackbone(
        "resnet10t", pretrained=True, arguments={"pretrained_cfg_overlay": overlay}
    )
    for name, tensor in model.network.state_dict().items():
        assert torch.equal(tensor, peer.state_dict()[name]), name


# In a config ----------------------------------------------------------------------------------


def config(backbone: str, **options: Any) -> CfgNode:
    """Return the config of a small detector. In ``options``, "__" stands for a dot of a key."""
    cfg = get_cfg()
    add_vovnet_config(cfg)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.BACKBONE.update(NAME=backbone, FREEZE_AT=0)
    cfg.MODEL.TIMM.NAME = "resnet10t"
    cfg.MODEL.FPN.update(IN_FEATURES=list(STAGES), OUT_CHANNELS=8)
    cfg.MODEL.RPN.IN_FEATURES = ["p2", "p3", "p4", "p5", "p6"]
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[32], [64], [128], [256], [512]]
    cfg.MODEL.ROI_HEADS.update(NAME="StandardROIHeads", IN_FEATURES=["p2", "p3"], NUM_CLASSES=3)
    cfg.MODEL.ROI_BOX_HEAD.update(NAME="FastRCNNConvFCHead", NUM_FC=1, FC_DIM=8)
    cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION = 3
    cfg.merge_from_list([x for k, v in options.items() for x in (k.replace("__", "."), v)])
    return cfg


@pytest.mark.parametrize("kind", ["timm", "torchvision"])
def test_weights_of_the_config_replace_a_download(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[bool] = []
    backbone = {"timm": "TimmBackbone", "torchvision": "TorchvisionBackbone"}[kind]
    monkeypatch.setattr(build, backbone, lambda *_, pretrained, **__: given.append(pretrained))
    cfg = config(f"build_{kind}_backbone")
    cfg.MODEL[kind.upper()].PRETRAINED = True
    for weights in ("", "weights.pth"):
        cfg.MODEL.WEIGHTS = weights
        BACKBONE_REGISTRY.get(cfg.MODEL.BACKBONE.NAME)(cfg, ShapeSpec(channels=3))
    assert given == [True, False]


@pytest.mark.parametrize(
    ("builder", "levels"),
    [
        ("build_timm_fpn_backbone", {2: 32, 3: 16, 4: 8, 5: 4, 6: 2}),
        ("build_retinanet_timm_fpn_backbone", {3: 16, 4: 8, 5: 4, 6: 2, 7: 1}),
    ],
)
def test_fpn(builder: str, levels: dict[int, int]) -> None:
    features = STAGES if "retinanet" not in builder else STAGES[1:]
    model = build_backbone(config(builder, MODEL__FPN__IN_FEATURES=list(features)))
    maps = model(torch.randn(1, 3, 128, 128))
    assert {n: tuple(m.shape) for n, m in maps.items()} == {
        f"p{level}": (1, 8, size, size) for level, size in levels.items()
    }
    if "retinanet" in builder:
        assert model.top_block.p6.in_channels == model.bottom_up.output_shape()["stage5"].channels


def test_arguments_reach_the_network(tmp_path: Path) -> None:
    (tmp_path / "net.yaml").write_text(
        "MODEL: {TIMM: {NAME: swin_tiny_patch4_window7_224, OUT_FEATURES: [stage2],"
        " ARGUMENTS: {dynamic_img_size: True, embed_dim: 48}}}"
    )
    cfg = config("build_timm_backbone")
    cfg.merge_from_file(str(tmp_path / "net.yaml"))
    with shapes_alone():
        assert build_backbone(cfg).output_shape()["stage2"].channels == 48
        cfg.MODEL.TIMM.ARGUMENTS.img_size = [64, 96]
        assert build_backbone(cfg).image_shape == (3, 64, 96)


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        # Feature maps after the convolution of a transition, before its pooling.
        ("densenet201", "features.transition{}.conv", {8: 256, 16: 896, 32: 1920}),
        ("densenet161", "features.transition{}.conv", {8: 384, 16: 1056, 32: 2208}),
    ],
)
@pytest.mark.slow
def test_densenet_taps(name: str, options: str, expected: dict[int, int]) -> None:
    nodes = [*(options.format(i) for i in (2, 3)), "features.norm5"]
    with shapes_alone():
        model = TorchvisionBackbone(name, nodes)
    assert {s.stride: s.channels for s in model.output_shape().values()} == expected


def test_mobilenet_taps() -> None:
    """Check the feature maps conv11 and conv13, which SSD300 with MobileNet uses."""
    with shapes_alone():
        model = TimmBackbone("mobilenetv1_100", out_features=["stage4", "stage5"])
        maps = model(torch.empty(1, 3, 300, 300))
    assert [tuple(m.shape[1:]) for m in maps.values()] == [(512, 19, 19), (1024, 10, 10)]
    # Table 8 of the MobileNet paper, minus 1024 * 1000 + 1000 parameters of the classifier.
    assert sum(p.numel() for p in model.parameters()) == 4_231_976 - 1_025_000


def test_checkpoints(tmp_path: Path) -> None:
    """Save a detector with a timm backbone, resume it, and load it with Detectron2's class."""
    models = [build_model(config("build_timm_fpn_backbone")) for _ in range(3)]
    random_norms(models[0])
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in models]
    sum(p.sum() for p in models[0].parameters()).backward()
    optimizers[0].step()
    VoVNetCheckpointer(models[0], str(tmp_path), optimizer=optimizers[0]).save(
        "model_1", iteration=7
    )
    checkpointer = VoVNetCheckpointer(models[1], str(tmp_path), optimizer=optimizers[1])
    assert checkpointer.resume_or_load("", resume=True)["iteration"] == 7
    DetectionCheckpointer(models[2]).load(str(tmp_path / "model_1.pth"))
    expected = models[0].state_dict()
    for model in models[1:]:
        assert all(torch.equal(v, expected[k]) for k, v in model.state_dict().items())
    momenta = [
        [s["momentum_buffer"] for s in o.state_dict()["state"].values()] for o in optimizers[:2]
    ]
    assert len(momenta[0]) > 0
    assert all(torch.equal(a, b) for a, b in zip(*momenta, strict=True))


def test_frozen_without_weights() -> None:
    cfg = config("build_timm_fpn_backbone", MODEL__TIMM__NORM="FrozenBN")
    with pytest.raises(ValueError, match=r"MODEL.WEIGHTS is empty .*MODEL.TIMM.NORM BN"):
        check_initialisation(cfg, training=True, resuming=False)
    cfg.MODEL.TIMM.PRETRAINED = True
    check_initialisation(cfg, training=True, resuming=False)


# Second implementation of DenseNet-67 and PeleeNet, from the tables of the papers --------------


class Replay:
    """Layers as plain functions, which take the weights of a network in the order of use."""

    def __init__(self, network: nn.Module):
        self.convs = [m for m in network.modules() if isinstance(m, nn.Conv2d)]
        self.norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]

    def norm(self, x: torch.Tensor) -> torch.Tensor:
        m = self.norms.pop(0)
        assert m.num_features == x.shape[1]
        return F.batch_norm(x, m.running_mean, m.running_var, m.weight, m.bias, eps=1e-5)

    def conv(self, x: torch.Tensor, width: int, kernel: int, stride: int = 1) -> torch.Tensor:
        m = self.convs.pop(0)
        assert m.bias is None
        assert m.weight.shape == (width, x.shape[1], kernel, kernel)
        return F.conv2d(x, m.weight, stride=stride, padding=kernel // 2)

    def post(self, x: torch.Tensor, *conv: int) -> torch.Tensor:
        return self.norm(self.conv(x, *conv)).relu()

    def pre(self, x: torch.Tensor, *conv: int) -> torch.Tensor:
        return self.conv(self.norm(x).relu(), *conv)

    def assert_used_up(self) -> None:
        assert (self.convs, self.norms) == ([], [])


def padded(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad with zeros to an even size. Return the result, and ones where there is no padding."""
    pad = (0, x.shape[3] % 2, 0, x.shape[2] % 2)
    return F.pad(x, pad), F.pad(torch.ones_like(x), pad)


def max_halved(x: torch.Tensor) -> torch.Tensor:
    values, inside = padded(x)
    windows = torch.where(inside > 0, values, -1e9).unfold(2, 2, 2).unfold(3, 2, 2)
    return windows.amax((4, 5))


def mean_halved(x: torch.Tensor) -> torch.Tensor:
    values, inside = (t.unfold(2, 2, 2).unfold(3, 2, 2).sum((4, 5)) for t in padded(x))
    return values / inside


def densenet67(net: Replay, x: torch.Tensor) -> dict[str, torch.Tensor]:
    for width, stride in ((64, 2), (64, 1), (128, 1)):
        x = net.post(x, width, 3, stride)
    x = max_halved(x)
    for number, (layers, width) in enumerate(((6, 224), (8, 352), (8, 480), (8, 256)), start=1):
        for _ in range(layers):
            x = torch.cat([x, net.pre(net.pre(x, 64, 1), 16, 3)], dim=1)
        x = net.pre(x, width, 1)
        if number == 1:
            x = max_halved(x)
        if number == 2:
            first = x
            x = pooled = max_halved(x)
    return {"first": first, "second": torch.cat([x, net.pre(pooled, 256, 1)], dim=1)}


def peleenet(net: Replay, x: torch.Tensor) -> dict[str, torch.Tensor]:
    x = net.post(x, 32, 3, 2)
    x = torch.cat([net.post(net.post(x, 16, 1), 32, 3, 2), max_halved(x)], dim=1)
    x = net.post(x, 32, 1)
    maps = {}
    for stage, (layers, width) in enumerate(((3, 16), (4, 32), (8, 64), (6, 64)), start=2):
        if stage > 2:
            x = mean_halved(x)
        for _ in range(layers):
            narrow = x.shape[1] // 8 * 4 if width > x.shape[1] // 2 else width
            one = net.post(net.post(x, narrow, 1), 16, 3)
            two = net.post(net.post(net.post(x, narrow, 1), 16, 3), 16, 3)
            x = torch.cat([x, one, two], dim=1)
        x = maps[f"stage{stage}"] = net.post(x, (128, 256, 512, 704)[stage - 2], 1)
    return maps


@pytest.mark.parametrize("size", [(64, 96), (67, 101)])
@pytest.mark.parametrize(("kind", "derived"), [("DenseNet-67", densenet67), ("PeleeNet", peleenet)])
def test_second_derivation(kind: str, derived: Any, size: tuple[int, int]) -> None:
    model = make(kind).eval().double()
    random_norms(model)
    x, net = torch.randn(1, 3, *size, dtype=torch.float64), Replay(model)
    with torch.no_grad():
        found, expected = model(x), derived(net, x)
    net.assert_used_up()
    assert list(found) == list(expected)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name])
        assert model.output_shape()[name].channels == expected[name].shape[1]


@pytest.mark.parametrize("pool", [halve, average_halve])
def test_pooling_in_a_graph_equals_ceil_mode(pool: Callable[..., torch.Tensor]) -> None:
    x = torch.randn(1, 2, 7, 5) - 2  # most values are negative
    torch.testing.assert_close(torch.jit.trace(pool, x)(x), pool(x))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["DenseNet-67", "PeleeNet"])
def test_graphs_compute_the_same(kind: str) -> None:
    """Export graphs without ceil mode, and compare them at an odd size."""
    model = make(kind).eval().double()
    random_norms(model)
    x = torch.randn(1, 3, 67, 101, dtype=torch.float64)
    with torch.no_grad():
        program = torch.export.export(model, (x,), strict=False)
        expected = model(x)
    pools = [n for n in program.graph.nodes if "pool2d" in str(n.target)]
    assert len(pools) > 0
    assert not any(argument is True for node in pools for argument in node.args)
    for found, name in zip(program.module()(x).values(), expected, strict=True):
        torch.testing.assert_close(found, expected[name])


def test_peleenet_is_as_large_as_published() -> None:
    """Compare with the published 2.802M parameters and 508M multiply-adds of the classifier."""
    model = PeleeNet(num_classes=1000)
    assert sum(p.numel() for p in model.parameters()) == 2_802_248
    assert round(analyze(model, (224, 224)).total.multiply_adds / 1e6) == 508
    assert model(torch.zeros(2, 3, 64, 64))["linear"].shape == (2, 1000)


def test_peleenet_features() -> None:
    model = PeleeNet(out_features=["stage3", "stem"])
    assert not hasattr(model, "stage4")
    assert list(model(torch.zeros(1, 3, 64, 64))) == ["stage3", "stem"]
    with pytest.raises(ValueError, match="no feature stage6: choose from stem, stage2"):
        PeleeNet(out_features=["stage6"])
    with pytest.raises(ValueError, match="freeze_at is 6: choose 0"):
        PeleeNet(freeze_at=6)
