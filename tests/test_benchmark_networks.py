# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Networks and treatments of the benchmark, compared with other counters."""

from dataclasses import replace
from math import prod

import pytest
import timm
import torch
import torchvision
from devices import shapes_alone
from fvcore.nn import FlopCountAnalysis
from reference import TABLE, tensors
from torch import nn

from vovnet_d2 import VoVNet
from vovnet_d2.analysis import analyze
from vovnet_d2.backends import BACKENDS
from vovnet_d2.benchmark.memory import saved_bytes
from vovnet_d2.benchmark.networks import BACKBONES, backbone, calibrate_norms, detector
from vovnet_d2.benchmark.plain import plain
from vovnet_d2.benchmark.study import Plan, Study
from vovnet_d2.benchmark.treatments import TREATMENTS
from vovnet_d2.benchmark.workload import (
    count_multiply_adds,
    random_images,
    training_step,
)
from vovnet_d2.timing import tf32_in_use

CPU = torch.device("cpu")


# -------------------------------------------------------------------------------------- networks


def peer_parameters(name: str) -> int:
    """Return the parameters of another implementation of the network, without its classifier."""
    if name in TABLE:
        named = tensors(TABLE[name])
        return sum(prod(shape) for _, name, shape in named if "running" not in name)
    with shapes_alone():
        if name.startswith("DenseNet"):
            peer = timm.create_model(name.lower().replace("-", ""), num_classes=0)
        else:
            peer = torchvision.models.get_model(name.lower().replace("-", ""))
            peer.fc = nn.Identity()
    return sum(p.numel() for p in peer.parameters())


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] if n == "DenseNet-201" else []) for n in BACKBONES],
)
def test_every_backbone(name):
    network = backbone(name)
    maps = {}
    with shapes_alone():
        model = network.build()
        model.register_forward_hook(lambda module, args, output: maps.update(output))
        complexity = analyze(model, (64, 64))
    assert complexity.total.parameters == peer_parameters(name)
    assert [64 // m.shape[-1] for m in maps.values()] == [4, 8, 16, 32]


# GMACs at 224x224, from published tables and independent counts.
@pytest.mark.parametrize(
    ("name", "gmacs"),
    [
        ("ResNet-50", 3.856),
        ("ResNet-101", 7.568),
        ("V-39-eSE", 7.075),
        ("V-57-eSE", 8.935),
        ("V-99-eSE", 16.495),
        ("V-19-slim-dw-eSE", 0.398),
    ],
)
def test_gflops(name, gmacs):
    with shapes_alone():
        complexity = analyze(backbone(name).build(), (224, 224))
    assert complexity.total.multiply_adds / 1e9 == pytest.approx(gmacs, abs=6e-4)


@pytest.mark.slow
def test_densenet_gflops_equal_those_of_fvcore():
    peer = torchvision.models.densenet161().eval()
    counted = FlopCountAnalysis(peer, torch.zeros(1, 3, 64, 64))
    counted.unsupported_ops_warnings(False)
    convolutions = counted.by_operator()["conv"]
    with shapes_alone():
        found = analyze(backbone("DenseNet-161").build(), (64, 64)).total.multiply_adds
    assert found == convolutions


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("V-39-ese", r"No network 'V-39-ese'. Close to it: 'V-39-eSE'"),
        ("VGG", r"There are V-27-slim, .*timm:NAME"),
        ("timm:ese_vovnet39", r"timm has no network 'ese_vovnet39'. Close to it: .*ese_vovnet39b"),
    ],
)
def test_unknown_networks(name, message):
    with pytest.raises(ValueError, match=message):
        backbone(name).build()


@pytest.mark.parametrize("name", ["V-19-slim-eSE", "ResNet-50"])
def test_feature_maps_of_calibrated_networks_do_not_vanish_or_explode(name):
    model = backbone(name).build()
    image = torch.randn(2, 3, 128, 128)
    calibrate_norms(model, image)
    for maps in model(image).values():
        assert 0.05 < maps.std() < 50


