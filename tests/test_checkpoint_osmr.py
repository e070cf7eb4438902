# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""The VoVNets of pytorchcv, whose weights osmr/imgclsmob publishes, are compared with ours."""

import zipfile
from dataclasses import replace

import pytest
import torch
from devices import shapes_alone
from pytorchcv.models.vovnet import VoVNet as Peer
from pytorchcv.models.vovnet import vovnet27s, vovnet39, vovnet57
from reference import TABLE, assert_same_maps, thin
from state_dicts import random_state
from torch import nn

from vovnet_d2 import VOVNET_SPECS, VoVNet, VoVNetCheckpointer, VoVNetSpec, convert_state_dict
from vovnet_d2.checkpoint import describe_state_dict
from vovnet_d2.checkpoint.conversion import osmr_caveats
from vovnet_d2.checkpoint.metadata import RGB_IMAGENET, Metadata
from vovnet_d2.checkpoint.zoo import metadata_of_layout

PEERS = {"V-27-slim": vovnet27s, "V-39": vovnet39, "V-57": vovnet57}
STAGES = ["stem", "stage2", "stage3", "stage4", "stage5", "linear"]


def randomise(peer: nn.Module) -> nn.Module:
    for module in peer.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
            module.running_mean.normal_(std=0.2)
            module.running_var.uniform_(0.5, 1.5)
    return peer.eval()


def thin_peer(variant: str = "V-39") -> nn.Module:
    spec = thin(VOVNET_SPECS[variant])
    widths = [
        [[c] * n for c, n in zip(row, spec.blocks_per_stage, strict=True)]
        for row in (spec.stage_out_channels, spec.stage_mid_channels)
    ]
    return randomise(Peer(*widths, spec.layers_per_block, num_classes=7))


