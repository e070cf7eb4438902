# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
import copy
import io
import re
from dataclasses import replace
from itertools import combinations

import pytest
import torch
import torch.nn.functional as F
from detectron2.layers import FrozenBatchNorm2d, get_norm
from devices import shapes_alone
from reference import (
    KINDS,
    STRUCTURES,
    TABLE,
    assert_same_maps,
    features,
    parameter_count,
    random_state,
    short,
    thin,
)
from timm.models.vovnet import VovNet as TimmVoVNet
from timm.models.vovnet import model_cfgs as timm_configs
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from vovnet_d2 import VOVNET_SPECS, VoVNet, VoVNetSpec, optimize_for_inference
from vovnet_d2.modeling.layers import NORMS, DeformableConv2d

STAGES = ("stem", "stage2", "stage3", "stage4", "stage5")
V19 = thin(VOVNET_SPECS["V-19-slim-eSE"])
SIZES = [(64, 64), (33, 65), (47, 70), (32, 101)]

each_variant = pytest.mark.parametrize("variant", VOVNET_SPECS)
each_kind = pytest.mark.parametrize("variant", KINDS)
each_stem = pytest.mark.parametrize("stem", ["strided", "pooled"])
each_structure = pytest.mark.parametrize("structure", STRUCTURES)


def build(spec, **args) -> VoVNet:
    """Build a network for inference in float64, with all its feature maps.

    ``spec`` is a spec or a ``Net`` of reference.py.
    """
    if not isinstance(spec, VoVNetSpec):
        spec = VoVNetSpec(**vars(spec))
    return VoVNet(spec, **{"out_features": STAGES, **args}).eval().double()


