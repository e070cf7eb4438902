# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Kernels of oneDNN in inference on a CPU, and cases without them."""

import copy
import io
from concurrent.futures import ThreadPoolExecutor

import pytest
import timm
import torch
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone.resnet import build_resnet_backbone
from reference import KINDS, STRUCTURES, TABLE, assert_same_maps, features, random_state, thin
from torch import nn

from vovnet_d2 import VoVNet, VoVNetSpec, optimize_for_inference
from vovnet_d2.modeling import onednn
from vovnet_d2.modeling.onednn import PackedConv2d

STAGES = ("stem", "stage2", "stage3", "stage4", "stage5")
NET = thin(STRUCTURES["eSE in all"])
TOLERANCE = 5e-5  # between two kernels in float32, relative to the largest value of a feature map


def build(net=NET, norm="FrozenBN", **args) -> VoVNet:
    model = VoVNet(VoVNetSpec(**vars(net)), norm=norm, out_features=STAGES, **args)
    model.load_state_dict(random_state(net), strict=False)
    return model.eval().requires_grad_(False)


def kernels(model: nn.Module, x: torch.Tensor) -> list[str]:
    with torch.profiler.profile() as profiler:
        model(x)
    return [event.name for event in profiler.events() if "convolution" in event.name]


@pytest.mark.parametrize("variant", KINDS)
def test_errors_of_each_kind_of_variant(variant):
    net = thin(TABLE[variant], 4)
    model = build(net)
    x = torch.randn(2, 3, 65, 96)
    state = {name: tensor.double() for name, tensor in random_state(net).items()}
    exact = features(net, state, x.double())
    found, expected = optimize_for_inference(model)(x), model(x)
    for name, truth in exact.items():
        error, eager = ((m[name] - truth).square().mean().sqrt() for m in (found, expected))
        assert error <= 2 * eager, name


SHAPES = [(1, 32, 32), (3, 33, 65), (1, 47, 101), (2, 64, 32), (8, 40, 40)]


@pytest.mark.parametrize("structure", STRUCTURES)
def test_sizes(structure):
    model = build(thin(STRUCTURES[structure]))
    optimized = optimize_for_inference(model)
    for batch, *size in [*SHAPES, *SHAPES]:
        x = torch.randn(batch, 3, *size)
        assert_same_maps(optimized(x), model(x), TOLERANCE)
    for x in (torch.randn(2, 64, 64, 3).permute(0, 3, 1, 2), torch.randn(2, 3, 64, 130)[..., ::2]):
        assert_same_maps(optimized(x), model(x), TOLERANCE)


def test_empty_batch():
    assert optimize_for_inference(build())(torch.zeros(0, 3, 64, 64))["stage5"].shape[0] == 0


@pytest.mark.parametrize(
    "args",
    [
        {"stage_with_dcn": (0, 0, 1, 1), "with_modulated_dcn": True},
        {"stage5_dilation": 2},
        {"norm": "GN"},
        {"norm": ""},
    ],
    ids=str,
)
def test_kinds_of_networks(args):
    model = build(**args)
    for name, parameter in model.named_parameters():
        if "offset" in name:
            nn.init.normal_(parameter, std=0.1)
    x = torch.randn(2, 3, 70, 64)
    assert_same_maps(optimize_for_inference(model)(x), model(x), TOLERANCE)


def test_all_convolutions_are_packed():
    optimized = optimize_for_inference(build())
    x = torch.randn(1, 3, 64, 64)
    convolutions = [m for m in optimized.modules() if isinstance(m, nn.Conv2d)]
    names = kernels(optimized, x)
    if not torch.backends.mkldnn.is_available():  # as in torch for Apple processors
        assert not [name for name in names if name.startswith("mkldnn::")]
        return
    assert names.count("mkldnn::_convolution_pointwise") == len(convolutions)
    assert set(names) == {"mkldnn::_convolution_pointwise", "mkldnn::_reorder_convolution_weight"}
    assert kernels(optimized, x).count("mkldnn::_reorder_convolution_weight") == 0


