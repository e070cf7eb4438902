# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""The VoVNets of timm, loaded from files of timm, are compared with ours."""

import pytest
import timm
import torch
from reference import assert_same_maps
from safetensors.torch import save_model
from timm.models import load_checkpoint
from torch import nn

from vovnet_d2 import VoVNet, VoVNetCheckpointer, VoVNetSpec, convert_state_dict
from vovnet_d2.checkpoint import describe_state_dict
from vovnet_d2.checkpoint.conversion import timm_caveats
from vovnet_d2.checkpoint.metadata import Metadata
from vovnet_d2.checkpoint.zoo import metadata_of_layout

# VoVNets of timm that a spec cannot describe, with the reason. All others must pass the tests.
INEXPRESSIBLE = {
    "eca_vovnet39b": "ECA, a convolution over the channels, in the place of eSE",
    "ese_vovnet39b_evos": "EvoNorm in the place of norm and ReLU",
}
EXPRESSIBLE = [name for name in timm.list_models("*vovnet*") if name not in INEXPRESSIBLE]
# One network of each structure. The number of blocks does not matter for the tests that use KINDS.
KINDS = list(
    {
        (config["depthwise"], config["attn"], config["residual"]): name
        for name, config in reversed(timm.models.vovnet.model_cfgs.items())
        if name in EXPRESSIBLE
    }.values()
)
STAGES = ["stem", "stage2", "stage3", "stage4", "stage5", "linear"]