def images(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def build_on_meta(spec, **args) -> VoVNet:
    """Build a network of full width on the meta device, with shapes but no values."""
    with shapes_alone():
        return VoVNet(spec, **{"out_features": STAGES, **args}).eval()


def randomise(model: nn.Module) -> None:
    for name, tensor in model.state_dict().items():
        if name.endswith(("norm.weight", "bn.weight", "running_var")):
            tensor.uniform_(0.5, 1.5)
        elif tensor.dim() == 1:
            tensor.normal_(std=0.2)


# Size


def learnable(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("variant", "count"),
    [
        ("V-19-slim-dw-eSE", 1_384_752),
        ("V-19-dw-eSE", 5_518_080),
        ("V-19-slim-eSE", 2_653_136),
        ("V-19-eSE", 10_180_416),
        ("V-39-eSE", 25_184_128),
        ("V-57-eSE", 41_454_912),
        ("V-99-eSE", 69_523_520),
    ],
)
def test_parameters_of_published_backbones(variant, count):
    assert learnable(build_on_meta(variant, norm="BN")) == count


@pytest.mark.parametrize(
    ("variant", "millions"), [("V-27-slim", 3.526), ("V-39", 22.600), ("V-57", 36.640)]
)
def test_parameters_of_published_classifiers(variant, millions):
    model = build_on_meta(variant, norm="BN", num_classes=1000, out_features=None)
    assert round(learnable(model) / 1e6, 3) == millions


@each_variant
def test_parameters(variant):
    model = build_on_meta(variant, norm="BN", num_classes=1000, out_features=None)
    assert learnable(model) == parameter_count(TABLE[variant], num_classes=1000)
    del model.linear
    assert learnable(model) == parameter_count(TABLE[variant])


def gmacs(model: nn.Module, size: int = 224) -> float:
    """Return the multiply-adds of convolutions and fully-connected layers in units of 10^9.

    An output costs as many multiply-adds as one filter has weights. Biases, norms and activations
    are not counted."""
    counted = []
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(
                lambda m, _, output: counted.append(output.numel() * m.weight[0].numel())
            )
    with torch.no_grad():
        model(torch.zeros(1, 3, size, size, device="meta"))
    return round(sum(counted) / 1e9, 3)


@pytest.mark.parametrize(
    ("variant", "num_classes", "expected"),
    [
        ("V-27-slim", 1000, 2.177),
        ("V-39", 1000, 7.072),
        ("V-57", 1000, 8.930),
        ("V-19-slim-dw-eSE", None, 0.398),
        ("V-19-dw-eSE", None, 1.332),
        ("V-19-slim-eSE", None, 1.680),
        ("V-19-eSE", None, 4.121),
        ("V-39-eSE", None, 7.075),
        ("V-57-eSE", None, 8.935),
        ("V-99-eSE", None, 16.495),
    ],
)
def test_gmacs(variant, num_classes, expected):
    assert gmacs(build_on_meta(variant, num_classes=num_classes, out_features=None)) == expected


# Feature maps


@each_structure
def test_feature_maps_equal_a_second_derivation(structure):
    net = thin(STRUCTURES[structure])
    state = random_state(net, num_classes=7)
    model = build(net, num_classes=7, out_features=[*STAGES, "linear"])
    model.load_state_dict(state)
    for size in SIZES:
        x = images(2, 3, *size)
        assert_same_maps(model(x), features(net, state, x))


@each_stem
@each_kind
def test_feature_maps_of_each_kind_of_variant(variant, stem):
    net = replace(thin(TABLE[variant]), stem=stem)
    state = random_state(net)
    model = build(net)
    model.load_state_dict(state)
    x = images(1, 3, 65, 96)
    assert_same_maps(model(x), features(net, state, x))


def test_a_wrong_tensor_is_noticed():
    net = thin(STRUCTURES["eSE in all"])
    state = random_state(net)
    model = build(net)
    model.load_state_dict(state)
    first, second = (f"stage4.OSA4_2.layers.{i}.OSA4_2_{i}/conv.weight" for i in (0, 1))
    state[second] = state[second].flip(0)
    x = images(1, 3, 64, 64)
    expected, actual = features(net, state, x), model(x)
    assert_same_maps({k: actual[k] for k in STAGES[:3]}, {k: expected[k] for k in STAGES[:3]})
    with pytest.raises(AssertionError, match="stage4: relative difference"):
        assert_same_maps(actual, expected)
    assert state[first].shape != state[second].shape  # swapped tensors would not even load
    state[first], state[second] = state[second], state[first]
    with pytest.raises(RuntimeError, match=r"size mismatch for stage4\.1\.layers\.0\.weight"):
        model.load_state_dict(state)


@pytest.mark.parametrize("dcn", [False, True])
@pytest.mark.parametrize("structure", ["eSE in all", "pooled stem", "depthwise", "bottleneck"])
def test_dilated_stage5(structure, dcn):
    if dcn and structure in ("depthwise", "bottleneck"):
        return  # an error, which test_wrong_arguments tests
    net = thin(STRUCTURES[structure])
    state = random_state(net)
    model = build(net, stage5_dilation=2, stage_with_dcn=(0, 0, 0, dcn))
    model.load_state_dict(state, strict=not dcn)
    assert model.output_shape()["stage5"].stride == 16
    x = images(1, 3, 95, 130)
    outputs = model(x)
    assert outputs["stage5"].shape[2:] == outputs["stage4"].shape[2:]
    assert_same_maps(outputs, features(net, state, x, stage5_dilation=2))


# VoVNets of timm. They have eSE in the last block of a stage, and no residual with a reduction.

TIMM_CONFIGS = {
    name: config for name, config in timm_configs.items() if config["attn"] in ("", "ese")
}


# The first network of each kind.
TIMM_KINDS = list(
    {
        (config["depthwise"], config["attn"], config["residual"], config["layer_per_block"]): name
        for name, config in reversed(TIMM_CONFIGS.items())
    }.values()
)


def from_timm(config: dict, stem: str) -> VoVNetSpec:
    return VoVNetSpec(
        stage_mid_channels=config["stage_conv_chs"],
        stage_out_channels=config["stage_out_chs"],
        blocks_per_stage=config["block_per_stage"],
        layers_per_block=config["layer_per_block"],
        stem_channels=config["stem_chs"],
        stem=stem,
        residual=config["residual"],
        ese="last" if config["attn"] else "none",
        depthwise=config["depthwise"],
    )


def timm_pair(config: dict, stem: str) -> tuple[TimmVoVNet, VoVNet]:
    """Return a thin network of timm with random weights, and our network without these weights."""
    widths = {key: [c // 8 for c in value] for key, value in config.items() if key.endswith("chs")}
    config = {**config, **widths}
    peer = TimmVoVNet(config, num_classes=7, stem_stride=4 if stem == "strided" else 2)
    peer = peer.eval().double()
    randomise(peer)
    out_features = [*STAGES, "linear"]
    return peer, build(from_timm(config, stem), num_classes=7, out_features=out_features)


def timm_maps(peer: TimmVoVNet, x: torch.Tensor) -> dict[str, torch.Tensor]:
    stages = peer.forward_intermediates(x, indices=[1, 2, 3, 4], intermediates_only=True)
    return dict(zip([*STAGES, "linear"], [peer.stem(x), *stages, peer(x)], strict=True))


@each_stem
@pytest.mark.parametrize("name", TIMM_KINDS)
def test_feature_maps_equal_those_of_timm(name, stem):
    peer, model = timm_pair(TIMM_CONFIGS[name], stem)
    model.load_state_dict(peer.state_dict())
    for size in SIZES:
        x = images(2, 3, *size)
        assert_same_maps(model(x), timm_maps(peer, x))


@each_stem
def test_a_wrong_tensor_is_noticed_in_the_comparison_with_timm(stem):
    peer, model = timm_pair(TIMM_CONFIGS["ese_vovnet39b"], stem)
    state = peer.state_dict()
    pair = [f"stages.2.blocks.1.conv_mid.{i}.conv.weight" for i in (1, 2)]
    state[pair[0]], state[pair[1]] = state[pair[1]], state[pair[0]]
    model.load_state_dict(state)
    x = images(2, 3, 64, 64)
    with pytest.raises(AssertionError, match="stage4: relative difference"):
        assert_same_maps(model(x), timm_maps(peer, x))


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("ese_vovnet39b", 24.57),
        ("ese_vovnet57b", 38.61),
        ("ese_vovnet99b", 63.20),
        ("ese_vovnet19b_dw", 6.54),
        ("vovnet39a", 22.60),
        ("vovnet57a", 36.64),
    ],
)
def test_parameters_of_timm(name, millions):
    spec = from_timm(TIMM_CONFIGS[name], "strided")
    model = build_on_meta(spec, norm="BN", num_classes=1000, out_features=None)
    assert round(learnable(model) / 1e6, 2) == millions


@pytest.mark.parametrize("name", TIMM_CONFIGS)
def test_full_width_of_timm(name):
    """Compare names and shapes of all tensors at full width."""
    with shapes_alone():
        peer = TimmVoVNet(TIMM_CONFIGS[name])
    spec = from_timm(TIMM_CONFIGS[name], "strided")
    model = build_on_meta(spec, norm="BN", num_classes=1000, out_features=None)
    assert learnable(model) == learnable(peer)
    model.load_state_dict(peer.state_dict(), assign=True)


# Shapes


def convolved(size: int) -> int:
    """Return the size after a 3x3 convolution with stride 2 and padding 1."""
    return (size + 2 - 3) // 2 + 1


def pooled(size: int) -> int:
    """Return the size after a 3x3 pooling with stride 2 in ceil mode.

    No window begins outside the feature map."""
    windows = -(-(size - 3) // 2) + 1
    return windows - 1 if (windows - 1) * 2 >= size else windows


@pytest.mark.parametrize("size", [32, 33, 47, 63, 64, 97, 255])
@each_stem
def test_sizes_of_feature_maps(stem, size):
    expected = [convolved(convolved(size)) if stem == "strided" else convolved(size)]
    for stage in (2, 3, 4, 5):
        pools = stage > 2 or stem == "pooled"
        expected.append(pooled(expected[-1]) if pools else expected[-1])
    outputs = build(replace(V19, stem=stem))(images(1, 3, size, 40))
    assert [map_.shape[2] for map_ in outputs.values()] == expected


@each_stem
@each_variant
def test_declared_shapes(variant, stem):
    net = TABLE[variant]
    model = build_on_meta(replace(VOVNET_SPECS[variant], stem=stem))
    with torch.no_grad():
        outputs = model(torch.zeros(2, 3, 256, 128, device="meta"))
    strides = [4, 4, 8, 16, 32] if stem == "strided" else [2, 4, 8, 16, 32]
    channels = [net.stem_channels[-1], *net.stage_out_channels]
    declared = model.output_shape()
    assert list(declared) == list(outputs) == list(STAGES)
    for name, stride, width in zip(STAGES, strides, channels, strict=True):
        assert (declared[name].stride, declared[name].channels) == (stride, width)
        assert outputs[name].shape == (2, width, 256 // stride, 128 // stride)


@pytest.mark.parametrize("in_channels", [1, 3, 4, 6])
@pytest.mark.parametrize("structure", ["full", "depthwise", "bottleneck"])
def test_input_channels(structure, in_channels):
    net = thin(STRUCTURES[structure])
    state = random_state(net, in_channels=in_channels)
    model = build(net, in_channels=in_channels)
    model.load_state_dict(state)
    x = images(1, in_channels, 64, 64)
    assert_same_maps(model(x), features(net, state, x))


def test_every_subset_of_features():
    net = thin(STRUCTURES["eSE in all"])
    state = random_state(net)
    x = images(1, 3, 64, 64)
    expected = features(net, state, x)
    for out_features in (s for n in range(1, 6) for s in combinations(STAGES, n)):
        model = build(net, out_features=out_features)
        built = STAGES[: STAGES.index(out_features[-1]) + 1]
        assert {name.split(".")[0] for name in model.state_dict()} == set(built), out_features
        model.load_state_dict({k: v for k, v in state.items() if k.split(".")[0] in built})
        assert_same_maps(model(x), {name: expected[name] for name in out_features})
        assert tuple(model.output_shape()) == out_features


def test_the_logits_of_a_new_classifier_are_small():
    linear = build(V19, num_classes=1000, out_features=None).linear
    assert linear.weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert not linear.bias.any()


def test_default_feature_is_the_last():
    x = images(2, 3, 64, 64)
    assert list(build(V19, out_features=None)(x)) == ["stage5"]
    model = build(V19, num_classes=5, out_features=None)
    assert model(x)["linear"].shape == (2, 5)
    assert model.output_shape() == {}


def test_classifier_without_its_output_is_a_backbone():
    model = build(V19, num_classes=5, out_features=["stage3"])
    assert {name.split(".")[0] for name in model.state_dict()} == {"stem", "stage2", "stage3"}


# Norms and freezing


def norm_type(norm: str) -> type:
    return type(get_norm(norm, 32))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("structure", ["eSE in all", "depthwise", "bottleneck"])
def test_norms(structure, norm):
    model = build_on_meta(VoVNetSpec(**vars(thin(STRUCTURES[structure]))), norm=norm)
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            bare = name.endswith(".depthwise") or ".ese." in name
            found = type(getattr(module, "norm", None))
            assert found is (type(None) if bare else norm_type(norm)), name
            assert (module.bias is not None) == (".ese." in name or (not bare and not norm)), name


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("structure", ["eSE in all", "depthwise", "bottleneck"])
def test_a_step_with_each_norm(structure, norm):
    """Check that images influence each other if and only if norms use batch statistics."""
    model = build(thin(STRUCTURES[structure]), norm=norm).train()
    x = images(2, 3, 64, 64)
    together, alone = model(x)["stage5"], model(x[:1])["stage5"]
    assert together.isfinite().all()
    assert together.std() > 0
    batched = norm in ("BN", "SyncBN", "nnSyncBN", "naiveSyncBN", "naiveSyncBN_N")
    assert torch.allclose(together[:1], alone) != batched


def test_norm_by_callable():
    model = build(V19, norm=lambda channels: nn.InstanceNorm2d(channels, affine=True))
    norms = [
        m.norm for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and "ese" not in n
    ]
    assert norms
    assert all(isinstance(norm, nn.InstanceNorm2d) for norm in norms)


def test_networks_with_different_norms_side_by_side():
    x = images(2, 3, 64, 64)
    alone = {}
    for norm in ("BN", "GN", "FrozenBN"):
        torch.manual_seed(1)
        alone[norm] = build(V19, norm=norm)(x)
    models = {}
    for norm in alone:
        torch.manual_seed(1)
        models[norm] = build(V19, norm=norm)
    for norm, model in models.items():
        kinds = {type(m.norm) for n, m in model.named_modules() if hasattr(m, "norm")}
        assert kinds == {norm_type(norm)}
        assert all(torch.equal(model(x)[name], alone[norm][name]) for name in STAGES)


FREEZABLE = ("BN", "SyncBN", "naiveSyncBN", "GN", "FrozenBN", "")


@pytest.mark.parametrize(
    ("structure", "norm"), [*(("eSE in all", norm) for norm in FREEZABLE), ("depthwise", "BN")]
)
def test_freezing(structure, norm):
    spec = VoVNetSpec(**vars(thin(STRUCTURES[structure])))
    for freeze_at in range(-1, 6):
        with shapes_alone():
            model = VoVNet(
                spec,
                norm=norm,
                num_classes=5,
                out_features=[*STAGES, "linear"],
                freeze_at=freeze_at,
            )
        frozen = STAGES[: max(freeze_at, 0)]
        for name, parameter in model.named_parameters():
            assert parameter.requires_grad == (name.split(".")[0] not in frozen), name
        for name, module in model.named_modules():
            if name.endswith(".norm"):
                is_frozen = norm not in ("GN", "") and name.split(".")[0] in frozen
                assert type(module) is (FrozenBatchNorm2d if is_frozen else norm_type(norm)), name


@pytest.mark.parametrize("freeze_at", [0, 1, 3, 5])
def test_freezing_changes_no_feature_map_and_stops_only_its_stages(freeze_at):
    model = build(V19, norm="BN")
    randomise(model)
    x = images(2, 3, 64, 64)
    before = model(x)
    assert model.freeze(freeze_at) is model
    assert_same_maps(model(x), before)
    state = copy.deepcopy(model.state_dict())
    loss = sum(map_.square().mean() for map_ in model.train()(x).values())
    if freeze_at < 5:
        loss.backward()
    assert loss.requires_grad == (freeze_at < 5)
    frozen = STAGES[:freeze_at]
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (name.split(".")[0] in frozen), name
    for name, tensor in model.state_dict().items():
        if name.endswith("running_mean"):
            assert torch.equal(tensor, state[name]) == (name.split(".")[0] in frozen), name


@pytest.mark.parametrize("checkpoint_blocks", [False, True])
@pytest.mark.parametrize("freeze_at", [0, 2])
def test_norm_eval_and_frozen_stages_equal_a_loop_by_hand(freeze_at, checkpoint_blocks):
    """Compare three training steps with a network whose norms and stages a loop freezes."""
    arguments = {"norm": "BN", "out_features": ["stage3", "stage5"]}
    options = {"norm_eval": True, "freeze_at": freeze_at, "checkpoint_blocks": checkpoint_blocks}
    model, peer = build(V19, **arguments, **options), build(V19, **arguments)
    randomise(peer)
    model.load_state_dict(peer.state_dict())
    start = copy.deepcopy(peer.state_dict())
    model.train()
    peer.train()
    for name, module in peer.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
        if name.split(".")[0] in STAGES[:freeze_at]:
            module.requires_grad_(False)
    for net in (model, peer):
        trained = [p for p in net.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(trained, lr=0.01, momentum=0.9)
        torch.manual_seed(0)
        for _ in range(3):
            optimizer.zero_grad()
            sum(map_.square().mean() for map_ in net(images(2, 3, 64, 64)).values()).backward()
            optimizer.step()
    end = model.state_dict()
    for name, tensor in peer.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            assert torch.allclose(end[name], tensor, rtol=1e-9, atol=1e-12), name
    still = {n for n, t in start.items() if n in end and torch.equal(end[n], t)}
    assert {n for n in end if "running_" in n} <= still
    affine = {n for n in end if n.endswith("norm.weight") and n not in still}
    assert {n.split(".")[0] for n in affine} == {*STAGES[freeze_at:]}


def test_norm_eval_survives_a_change_of_mode():
    model = VoVNet(V19, norm="BN", norm_eval=True)
    for _ in range(2):
        norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
        assert model.training
        assert not any(norm.training for norm in norms)
        model.eval().train()
    plain = VoVNet(V19, norm="BN")
    assert all(m.training for m in plain.modules())


def test_freezing_of_a_net_with_fewer_stages():
    model = build(V19, out_features=["stage3"], freeze_at=5)
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("structure", "norm"),
    [*((structure, "BN") for structure in STRUCTURES), ("eSE in all", "GN"), ("eSE in all", "")],
)
def test_every_parameter_gets_a_gradient(structure, norm):
    model = build(thin(STRUCTURES[structure]), norm=norm).train()
    model(images(2, 3, 64, 64))["stage5"].square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


# Deformable convolution


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("modulated", [False, True])
@pytest.mark.parametrize("stages", [(1, 0, 0, 0), (0, 0, 1, 1), (1, 1, 1, 1)], ids=str)
def test_stages_with_deformable_convolutions(stages, modulated, groups):
    model = build(
        V19,
        norm="BN",
        stage_with_dcn=stages,
        with_modulated_dcn=modulated,
        deformable_groups=groups,
    )
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and not name.endswith(".offset"):
            stage = name.split(".")[0]
            deformable = ".layers." in name and stages[STAGES.index(stage) - 1]
            assert isinstance(module, DeformableConv2d) == deformable, name
            if deformable:
                assert module.offset.out_channels == (27 if modulated else 18) * groups
    model.train()(images(2, 3, 64, 64))["stage5"].square().mean().backward()
    assert all(parameter.grad.any() for parameter in model.parameters())


@pytest.mark.parametrize("structure", ["eSE in all", "pooled stem"])
def test_a_new_deformable_network_equals_the_plain_one(structure):
    net = thin(STRUCTURES[structure])
    state = random_state(net)
    model = build(net, stage_with_dcn=(0, 1, 1, 1))
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert missing
    assert all(".offset." in name for name in missing)
    assert unexpected == []
    x = images(1, 3, 70, 64)
    assert_same_maps(model(x), features(net, state, x))


# Errors


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"spec": "V-39-ese"}, "Unknown VoVNet variant 'V-39-ese'. Close to it: 'V-39-eSE'"),
        ({"norm": "FrozenBatchNorm"}, "Unknown norm 'FrozenBatchNorm': choose from '', 'BN',"),
        ({"out_features": ["res5"]}, "no feature 'res5': choose from stem, stage2, stage3, stage4"),
        ({"out_features": ["linear"]}, "stage5. Set num_classes to have 'linear'."),
        ({"out_features": []}, "out_features is []: give a list of stem, stage2"),
        ({"out_features": "stage5"}, "out_features is 'stage5': give a list of stem, stage2"),
        ({"freeze_at": 6}, "freeze_at is 6: choose 0 (nothing), 1 (stem), 2 (stem and stage2)"),
        ({"in_channels": 0}, "in_channels is 0: an input has at least one channel"),
        ({"num_classes": 0}, "num_classes is 0: give at least 1, or None"),
        ({"stage5_dilation": 4}, "stage5_dilation is 4: choose 1 or 2"),
        ({"stage_with_dcn": (True,)}, "stage_with_dcn is [True]: give four booleans, for stages"),
        (
            {"stage_with_dcn": (True,) * 4, "deformable_groups": 3},
            "deformable_groups is 3: it must divide the layer's 16 input channels",
        ),
        (
            {"spec": "V-19-dw-eSE", "stage_with_dcn": (False, False, False, True)},
            "depthwise and bottleneck variants have no deformable convolutions",
        ),
        (
            {"spec": replace(V19, bottleneck=True), "stage_with_dcn": (True,) * 4},
            "depthwise and bottleneck variants have no deformable convolutions",
        ),
    ],
)
def test_wrong_arguments(args, message):
    args = {"spec": V19, **args}
    with pytest.raises(ValueError, match=re.escape(message)):
        VoVNet(args.pop("spec"), **args)


