# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""The network as a graph of torch.fx, as an FX-quantized network, and in TorchScript."""

import detectron2.export  # noqa: F401 (lets torch.jit.script take Detectron2's FPN)
import pytest
import torch
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from reference import STRUCTURES, assert_same_maps, features, random_state, short, thin
from torch import nn

from vovnet_d2 import VoVNet, VoVNetSpec, optimize_for_inference
from vovnet_d2.modeling.fpn import attach_fpn
from vovnet_d2.modeling.layers import NORMS

FEATURES = ["stem", "stage3", "stage5", "linear"]
MAKERS = {
    "torch.fx": torch.fx.symbolic_trace,
    "TorchScript": torch.jit.script,
    "both": lambda model: torch.jit.script(torch.fx.symbolic_trace(model)),
}
SCRIPTED = ["eSE in all", "no residual", "depthwise", "bottleneck, pooled stem"]  # slow to compile


def build(structure: str, **args) -> VoVNet:
    spec = VoVNetSpec(**vars(short(thin(STRUCTURES[structure]))))
    return VoVNet(spec, num_classes=7, out_features=FEATURES, **args).double()


def images(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def gradients(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    sum(output.square().mean() for output in model(x).values()).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("structure", "maker"),
    [
        *((structure, "torch.fx") for structure in STRUCTURES),
        *((structure, "TorchScript") for structure in SCRIPTED),
        ("eSE in last", "both"),
    ],
)
def test_graphs_equal_a_second_derivation(structure, maker):
    """Compare feature maps in inference, and gradients in training with frozen norms."""
    net = short(thin(STRUCTURES[structure]))
    state = random_state(net, num_classes=7)
    model = build(structure).eval()
    model.load_state_dict(state)
    graph = MAKERS[maker](model)
    assert {*graph.state_dict()} == {*model.state_dict()}
    x = images(2, 3, 47, 70)
    expected = features(net, state, x)
    expected = {name: expected[name] for name in FEATURES}
    assert_same_maps(graph(x), expected)
    found = gradients(MAKERS[maker](model.train()), x)
    expected = gradients(model, x)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient)


@pytest.mark.parametrize("maker", ["torch.fx", "TorchScript"])
@pytest.mark.parametrize("norm", [n for n in NORMS if "Sync" not in n and n != "FrozenBN"])
def test_graphs_with_each_norm(norm, maker):
    model = build(
        "eSE in last",
        norm=norm,
        stage_with_dcn=[False, True, False, False],
        with_modulated_dcn=True,
        stage5_dilation=2,
        checkpoint_blocks=True,
    )
    nn.init.normal_(model.stage3[0].layers[0].offset.bias)
    x = images(2, 3, 64, 64)
    for training in (True, False):
        graph = MAKERS[maker](model.train(training))
        before = {name: buffer.clone() for name, buffer in model.named_buffers()}
        expected = model(x)
        for name, buffer in model.named_buffers():
            buffer.copy_(before[name])
        assert_same_maps(graph(x), expected)


@pytest.mark.parametrize("maker", ["torch.fx", "TorchScript"])
def test_graphs_of_optimized_networks_with_an_fpn(maker):
    names = ["stage3", "stage4", "stage5"]
    spec = VoVNetSpec(**vars(short(thin(STRUCTURES["eSE in all"]))))
    body = VoVNet(spec, out_features=names)
    model = attach_fpn(body, in_features=names, out_channels=8, top_block=LastLevelMaxPool())
    model.eval()
    x = images(1, 3, 64, 96).float()
    with torch.no_grad():
        expected = model(x)
        graph = MAKERS[maker](optimize_for_inference(model))
        assert_same_maps(graph(x), expected, tolerance=1e-4)


@pytest.mark.filterwarnings("ignore")  # torch.ao warns of its own parts
@pytest.mark.parametrize(
    "structure", ["eSE in all", pytest.param("depthwise", marks=pytest.mark.slow)]
)
def test_fx_quantization(structure):
    """Quantize after calibration, and prepare quantization-aware training."""
    fx = pytest.importorskip("torch.ao.quantization.quantize_fx")
    engine = torch.backends.quantized.engine
    if engine == "none":
        pytest.skip("this torch has no quantized operators")
    mapping = torch.ao.quantization.get_default_qconfig_mapping(engine)
    qat_mapping = torch.ao.quantization.get_default_qat_qconfig_mapping(engine)
    model = build(structure, norm="BN").float()
    x = images(2, 3, 64, 64).float()
    prepared = fx.prepare_qat_fx(model.train(), qat_mapping, (x,))
    assert {*gradients(prepared, x)} == {name for name, _ in prepared.named_parameters()}
    for optimized in (False, True):
        model.eval()
        exact = optimize_for_inference(model) if optimized else model
        prepared = fx.prepare_fx(exact, mapping, (x,))
        with torch.no_grad():
            prepared(x)
            quantized = fx.convert_fx(prepared)
            found, expected = quantized(x), exact(x)
        operators = [str(node.target) for node in quantized.graph.nodes]
        assert sum("conv2d" in name for name in operators) > 10
        assert all("quantized" in name for name in operators if "conv2d" in name)
        for name, tensor in expected.items():
            error = (found[name] - tensor).norm() / tensor.norm()
            assert 0 < error < 0.3, f"{name}: {error:.3f}"
