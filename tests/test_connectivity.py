# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Connectivity of known weights and of every layout, and the sources of the slices of weights."""

import json
import pickle
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import plot_connectivity
import pytest
import timm
import torch
import torchvision
from matplotlib.figure import Figure
from state_dicts import COMPLETE_LAYOUTS
from torch import Tensor, nn

from vovnet_d2 import VOVNET_SPECS, VoVNet, VoVNetSpec, analysis, convert_state_dict
from vovnet_d2.analysis.connectivity import Connectivity, _label, measure_connectivity
from vovnet_d2.modeling.baselines.cifar import CIFAR_SPECS, CifarClassifier, CifarSpec

NAN = float("nan")

SMALL = VoVNetSpec(
    stage_mid_channels=(4, 6, 6, 4),
    stage_out_channels=(8, 8, 12, 12),
    blocks_per_stage=(1, 2, 1, 1),
    layers_per_block=2,
    stem_channels=(4, 4, 4),
    ese="all",
)


def fill(weight: Tensor, *slices: tuple[int, float]) -> None:
    """Fill slices of input channels, each given as (width, value), with ±value at random."""
    values = torch.cat([torch.full((width,), value) for width, value in slices])
    signs = torch.randint(0, 2, weight.shape) * 2 - 1
    weight.data = signs * values[:, None, None].expand_as(weight)


def test_osa_by_hand() -> None:
    net = VoVNet(SMALL)
    block = net.stage3[0]
    fill(block.layers[0].weight, (8, 1.0))
    fill(block.layers[1].weight, (6, 2.0))
    fill(block.aggregation.weight, (8, 4.0), (6, 3.0), (6, 0.5))
    found = measure_connectivity(net.state_dict())
    assert [c.block for c in found] == ["stage2.0", "stage3.0", "stage3.1", "stage4.0", "stage5.0"]
    assert found[1].sources == ["input", "1", "2"]
    assert found[1].readers == ["1", "2", "aggregation"]
    expected = [[0.25, NAN, 1.0], [NAN, 0.5, 0.75], [NAN, NAN, 0.125]]
    np.testing.assert_allclose(found[1].strength, expected)
    assert found[1].summary() == {
        "block": "stage3.0",
        "previous layer": 0.375,
        "earlier layers": None,
        "last reader": 0.625,
    }


def test_dense_by_hand() -> None:
    model = CifarClassifier(CifarSpec("dense", layers=2, width=3))
    fill(model.block1.layers[0].conv.weight, (16, 0.2))
    fill(model.block1.layers[1].conv.weight, (16, 0.1), (3, 0.4))
    fill(model.transition1.conv.weight, (16, 0.3), (3, 0.2), (3, 0.1))
    first, _, last = measure_connectivity(model.state_dict())
    expected = [[0.5, 0.25, 0.75], [NAN, 1.0, 0.5], [NAN, NAN, 0.25]]
    np.testing.assert_allclose(first.strength, expected)
    assert first.readers == ["1", "2", "transition1"]
    assert first.summary()["previous layer"] == pytest.approx(0.75)
    assert first.summary()["earlier layers"] == pytest.approx(0.25)
    assert last.readers == ["1", "2", "linear"]


def test_depthwise_by_hand() -> None:
    """Expect the product of depthwise and pointwise weights, and a reduction of the input."""
    spec = replace(SMALL, depthwise=True)
    net = VoVNet(spec)
    block = net.stage3[0]
    fill(block.reduction.weight, (8, 1.0))
    for layer, size in zip(block.layers, (3.0, 0.5), strict=True):
        fill(layer.pointwise.weight, (6, size))
        fill(layer.depthwise.weight, (1, 2.0))
    fill(block.aggregation.weight, (8, 6.0), (6, 3.0), (6, 1.5))
    found = measure_connectivity(net.state_dict())[1]
    assert found.sources == ["input", "reduction", "1", "2"]
    assert found.readers == ["reduction", "1", "2", "aggregation"]
    expected = np.full((4, 4), NAN)
    expected[[0, 1, 2], [0, 1, 2]] = np.array([1.0, 6.0, 1.0]) / 6
    expected[[0, 2, 3], 3] = np.array([6.0, 3.0, 1.5]) / 6
    np.testing.assert_allclose(found.strength, expected)


def test_depthwise_kernel_equals_the_product() -> None:
    """Compare a depthwise pair with one full convolution whose kernel is the product."""
    layer = VoVNet(replace(SMALL, depthwise=True), norm="").stage3[0].layers[1]
    x = torch.randn(1, 6, 5, 5)
    kernel = layer.pointwise.weight * layer.depthwise.weight.transpose(0, 1)
    once = nn.functional.conv2d(x, kernel, layer.pointwise.bias, padding=1).relu()
    torch.testing.assert_close(layer(x), once)