def thin_widths(name: str) -> dict[str, list[int]]:
    config = timm.models.vovnet.model_cfgs[name]
    return {key: [c // 8 for c in config[key]] for key in config if key.endswith("chs")}


def timm_model(name: str, **options) -> nn.Module:
    """Return a network of timm with random weights and random statistics of norms."""
    model = timm.create_model(name, num_classes=7, **options).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
            module.running_mean.normal_(std=0.2)
            module.running_var.uniform_(0.5, 1.5)
    return model


def timm_maps(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    stages = model.forward_intermediates(x, indices=[1, 2, 3, 4], intermediates_only=True)
    return dict(zip(STAGES, [model.stem(x), *stages, model(x)], strict=True))


def recognised(state: dict[str, torch.Tensor], **options) -> VoVNet:
    """Build the network that is recognised from the tensors of a file alone."""
    found = describe_state_dict(state)
    known = metadata_of_layout(found, state)
    spec = VoVNetSpec(**found.fields, **{"stem": known.stem, "residual": known.residual, **options})
    return VoVNet(
        spec,
        in_channels=found.in_channels,
        norm="BN",
        num_classes=found.num_classes,
        out_features=STAGES if found.num_classes else STAGES[:-1],
    ).eval()


def test_timm_has_the_networks_that_a_spec_cannot_describe():
    """Fail if timm no longer has one of these networks. The tests below fail for a new one."""
    assert set(timm.list_models("*vovnet*")) > INEXPRESSIBLE.keys()


@pytest.mark.parametrize("name", INEXPRESSIBLE)
def test_networks_that_a_spec_cannot_describe_are_refused(name):
    state = timm_model(name, **thin_widths(name)).state_dict()
    with pytest.raises(
        ValueError, match=r"are nothing that VoVNetSpec describes, such as st(em|age)"
    ):
        describe_state_dict(state)


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "suffix", "in_chans"),
    [*((name, ".safetensors", 3) for name in EXPRESSIBLE), (EXPRESSIBLE[0], ".bin", 5)],
)
def test_features_equal_those_of_timm(tmp_path, name, suffix, in_chans):
    peer = timm_model(name, in_chans=in_chans, **thin_widths(name))
    path = tmp_path / f"{name}{suffix}"
    if suffix == ".safetensors":
        save_model(peer, str(path))
    else:
        torch.save(peer.state_dict(), path)
    model = recognised(peer.state_dict())
    VoVNetCheckpointer(model).load(str(path))
    x = torch.randn(1, in_chans, 64, 64).double()
    assert_same_maps(model.double()(x), timm_maps(peer.double(), x), tolerance=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ese_vovnet19b_dw", "vovnet39a"])
def test_names_of_features_only(tmp_path, name):
    """Recognise the names of timm's ``features_only``, such as stem_0 and stages_0."""
    peer = timm_model(name, **thin_widths(name), features_only=True)
    torch.save(peer.state_dict(), tmp_path / "features.pth")
    model = recognised(peer.state_dict())
    VoVNetCheckpointer(model).load(str(tmp_path / "features.pth"))
    x = torch.rand(1, 3, 65, 96)
    maps, expected = model(x), dict(zip(STAGES[1:5], peer(x)[1:], strict=True))
    assert_same_maps({s: maps[s] for s in STAGES[1:5]}, expected, 1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", KINDS)
def test_a_swapped_tensor_is_noticed(name):
    """Check that the comparison fails if two tensors are exchanged."""
    peer = timm_model(name, **thin_widths(name))
    state = peer.state_dict()
    model = recognised(state)
    kernel = "conv_pw" if "dw" in name else "conv"
    first, second = (f"stages.3.blocks.0.conv_mid.{layer}.{kernel}.weight" for layer in (1, 2))
    state[first], state[second] = state[second], state[first]
    model.load_state_dict(state)
    x = torch.randn(1, 3, 64, 64)
    with pytest.raises(AssertionError, match="stage5: relative difference"):
        assert_same_maps(model(x), timm_maps(peer, x), tolerance=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", KINDS)
def test_timm_loads_converted_weights(tmp_path, name):
    """Convert weights to timm's names, and let timm load the file strictly."""
    source = timm_model(name, **thin_widths(name))
    model = recognised(source.state_dict())
    model.load_state_dict(source.state_dict())
    torch.save({"model": convert_state_dict(model.state_dict(), "timm")}, tmp_path / "a.pth")
    peer = timm_model(name, **thin_widths(name))
    load_checkpoint(peer, str(tmp_path / "a.pth"), strict=True)
    x = torch.randn(1, 3, 64, 64)
    assert_same_maps(timm_maps(peer, x), model(x), tolerance=1e-5)


def test_the_layout_gives_the_residual_of_timms_v1_networks():
    for name, residual in (("vovnet39a", False), ("ese_vovnet39b", True)):
        state = timm_model(name, **thin_widths(name)).state_dict()
        assert metadata_of_layout(describe_state_dict(state), state).residual is residual


@torch.no_grad()
@pytest.mark.parametrize(
    ("changes", "options", "caveat"),
    [
        ({"ese": "all"}, {}, "last block of a stage"),
        ({"ese": "none"}, {}, "no residual connections"),
        ({"ese": "last", "stem": "pooled"}, {}, "stem_stride=2"),
        ({"ese": "last"}, {}, None),
        ({"ese": "none", "residual": False}, {}, None),
    ],
    ids=str,
)
def test_differences_from_timm_are_noted(changes, options, caveat):
    widths = thin_widths("ese_vovnet39b")
    fields = {
        "stage_mid_channels": widths["stage_conv_chs"],
        "stage_out_channels": widths["stage_out_chs"],
        "stem_channels": widths["stem_chs"],
        "blocks_per_stage": (1, 1, 2, 2),
        "layers_per_block": 5,
    }
    spec = VoVNetSpec(**{**fields, **changes})
    model = VoVNet(spec, norm="BN", num_classes=7, out_features=STAGES).eval()
    found = describe_state_dict(model.state_dict())
    said = timm_caveats(found, Metadata.of_spec(spec, None))
    assert [caveat in sentence for sentence in said] == [True] * (caveat is not None)
    # The features differ if and only if a note says so.
    peer = timm_model("ese_vovnet39b" if spec.ese != "none" else "vovnet39a", **widths)
    state = convert_state_dict(model.state_dict(), "timm")
    takes = not peer.load_state_dict(state, strict=False).unexpected_keys
    x = torch.randn(1, 3, 64, 64)
    same = takes and all(
        a.shape == b.shape and torch.allclose(a, b, atol=1e-4)
        for a, b in zip(timm_maps(peer, x).values(), model(x).values(), strict=True)
    )
    assert same == (caveat is None)