def test_wrong_input():
    message = r"takes an input of shape \(N, C, H, W\), got \(3, 64, 64\)"
    with pytest.raises(ValueError, match=message):
        VoVNet(V19)(torch.zeros(3, 64, 64))


@pytest.mark.parametrize("optimize", [None, torch.float32, torch.bfloat16], ids=str)
def test_integers_are_refused(optimize):
    model = VoVNet(V19).eval()
    if optimize is not None:
        model = optimize_for_inference(model, dtype=optimize)
    x = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
    with pytest.raises(
        ValueError, match=r"got torch.uint8: convert it, for example by x.float\(\)"
    ):
        model(x)


@pytest.mark.parametrize("training", [False, True])
def test_an_input_of_another_precision(training):
    """Check that torch raises an error, as with a plain network."""
    model = VoVNet(V19).train(training)
    for dtype in (torch.float16, torch.float64):
        with pytest.raises(RuntimeError, match=r"(?i)(half|double).*float"):
            model(torch.randn(1, 3, 64, 64, dtype=dtype))


def test_a_state_dict_loads_on_the_meta_device():
    state = {k: t for k, t in build(V19, norm="BN").state_dict().items() if "num_batches" not in k}
    model = build_on_meta(V19, norm="BN")
    model.load_state_dict(state, assign=True)
    assert not any(tensor.is_meta for tensor in model.state_dict().values())
    assert model.double()(images(1, 3, 64, 64))["stage5"].isfinite().all()