def test_bottleneck_by_hand() -> None:
    net = VoVNet(replace(SMALL, bottleneck=True))
    block = net.stage2[0]
    fill(block.layers[0].reduce.weight, (4, 0.5))
    fill(block.layers[1].reduce.weight, (4, 0.25))
    fill(block.aggregation.weight, (4, 1.0), (4, 2.0), (4, 1.0))
    expected = [[0.25, NAN, 0.5], [NAN, 0.125, 1.0], [NAN, NAN, 0.5]]
    np.testing.assert_allclose(measure_connectivity(net.state_dict())[0].strength, expected)


def assert_same(found: list[Connectivity], expected: list[Connectivity]) -> None:
    assert [(c.block, c.sources, c.readers) for c in found] == [
        (c.block, c.sources, c.readers) for c in expected
    ]
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a.strength, b.strength)


@pytest.mark.parametrize("layout", COMPLETE_LAYOUTS)
@pytest.mark.parametrize("depthwise", [False, True])
def test_every_layout(layout: str, depthwise: bool) -> None:
    native = VoVNet(replace(SMALL, depthwise=depthwise)).state_dict()
    below = {f"backbone.bottom_up.{k}": v for k, v in convert_state_dict(native, layout).items()}
    assert_same(measure_connectivity(below), measure_connectivity(native))


def test_timm_vovnet() -> None:
    block = (model := timm.create_model("ese_vovnet19b_dw")).stages[1].blocks[0]
    found = measure_connectivity(model.state_dict())[1]
    slices = block.conv_concat.conv.weight.detach().abs().split([256, 160, 160, 160], dim=1)
    aggregation = np.array([part.mean().item() for part in slices])
    column = found.strength[[0, 2, 3, 4], -1]
    np.testing.assert_allclose(column / column[0], aggregation / aggregation[0], rtol=1e-5)


def concatenated(maps: Tensor | list[Tensor]) -> Tensor:
    """Return the input of a convolution: one feature map, or several feature maps joined."""
    return torch.cat(maps, dim=1) if isinstance(maps, list) else maps