def peer_maps(peer: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    maps = []
    y = x
    for module in list(peer.features)[:5]:
        maps.append(y := module(y))
    # The last pooling of the peer only takes feature maps of 7x7, as for an image of 224x224.
    return dict(zip(STAGES, [*maps, peer.output(y.mean((2, 3)))], strict=True))


def ours(peer: nn.Module) -> VoVNet:
    """Build our network from the names and shapes of the tensors of the peer."""
    found = describe_state_dict(peer.state_dict())
    known = metadata_of_layout(found, peer.state_dict())
    spec = VoVNetSpec(**found.fields, stem=known.stem, residual=known.residual)
    return VoVNet(spec, norm="BN", num_classes=found.num_classes, out_features=STAGES).eval()


@torch.no_grad()
@pytest.mark.parametrize("variant", PEERS)
def test_features_equal_those_of_pytorchcv(variant):
    """Convert weights to our network in float32, and back to the peer in float64."""
    peer = thin_peer(variant)
    state = peer.state_dict()
    model = ours(peer)
    stem = VOVNET_SPECS[variant].stem_channels  # the peer has only one width of the stem
    assert model.spec == replace(thin(VOVNET_SPECS[variant]), stem_channels=stem)
    model.load_state_dict(state)
    x = torch.randn(1, 3, 64, 64)
    assert_same_maps(model(x), peer_maps(peer, x), tolerance=1e-6)
    converted = convert_state_dict(model.state_dict(), "osmr")
    assert list(converted) == list(state)
    nn.init.zeros_(peer.features.init_block.conv1.conv.weight)
    peer.load_state_dict(converted)
    x = x.double()
    assert_same_maps(peer_maps(peer.double(), x), model.double()(x), tolerance=1e-12)


@torch.no_grad()
def test_logits_equal_those_of_pytorchcv():
    peer = thin_peer()
    model = ours(peer)
    model.load_state_dict(peer.state_dict())
    x = torch.randn(2, 3, 224, 224)
    assert_same_maps({"": model(x)["linear"]}, {"": peer(x)}, tolerance=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("what", ["tensors swapped", "no residual", "pooled stem"])
def test_another_network_is_noticed(what):
    """Check that the comparison fails for another network."""
    peer = thin_peer()
    model = ours(peer)
    state = peer.state_dict()
    if what == "tensors swapped":
        first, second = (f"features.stage4.unit1.branches.branch{i}.conv.weight" for i in (2, 3))
        state[first], state[second] = state[second], state[first]
    else:
        change = {"residual": False} if what == "no residual" else {"stem": "pooled"}
        spec = VoVNetSpec(**{**vars(model.spec), **change})
        model = VoVNet(spec, norm="BN", num_classes=7, out_features=STAGES).eval()
    model.load_state_dict(state)
    x = torch.randn(1, 3, 64, 64)
    with pytest.raises(AssertionError, match=r"relative difference|^stem$"):
        assert_same_maps(model(x), peer_maps(peer, x), tolerance=1e-6)


@pytest.mark.parametrize("zipped", [False, True])
def test_files_of_pytorchcv_load(tmp_path, zipped, caplog):
    peer = thin_peer()
    path = tmp_path / "vovnet.pth"
    torch.save(peer.state_dict(), path)
    if zipped:
        with zipfile.ZipFile(f"{path}.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.write(path, path.name)
        path.unlink()
        path = tmp_path / "vovnet.pth.zip"
    model = VoVNet(ours(peer).spec, norm="FrozenBN")
    checkpointer = VoVNetCheckpointer(model)
    with caplog.at_level("INFO"):
        checkpointer.load(str(path))
    weight = peer.state_dict()["features.stage2.unit1.concat_conv.conv.weight"]
    assert torch.equal(model.stage3[0].aggregation.weight, weight)
    assert checkpointer.input_convention == RGB_IMAGENET
    assert "osmr names" in caplog.text


@pytest.mark.parametrize("prefix", ["", "module.", "backbone.bottom_up.", "img_backbone."])
@pytest.mark.parametrize("variant", PEERS)
def test_recognition(variant, prefix):
    with shapes_alone():
        state = {prefix + name: t for name, t in PEERS[variant]().state_dict().items()}
    state["fpn_lateral2.weight"] = torch.empty(3, device="meta")
    found = describe_state_dict(state)
    assert (found.layout, found.variant, found.prefix) == ("osmr", variant, prefix)
    assert found.differences(VOVNET_SPECS[variant]) == {}
    assert (found.num_classes, found.in_channels, found.norm) == (1000, 3, "BN")


def test_other_networks_of_pytorchcv_are_refused():
    names = ["features.init_block.conv.conv.weight", "features.stage1.unit1.body.conv1.conv.weight"]
    with pytest.raises(ValueError, match=r"No VoVNet is in it\."):
        describe_state_dict({name: torch.ones(3) for name in names})


@pytest.mark.parametrize(
    ("variant", "tensor"),
    [("V-39-eSE", r"stage2\.0\.ese\.fc"), ("V-19-dw-eSE", r"stem\.conv2\.depthwise")],
)
def test_tensors_without_a_name_in_pytorchcv_are_refused(variant, tensor):
    state = random_state(thin(TABLE[variant]))
    with pytest.raises(ValueError, match=rf"osmr layout has no name for .*{tensor}.*neither eSE"):
        convert_state_dict(state, "osmr")


@pytest.mark.parametrize(
    ("changes", "caveat"),
    [({}, None), ({"residual": False}, "have residual"), ({"stem": "pooled"}, "the strided stem")],
)
def test_differences_from_pytorchcv_are_noted(changes, caveat):
    spec = VoVNetSpec(**{**vars(thin(VOVNET_SPECS["V-39"])), **changes})
    found = describe_state_dict(VoVNet(spec).state_dict())
    said = osmr_caveats(found, Metadata.of_spec(spec, None))
    assert [caveat in sentence for sentence in said] == [True] * (caveat is not None)