@pytest.mark.parametrize("strict", [False, True])
def test_a_tensor_under_two_names(strict):
    net = thin(STRUCTURES["eSE in all"])
    published, model = random_state(net), build(net)
    model.load_state_dict(published)
    both = {**model.state_dict(), "stem.stem_1/conv.weight": published["stem.stem_1/conv.weight"]}
    before = copy.deepcopy(model.state_dict())
    message = r"has stem.conv1.weight twice, also as stem.stem_1/conv.weight: remove one"
    with pytest.raises(RuntimeError, match=message):
        model.load_state_dict(both, strict=strict)
    assert torch.equal(model.state_dict()["stem.conv1.weight"], before["stem.conv1.weight"])


# Copies, inputs of other kinds, graphs


def test_copies(tmp_path):
    model = build(V19, norm="BN", freeze_at=2)
    randomise(model)
    x = images(1, 3, 64, 64)
    expected = model(x)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.stem.conv1.weight.zero_()
    assert_same_maps(model(x), expected)  # the copy shares no tensor

    torch.save(model.state_dict(), tmp_path / "state.pth")
    loaded = build(V19, norm="BN", freeze_at=2)
    loaded.load_state_dict(torch.load(tmp_path / "state.pth", weights_only=True))
    assert all(
        torch.equal(a, b) for a, b in zip(loaded(x).values(), expected.values(), strict=True)
    )

    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    whole = torch.load(file, weights_only=False)
    assert whole.spec == V19
    assert all(torch.equal(a, b) for a, b in zip(whole(x).values(), expected.values(), strict=True))