def test_many_sizes_share_few_weights():
    optimized = optimize_for_inference(build())
    for side in range(32, 32 + onednn._SIZES + 8):
        optimized(torch.zeros(1, 3, side, 40))
    for module in optimized.modules():
        if isinstance(module, PackedConv2d):
            packed = module._packed_before()
            assert len(packed) <= onednn._SIZES
            # The number of packed orders depends on the CPU.
            assert len({id(weight) for weight in packed.values()}) <= onednn._SIZES // 4


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("_convolution_pointwise", AttributeError),
        ("_reorder_convolution_weight", TypeError),
        ("_get_mkldnn_serialized_md", AttributeError),
        ("", None),
    ],
)
def test_a_torch_without_the_operators(monkeypatch, name, error):
    """Simulate a torch in which the private operators are missing or different."""

    class Operators:
        def __getattr__(self, asked):
            if asked == name and error is AttributeError:
                raise AttributeError(asked)
            operator = getattr(operators, asked)
            return (lambda: operator()) if asked == name else operator

    operators = torch.ops.mkldnn
    model, x = build(), torch.randn(1, 3, 64, 64)
    onednn._supported_dtypes.cache_clear()
    if error is None:
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    else:
        monkeypatch.setattr(torch.ops, "mkldnn", Operators())
    try:
        optimized = optimize_for_inference(model)
        assert_same_maps(optimized(x), model(x), TOLERANCE)  # the first call tries the operators
        assert not [kernel for kernel in kernels(optimized, x) if kernel.startswith("mkldnn::")]
    finally:
        monkeypatch.undo()
        onednn._supported_dtypes.cache_clear()


def test_plain_operators_are_used_if_packed_ones_do_not_apply():
    optimized = optimize_for_inference(build())
    x = torch.randn(1, 3, 64, 64)
    expected = optimized(x)
    traced = torch.jit.trace(optimized, x, strict=False)
    assert "mkldnn" not in str(traced.inlined_graph)
    assert_same_maps(traced(x), expected, TOLERANCE)
    program = torch.export.export(optimized, (x,))
    assert "mkldnn" not in str(program.graph)
    assert_same_maps(program.module()(x), expected, TOLERANCE)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert optimized(x)["stage5"].dtype == torch.bfloat16
    x.requires_grad_()
    optimized(x)["stage5"].sum().backward()
    assert x.grad.any()


def test_copies_of_used_networks():
    optimized = optimize_for_inference(build())
    x = torch.randn(1, 3, 64, 64)
    expected = optimized(x)
    file = io.BytesIO()
    torch.save(optimized, file)
    file.seek(0)
    for twin in (copy.deepcopy(optimized), torch.load(file, weights_only=False)):
        assert_same_maps(twin(x), expected, 0)
    assert_same_maps(optimized.double()(x.double()), expected, TOLERANCE)


def test_weights_loaded_after_use():
    first, second = build(), build(norm="FrozenBN")
    nn.init.normal_(second.stage5[0].layers[0].weight, std=0.1)
    first, second = optimize_for_inference(first), optimize_for_inference(second)
    x = torch.randn(1, 3, 64, 64)
    assert not torch.allclose(first(x)["stage5"], second(x)["stage5"])
    first.load_state_dict(second.state_dict())
    assert_same_maps(first(x), second(x), 0)


def test_weights_exchanged_after_use():
    optimized = optimize_for_inference(build())
    other = {name: p + 0.01 * torch.randn_like(p) for name, p in optimized.named_parameters()}
    x = torch.randn(1, 3, 64, 64)
    before = optimized(x)
    twin = copy.deepcopy(optimized)
    for name, weight in other.items():
        twin.get_submodule(name.rpartition(".")[0])._parameters[name.rpartition(".")[2]] = (
            nn.Parameter(weight, False)
        )
    expected = twin(x)
    assert not torch.allclose(before["stage5"], expected["stage5"])
    for _ in range(2):
        assert_same_maps(torch.func.functional_call(optimized, other, (x,)), expected, 0)
        assert_same_maps(optimized(x), before, 0)
    for name, parameter in optimized.named_parameters():
        parameter.copy_(other[name])
    assert_same_maps(optimized(x), expected, 0)


def test_weights_made_in_inference_mode():
    with torch.inference_mode():
        model = build()
        x = torch.randn(1, 3, 64, 64)
        assert_same_maps(optimize_for_inference(model)(x), model(x), TOLERANCE)


