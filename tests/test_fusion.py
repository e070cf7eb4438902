# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Fusing norms into convolutions removes the expected norms and changes nothing else."""

import logging
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from detectron2.modeling import build_model
from devices import DEVICES
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from vovnet_d2 import optimize_for_inference
from vovnet_d2.benchmark.networks import backbone, calibrate_norms
from vovnet_d2.engine import load_config
from vovnet_d2.modeling.baselines.timm_backbone import TimmBackbone
from vovnet_d2.modeling.fusion import fuse_norms


def norms_of(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, _BatchNorm | FrozenBatchNorm2d)]


def draw_scales(model: nn.Module) -> None:
    """Give norms random scales and shifts, as after training."""
    generator = torch.Generator().manual_seed(0)
    for norm in norms_of(model):
        if norm.weight is not None:
            norm.weight.data.uniform_(0.5, 1.5, generator=generator)
            norm.bias.data.normal_(std=0.2, generator=generator)


@pytest.mark.parametrize(
    ("name", "norms_left"),
    [
        ("V-19-slim-dw-eSE", 0),
        ("ResNet-50", 0),
        ("timm:ese_vovnet19b_dw", 0),
        ("timm:resnet18", 0),
        # These norms stay, because a ReLU follows: the first norm of each of 78 layers, the norms
        # of 3 transitions, and the last norm.
        pytest.param("DenseNet-161", 82, marks=pytest.mark.slow),
    ],
)
def test_norms_of_backbones(name, norms_left):
    model = backbone(name).build().eval()
    calibrate_norms(model, torch.randn(2, 3, 96, 96))
    assert_fused(model, torch.randn(1, 3, 64, 64), norms_left)


def assert_fused(model: nn.Module, images: torch.Tensor, norms_left: int) -> None:
    """Compare in float64, where rounding is too small to matter."""
    draw_scales(model)
    model, images = model.double(), images.double()
    with torch.no_grad():
        expected = model(images)
        fuse_norms(model)
        found = model(images)
    assert len(norms_of(model)) == norms_left
    for key, maps in expected.items():
        torch.testing.assert_close(found[key], maps, rtol=1e-6, atol=1e-9)


def test_norms_with_an_activation():
    """Fuse norms of timm, which contain an activation. The activation stays."""
    model = TimmBackbone("ese_vovnet19b_dw", norm="FrozenBN").eval()
    calibrate_norms(model, torch.randn(2, 3, 96, 96))
    assert_fused(model, torch.randn(1, 3, 64, 64), 0)


@pytest.mark.parametrize(
    ("config", "norms_left"),
    [
        # These include transposed convolutions.
        ("Digits/refinedet128_V_27_slim_2000.yaml", 0),
        # The first norm of each branch of the three extra stages, before a ReLU.
        ("PascalVOC-Detection/dsod300_V_27_slim_100k.yaml", 6),
        # In DenseNet-67 the first norm of each of 30 layers, of 4 transitions and of the shortcut,
        # and two norms in each of four extra stages.
        ("PascalVOC-Detection/dsod300_DenseNet_67_100k.yaml", 43),
    ],
)
def test_norms_of_single_shot_detectors(config, norms_left):
    model = build_model(load_config(config, ["MODEL.DEVICE", "cpu"])).eval()
    generator = torch.Generator().manual_seed(0)
    for norm in norms_of(model):
        norm.running_mean.normal_(std=0.1, generator=generator)
        norm.running_var.uniform_(0.5, 2.0, generator=generator)
    draw_scales(model)
    model.double()
    images = torch.randn(1, 3, 192, 192, dtype=torch.double, generator=generator)

    def predictions() -> list[torch.Tensor]:
        with torch.no_grad():
            maps = list(model.backbone(images).values())
            return [x for kind in model.head(maps) for x in kind]

    expected = predictions()
    fuse_norms(model)
    assert len(norms_of(model)) == norms_left
    for found, wanted in zip(predictions(), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-9)