@each_structure
def test_channels_last(structure):
    net = thin(STRUCTURES[structure])
    model = build(net)
    model.load_state_dict(random_state(net))
    x = images(2, 3, 65, 96)
    expected = model(x)
    model, x = (item.to(memory_format=torch.channels_last) for item in (model, x))
    actual = model(x)
    assert_same_maps(actual, expected)
    assert all(m.is_contiguous(memory_format=torch.channels_last) for m in actual.values())


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("norm", ["FrozenBN", "BN", "GN"])
@pytest.mark.parametrize("structure", ["eSE in all", "pooled stem", "depthwise", "bottleneck"])
def test_empty_batch(structure, norm, training):
    model = build(thin(STRUCTURES[structure]), norm=norm, num_classes=5, out_features=None)
    assert model.train(training)(images(0, 3, 64, 64))["linear"].shape == (0, 5)


def test_empty_batch_with_deformable_convolutions():
    model = build(V19, stage_with_dcn=(1, 1, 1, 1), with_modulated_dcn=True)
    assert model(images(0, 3, 64, 64))["stage5"].shape == (0, 64, 2, 2)


def pooling_in(program: torch.export.ExportedProgram) -> list[bool]:
    """Return True or False for each max-pooling of the graph: True for ceil mode."""
    modes = []
    for node in program.graph.nodes:
        if node.op == "call_function" and "max_pool2d" in str(node.target):
            schema = [argument.name for argument in node.target._schema.arguments]
            arguments = dict(zip(schema, node.args, strict=False)) | node.kwargs
            modes.append(bool(arguments.get("ceil_mode", False)))
    return modes