def test_weights_changed_in_inference_mode():
    """Change weights in inference mode, where tensors have no version counter."""
    x = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        made_there = optimize_for_inference(build())
        copied_there = copy.deepcopy(made_there)
        for optimized in (made_there, copied_there):
            optimized(x)
            for parameter in optimized.parameters():
                parameter.mul_(0.9)
            expected = copy.deepcopy(optimized)(x)
            assert_same_maps(optimized(x), expected, TOLERANCE)


def test_threads():
    optimized = optimize_for_inference(build())
    inputs = [torch.randn(1, 3, 32 + side, 48) for side in range(8)] * 4
    expected = [copy.deepcopy(optimized)(x) for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        for found, maps in zip(pool.map(optimized, inputs), expected, strict=True):
            assert_same_maps(found, maps, TOLERANCE)


class Head(nn.Module):
    """Network with a convolution that is used with and without a ReLU after it."""

    def __init__(self):
        super().__init__()
        self.shared = nn.Conv2d(3, 4, 3)
        self.own = nn.Sequential(nn.Conv2d(3, 4, 3, padding="same"), nn.Conv2d(4, 4, 1), nn.ReLU())
        self.both = nn.Sequential(self.shared, nn.ReLU())

    def forward(self, x):
        return {"a": self.shared(x), "b": self.both(x), "c": self.own(x)}


def operators(model: nn.Module, x: torch.Tensor) -> list[str]:
    with torch.profiler.profile() as profiler, torch.no_grad():
        model(x)
    return [event.name for event in profiler.events()]


def test_relu_after_a_convolution():
    model = Head().eval()
    optimized = optimize_for_inference(model)
    x = torch.randn(2, 3, 9, 9)
    with torch.no_grad():
        assert_same_maps(optimized(x), model(x), TOLERANCE)
    assert not [name for name in operators(optimized, x) if "relu" in name]


class Tapped(nn.Module):
    """Network that runs a Sequential as a whole, and its parts."""

    def __init__(self):
        super().__init__()
        pool = nn.AvgPool2d(2)
        convs = [nn.Conv2d(3, 3, 3, padding=1) for _ in range(2)]
        relu = nn.ReLU()
        self.net = nn.Sequential(convs[0], pool, convs[1], pool, relu, relu, convs[0], relu)

    def forward(self, x):
        return {"first": self.net[0](x), "before": self.net[:4](x), "end": self.net(x)}


def test_parts_of_a_sequential():
    model = Tapped().eval()
    optimized = optimize_for_inference(model)
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        assert (model(x)["before"] < 0).any()
        assert_same_maps(optimized(x), model(x), TOLERANCE)


@pytest.mark.parametrize("hooked", [0, 1], ids=["convolution", "ReLU"])
def test_hooks_see_the_same_tensors(hooked):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval()
    seen = []
    model[hooked].register_forward_hook(lambda module, args, output: seen.append(output.clone()))
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        model(x)
        optimize_for_inference(nn.Sequential(model))(x)
    torch.testing.assert_close(seen[1], seen[0])


def test_other_networks():
    resnet = build_resnet_backbone(get_cfg(), ShapeSpec(channels=3)).eval()
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        assert_same_maps(optimize_for_inference(resnet)(x), resnet(x), TOLERANCE)
        peer = timm.create_model("ese_vovnet19b_dw", features_only=True).eval()
        for found, expected in zip(optimize_for_inference(peer)(x), peer(x), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        for padding, mode in ((1, "reflect"), ("same", "zeros")):  # neither of the two is packed
            conv = nn.Conv2d(3, 4, 3, padding=padding, padding_mode=mode).eval()
            torch.testing.assert_close(optimize_for_inference(conv)(x), conv(x))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_on_a_gpu(dtype):
    model = build()
    x = torch.randn(2, 3, 65, 96)
    optimized = optimize_for_inference(copy.deepcopy(model).cuda(), dtype=dtype)
    found = {name: y.cpu() for name, y in optimized(x.cuda()).items()}
    tolerance = {torch.float32: 1e-2, torch.bfloat16: 2**-5, torch.float16: 2**-8}[dtype]
    assert_same_maps(found, model(x), tolerance)