def test_calibrated_norms_have_the_statistics_of_their_inputs():
    model = backbone("V-19-slim-eSE").build()
    image = 3 * torch.randn(2, 3, 64, 64) + 1
    calibrate_norms(model, image)
    conv = model.stem.conv1
    found = nn.functional.conv2d(image, conv.weight, stride=2, padding=1)
    var, mean = torch.var_mean(found, dim=(0, 2, 3))
    torch.testing.assert_close(conv.norm.running_mean, mean, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(conv.norm.running_var, var, rtol=1e-4, atol=0)


def test_a_detector_is_calibrated_on_what_its_backbone_gets():
    model = nn.Module()
    model.backbone = backbone("V-19-slim-eSE").build()
    model.pixel_mean, model.pixel_std = torch.tensor(100.0), torch.tensor(25.0)
    images = torch.randn(2, 3, 64, 64)
    calibrate_norms(model, images)
    conv = model.backbone.stem.conv1
    normalised = (images * 50 + 128 - 100) / 25
    found = nn.functional.conv2d(normalised, conv.weight, stride=2, padding=1)
    mean = found.mean(dim=(0, 2, 3))
    torch.testing.assert_close(conv.norm.running_mean, mean, rtol=1e-4, atol=1e-4)


def test_norms_of_channels_without_variance_do_not_change():
    model = backbone("V-19-slim-eSE").build()
    model.stem.conv1.weight.data[3] = 0
    calibrate_norms(model, torch.randn(2, 3, 64, 64))
    assert model.stem.conv1.norm.running_var[3] == 1


# ------------------------------------------------------------------------------------ treatments


@pytest.mark.parametrize("name", TREATMENTS)
def test_refusals(name, monkeypatch):
    """Refuse what cannot run, on a CPU that has bfloat16."""
    capable = replace(BACKENDS["openvino"], has_half=lambda: True)
    monkeypatch.setitem(BACKENDS, "openvino", capable)
    treatment = TREATMENTS[name]
    on_gpus_only = "tf32" in name or "fp16" in name or name.startswith("tensorrt")
    without_training = name.startswith(("openvino", "onnxruntime"))
    refused = treatment.refusal(CPU, training=True) is not None
    assert refused == (on_gpus_only or without_training)
    to_train_only = name == "checkpointed"
    refused = treatment.refusal(CPU, training=False) is not None
    assert refused == (on_gpus_only or to_train_only)


def test_refusals_of_backends(monkeypatch):
    openvino, int8 = TREATMENTS["openvino"], TREATMENTS["openvino-int8"]
    assert openvino.refusal(CPU, training=True) == "The backend openvino only runs inference."
    for treatment in (openvino, int8, TREATMENTS["tensorrt"]):
        device = torch.device("cpu" if treatment.name == "tensorrt" else "cuda")
        why = "it needs a GPU" if treatment.name == "tensorrt" else "it computes on CPUs"
        expected = f"The backend {treatment.backend} cannot be used on {device}: {why}."
        assert treatment.refusal(device, training=False) == expected
    incapable = replace(BACKENDS["openvino"], has_half=lambda: False)
    monkeypatch.setitem(BACKENDS, "openvino", incapable)
    message = TREATMENTS["openvino-bf16"].refusal(CPU, training=False)
    assert "openvino computes in float32 on this machine" in message
    monkeypatch.setitem(BACKENDS, "openvino", replace(BACKENDS["openvino"], packages=("no_such",)))
    for treatment in (openvino, int8):
        expected = "The backend openvino needs no_such: pip install no_such."
        assert treatment.refusal(CPU, training=False) == expected


def test_tf32_is_set_and_put_back_under_old_and_new_names():
    """Set TF32 by the new names of torch 2.9, after which torch refuses to read the old names."""
    before = tf32_in_use()
    try:
        if hasattr(torch.backends.cudnn, "conv"):
            torch.backends.cudnn.conv.fp32_precision = "ieee"
            torch.backends.cuda.matmul.fp32_precision = "tf32"
        else:
            torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = False, True
        assert tf32_in_use() == (False, True)
        for name, allowed in (("plain", False), ("plain-tf32", True)):
            with TREATMENTS[name].precision(torch.device("cuda")):
                assert tf32_in_use() == (allowed, allowed)
                assert torch.backends.cudnn.allow_tf32 == allowed
            assert tf32_in_use() == (False, True)
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def test_activation_checkpointing_keeps_less_for_the_backward_pass():
    model = backbone("V-19-slim-eSE").build()
    images = random_images(2, (64, 64), CPU)
    kept = {}
    for name in ("optimized", "checkpointed"):
        kept[name] = saved_bytes(TREATMENTS[name].for_training(model), images)
    assert kept["checkpointed"] < 0.5 * kept["optimized"]


def test_training_step_changes_weights_and_counts_thrice():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.Conv2d(8, 8, 3, groups=4), nn.ConvTranspose2d(8, 4, 2)
    )
    wrapped = _Dict(model)
    before = [p.clone() for p in model.parameters()]
    step = training_step(wrapped, torch.randn(2, 3, 12, 12), TREATMENTS["plain"], CPU)
    found = count_multiply_adds(step)
    assert all(not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    first, grouped, transposed = (
        2 * 8 * 10 * 10 * 27,
        2 * 8 * 8 * 8 * 2 * 9,
        2 * 8 * 8 * 8 * 4 * 4,
    )
    # The input of the first layer needs no gradient.
    assert found == 2 * first + 3 * grouped + 3 * transposed


def test_gradients_are_of_one_step():
    model = nn.Conv2d(3, 4, 3)
    step = training_step(_Dict(model), torch.randn(2, 3, 12, 12), TREATMENTS["plain"], CPU)
    gradients = []
    for _ in range(3):
        step()
        gradients.append(model.weight.grad.clone())
    for later in gradients[1:]:
        torch.testing.assert_close(later, gradients[0])


def test_plain_networks_are_contiguous():
    model = VoVNet("V-19-slim-dw-eSE").to(memory_format=torch.channels_last)
    copied = plain(model)
    assert all(parameter.is_contiguous() for parameter in copied.parameters())
    assert not model.stem.conv1.weight.is_contiguous()


def test_keypoint_networks_are_not_trained_channels_last():
    words = ["MODEL.CHANNELS_LAST", "True"]
    faster = detector("COCO-Detection/faster_rcnn_V_39_eSE_FPN_1x.yaml", words)
    keypoint = detector("COCO-Keypoints/keypoint_rcnn_V_39_eSE_FPN_1x.yaml", words)
    assert (faster.channels_last, keypoint.channels_last) == (True, False)


def test_multiply_adds_grow_with_the_image():
    network = backbone("V-19-slim-dw-eSE")
    measured = Study(Plan(networks=[network], energy_seconds=0))
    small, large, again = (
        measured._complexity(network, size).total.multiply_adds
        for size in ((64, 64), (64, 128), (64, 64))
    )
    assert large == pytest.approx(2 * small, rel=0.02)  # eSE costs the same at any size
    assert again == small


class _Dict(nn.Module):
    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"y": self.net(x)}