class CeilModePooling(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.max_pool2d(x, 3, 2, ceil_mode=True)


def test_ceil_mode_is_noticed():
    assert pooling_in(torch.export.export(CeilModePooling(), (torch.zeros(1, 1, 9, 9),))) == [True]


each_graph = pytest.mark.parametrize(
    "structure",
    [
        "depthwise, pooled stem",
        pytest.param("eSE in all", marks=pytest.mark.slow),
        pytest.param("bottleneck, pooled stem", marks=pytest.mark.slow),
    ],
)


@each_graph
def test_exported_graph(structure):
    net = short(thin(STRUCTURES[structure]))
    model = build(net)
    model.load_state_dict(random_state(net))
    x = images(1, 3, 65, 96)
    program = torch.export.export(model, (x,))
    pools = 4 if net.stem == "pooled" else 3
    assert pooling_in(program) == [False] * pools
    assert pooling_in(program.run_decompositions()) == [False] * pools
    assert_same_maps(program.module()(x), model(x))


@each_graph
def test_traced_graphs(structure):
    net = short(thin(STRUCTURES[structure]))
    model = build(net)
    model.load_state_dict(random_state(net))
    x = images(1, 3, 65, 96)
    with torch.no_grad():
        expected = model(x)
        assert_same_maps(make_fx(model)(x)(x), expected, tolerance=0)
        # Graphs multiply and add in two separate operators.
        assert_same_maps(torch.jit.trace(model, x, strict=False)(x), expected, tolerance=1e-14)


# Initialisation


@each_kind
def test_initial_feature_maps_do_not_vanish_or_explode(variant):
    """Compare the standard deviation of feature maps with theory.

    A norm gives mean 0 and variance 1, and ReLU a standard deviation of
    sqrt(1/2 - 1/(2 pi)) = 0.58. eSE halves it, because its sigmoid is near 1/2 at first. The
    residuals of the B blocks of a stage add independent values, which gives a factor of sqrt(B)."""
    spec = VOVNET_SPECS[variant]
    model = VoVNet(spec, norm="BN", out_features=STAGES).train()
    with torch.no_grad():
        outputs = model(torch.randn(4, 3, 64, 64))
    assert outputs["stem"].std() == pytest.approx(0.58, rel=0.15)
    for name, blocks in zip(STAGES[1:], spec.blocks_per_stage, strict=True):
        expected = 0.58 * blocks**0.5 * (1 if spec.ese == "none" else 0.5)
        assert expected / 1.5 < outputs[name].std() < expected * 1.5, name