class Pair(nn.Module):
    """Convolution and norm, which the function ``run`` uses."""

    def __init__(self, run: Callable[["Pair", torch.Tensor], dict[str, torch.Tensor]]):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.norm.running_mean += 1
        self.norm.running_var *= 2
        self.run = run

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return self.run(self, x)


def normed(m: Pair, x: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"y": m.norm(m.conv(x))}


@pytest.mark.parametrize("device", DEVICES)
def test_a_pair_without_other_uses_is_fused(device):
    model = Pair(normed).eval().to(device)
    assert_fused(model, torch.randn(1, 3, 8, 8, device=device), 0)


def also_added(m: Pair, x: torch.Tensor) -> dict[str, torch.Tensor]:
    y = m.conv(x)
    return {"y": m.norm(y) + y}


def changed_in_place(m: Pair, x: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"y": m.norm(m.conv(x).relu_())}


def also_returned(m: Pair, x: torch.Tensor) -> dict[str, torch.Tensor]:
    y = m.conv(x)
    return {"x": y, "y": m.norm(y)}


def convolved_twice(m: Pair, x: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"y": m.norm(m.conv(m.conv(x)))}


def normed_twice(m: Pair, x: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"y": m.norm(m.norm(m.conv(x)))}


def written_to(m: Pair, x: torch.Tensor) -> dict[str, torch.Tensor]:
    y = m.conv(x)
    y[:, 0] = 0
    return {"y": m.norm(y)}


@pytest.mark.parametrize(
    "run", [also_added, changed_in_place, also_returned, convolved_twice, normed_twice, written_to]
)
def test_a_pair_with_other_uses_is_not_fused(run):
    assert_fused(Pair(run).eval(), torch.randn(1, 3, 8, 8), 1)


@pytest.mark.parametrize("part", ["conv", "norm"])
def test_modules_with_hooks_are_not_fused(part):
    model = Pair(normed).eval()
    getattr(model, part).register_forward_hook(lambda module, inputs, output: 2 * output)
    assert_fused(model, torch.randn(1, 3, 8, 8), 1)


@pytest.mark.parametrize("change", [nn.utils.parametrizations.weight_norm, nn.utils.weight_norm])
def test_a_parametrised_weight_is_not_fused(change):
    model = Pair(normed).eval()
    change(model.conv)
    assert_fused(model, torch.randn(1, 3, 8, 8), 1)


class DoublingNorm(nn.BatchNorm2d):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


@pytest.mark.parametrize("inside", [False, True])
def test_a_subclass_of_a_norm_is_not_fused(inside):
    model = Pair(normed)
    if inside:
        model.conv, model.norm = Conv2d(3, 3, 1, norm=DoublingNorm(3)), nn.Identity()
    else:
        model.norm = DoublingNorm(3)
    assert_fused(model.eval(), torch.randn(1, 3, 8, 8), 1)


class StandardisingConv2d(Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight - self.weight.mean(dim=(1, 2, 3), keepdim=True)
        return self.norm(F.conv2d(x, weight))


def test_a_subclass_of_a_convolution_is_not_fused():
    model = Pair(lambda m, x: {"y": m.conv(x)})
    model.conv, model.norm = StandardisingConv2d(3, 3, 1, norm=model.norm), nn.Identity()
    assert_fused(model.eval(), torch.randn(1, 3, 8, 8), 1)


def test_fused_weights_have_at_least_float32():
    model = backbone("ResNet-50").build().eval()
    calibrate_norms(model, torch.randn(2, 3, 64, 64))
    model.half()
    found = optimize_for_inference(model).state_dict()
    for name, tensor in optimize_for_inference(model.float()).state_dict().items():
        assert torch.equal(found[name], tensor), name


def test_a_model_in_training_is_refused():
    with pytest.raises(ValueError, match=r"call eval\(\)"):
        fuse_norms(Pair(normed))


def test_a_network_whose_calls_cannot_be_traced(caplog):
    def run(m: Pair, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"y": m.norm(m.conv(x)) * float(x.sum().item() > 0)}

    with caplog.at_level(logging.WARNING):
        assert_fused(Pair(run).eval(), torch.ones(1, 3, 8, 8), 1)
    assert "Separate norms are not fused" in caplog.text