def captured(
    model: nn.Module, sources: Mapping[str, nn.Module], readers: Mapping[str, nn.Module], size: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the outputs of the sources and the inputs of the readers in a forward pass."""
    given, taken = {}, {}
    for name, module in sources.items():
        module.register_forward_hook(
            lambda m, inputs, output, name=name: given.update({name: output.clone()})
        )
    for name, module in readers.items():
        module.register_forward_pre_hook(
            lambda m, inputs, name=name: taken.update({name: concatenated(*inputs)})
        )
    with torch.no_grad():
        model.eval()(torch.rand(1, 3, size, size))
    return given, taken


def assert_readers_read_their_sources(
    found: Connectivity, given: Mapping[str, Tensor], taken: Mapping[str, Tensor]
) -> None:
    for column, reader in enumerate(found.readers):
        read = [s for s, v in zip(found.sources, found.strength[:, column], strict=True) if v == v]
        inputs = torch.cat([given[source] for source in read], dim=1)
        assert inputs.flatten(1).mean(1).any()
        if taken[reader].dim() == 2:  # the input of a classifier is averaged and normalised
            assert taken[reader].shape[1] == inputs.shape[1]
        else:
            assert torch.equal(taken[reader], inputs)


@pytest.mark.parametrize("variant", [{}, {"depthwise": True}, {"bottleneck": True}], ids=str)
def test_slices_of_osa_belong_to_their_sources(variant: dict[str, bool]) -> None:
    net = VoVNet(replace(SMALL, **variant), norm="BN")
    block, numbered = net.stage3[1], {}
    for index, layer in enumerate(block.layers, start=1):
        numbered[str(index)] = layer
    reduction = {} if isinstance(block.reduction, nn.Identity) else {"reduction": block.reduction}
    given, taken = captured(
        net,
        {"input": net.stage3[0], **reduction, **numbered},
        {**reduction, **numbered, "aggregation": block.aggregation},
        64,
    )
    assert_readers_read_their_sources(measure_connectivity(net.state_dict())[2], given, taken)


@pytest.mark.parametrize("name", CIFAR_SPECS)
@pytest.mark.parametrize("number", [1, 3])
def test_slices_of_cifar_networks_belong_to_their_sources(name: str, number: int) -> None:
    model = CifarClassifier(name)
    block = getattr(model, f"block{number}")
    layers = {str(i): layer for i, layer in enumerate(block.layers, start=1)}
    last = {"transition1": model.transition1} if number == 1 else {"linear": model.linear}
    before = model.stem if number == 1 else nn.Identity()
    given, taken = captured(model, {"input": before, **layers}, {**layers, **last}, 8)
    if number == 3:
        given["input"] = taken["1"]
    found = measure_connectivity(model.state_dict())[number - 1]
    assert_readers_read_their_sources(found, given, taken)


@pytest.mark.parametrize("name", CIFAR_SPECS)
def test_prefix_of_a_cifar_network(name: str) -> None:
    tensors = CifarClassifier(name, last_transition=True).state_dict()
    below = {f"network.{k}": v for k, v in tensors.items()} | {"pixel_mean": torch.zeros(3)}
    found = measure_connectivity(below)
    assert_same(found, measure_connectivity(tensors))
    assert [block.readers[-1] for block in found] == ["transition1", "transition2", "transition3"]


@pytest.mark.parametrize("name", ["V-27-slim", "V-19-dw-eSE"])
def test_largest_is_one(name: str) -> None:
    for found in measure_connectivity(VoVNet(name).state_dict()):
        assert np.nanmax(found.strength) == 1
        assert np.nanmin(found.strength) > 0
        spec = VOVNET_SPECS[name]
        per_layer = 1 + spec.layers_per_block
        reduction = "reduction" in found.readers
        assert np.isfinite(found.strength).sum() == spec.layers_per_block + per_layer + reduction


def test_another_network() -> None:
    with pytest.raises(ValueError, match=r"No VoVNet is in it. It looks like a ResNet"):
        measure_connectivity(torchvision.models.resnet18().state_dict())


def test_weights_that_are_all_zero() -> None:
    tensors = {name: torch.zeros_like(t) for name, t in VoVNet(SMALL).state_dict().items()}
    with pytest.raises(ValueError, match=r"stage2.0: the weights are all zero, or not finite"):
        measure_connectivity(tensors)


def test_tool(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = CifarClassifier("OSA-5x43")
    torch.save({"model": model.state_dict()}, tmp_path / "model.pth")
    arguments = [str(tmp_path / "model.pth"), "--output", str(tmp_path / "out")]
    plot_connectivity.run(plot_connectivity.argument_parser().parse_args(arguments))
    assert "block3" in capsys.readouterr().out
    content = json.loads((tmp_path / "out/connectivity.json").read_text())
    found = measure_connectivity(model.state_dict())
    for written, block in zip(content["blocks"], found, strict=True):
        np.testing.assert_allclose(np.array(written["strength"], float), block.strength)
    lines = (tmp_path / "out/connectivity.csv").read_text().splitlines()
    table = [line for line in lines if not line.startswith("#")]
    assert len(table) == 1 + 3 * (5 + 6)
    assert (tmp_path / "out/connectivity.png").stat().st_size > 10_000


def test_the_figure_has_readers_from_left_to_right() -> None:
    blocks = measure_connectivity(VoVNet(SMALL).state_dict())
    figure = analysis.connectivity.plot_connectivity(blocks, "name of the weights")
    assert (figure.get_supxlabel(), figure.get_supylabel()) == ("reader", "source")
    assert figure.get_suptitle() == "name of the weights"
    for axis, block in zip(figure.axes, blocks, strict=False):
        assert axis.get_title() == block.block
        assert [label.get_text() for label in axis.get_xticklabels()] == block.readers
        assert [label.get_text() for label in axis.get_yticklabels()] == block.sources
        np.testing.assert_array_equal(axis.images[0].get_array().filled(NAN), block.strength)


def test_options_of_the_tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = CifarClassifier("OSA-5x43").state_dict()
    content = {"model": {k: v.numpy() for k, v in tensors.items()}, "__author__": "us"}
    (tmp_path / "model.pkl").write_bytes(pickle.dumps(content))
    titles: list[str] = []
    monkeypatch.setattr(
        plot_connectivity,
        "plot_connectivity",
        lambda blocks, title: titles.append(title) or Figure(),
    )
    words = [str(tmp_path / "model.pkl"), "--output", str(tmp_path / "out"), "--title", "Mine"]
    with pytest.raises(ValueError, match="--allow-pickle"):
        plot_connectivity.run(plot_connectivity.argument_parser().parse_args(words))
    words.append("--allow-pickle")
    plot_connectivity.run(plot_connectivity.argument_parser().parse_args(words))
    assert titles == ["Mine"]


def test_tool_without_weights(tmp_path: Path) -> None:
    """Check untrained weights, which are equally strong for all sources of a layer."""
    arguments = ["OSA-5x43", "--output", str(tmp_path)]
    plot_connectivity.run(plot_connectivity.argument_parser().parse_args(arguments))
    content = json.loads((tmp_path / "connectivity.json").read_text())
    assert content["weights"] == "OSA-5x43, untrained"
    for block in content["blocks"]:
        last = np.array(block["strength"], float)[:, -1]
        assert last.std() < 0.05 * last.mean()
    plot_connectivity.run(plot_connectivity.argument_parser().parse_args(arguments))
    assert json.loads((tmp_path / "connectivity.json").read_text()) == content


def test_labels_do_not_overlap() -> None:
    """Check that every third of 35 names is shown, and the last one instead of a neighbour."""
    axis = Figure().subplots().xaxis
    _label(axis, [str(number) for number in range(35)])
    assert axis.get_ticklocs().tolist() == [*range(0, 32, 3), 34]
