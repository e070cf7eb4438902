# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Names of parameters: our names are pinned, and weights with published names load."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import FPN
from devices import shapes_alone
from reference import (
    STRUCTURES,
    TABLE,
    assert_same_maps,
    features,
    native_names,
    random_state,
    tensors,
    thin,
)
from timm.models.vovnet import VovNet as TimmVoVNet
from timm.models.vovnet import model_cfgs as timm_configs
from torch import nn

from vovnet_d2 import VOVNET_SPECS, VoVNet, VoVNetSpec
from vovnet_d2.layouts import match_keys, rename_keys

STAGES = ("stem", "stage2", "stage3", "stage4", "stage5")
PUBLISHED = {name: thin(net) for name, net in STRUCTURES.items() if not net.bottleneck}
# Kinds of networks, with the norms that result from FREEZE_AT and NORM.
NORMS = {
    "BN": {"norm": "BN"},
    "SyncBN": {"norm": "SyncBN"},
    "FrozenBN": {"norm": "FrozenBN"},
    "BN, partly frozen": {"norm": "BN", "freeze_at": 2},
}

each_norm = pytest.mark.parametrize("norm", NORMS)


def build(net, **args) -> VoVNet:
    spec = VoVNetSpec(**vars(net))
    return VoVNet(spec, **{"out_features": STAGES, **args}).eval().double()


# Our names

PINNED = Path(__file__).with_name("data") / "parameter_names.json"


def parameter_names() -> dict:
    """Return the parameter names.

    For one network of each kind these are the modules of its stem, stage2 and classifier with their
    tensors. For each variant it is a digest of all names and shapes.
    """
    small = replace(
        VOVNET_SPECS["V-19-slim-eSE"], blocks_per_stage=(2, 1, 1, 1), layers_per_block=2
    )
    depthwise = replace(small, depthwise=True, stem_channels=(64, 64, 128))
    kinds = {
        "full, eSE": VoVNet(small, norm="BN", num_classes=10),
        "without a norm": VoVNet(small, norm="", num_classes=10),
        "depthwise": VoVNet(depthwise, norm="BN", num_classes=10),
        "bottleneck": VoVNet(replace(small, bottleneck=True), norm="BN", num_classes=10),
        "deformable": VoVNet(small, norm="BN", num_classes=10, stage_with_dcn=(True,) * 4),
    }
    modules: dict[str, dict[str, str]] = {}
    for kind, model in kinds.items():
        listing = modules[kind] = {}
        for name in model.state_dict():
            module, tensor = name.rsplit(".", 1)
            if module.split(".")[0] in ("stem", "stage2", "linear"):
                listing[module] = f"{listing.get(module, '')} {tensor}".strip()
    digests = {}
    for variant in VOVNET_SPECS:
        with shapes_alone():
            state = VoVNet(variant, norm="BN", num_classes=1000).state_dict()
        text = "\n".join(f"{name} {tuple(tensor.shape)}" for name, tensor in state.items())
        digests[variant] = hashlib.sha256(text.encode()).hexdigest()[:16]
    return {"modules": modules, "digests": digests}


def test_our_names_are_pinned():
    assert parameter_names() == json.loads(PINNED.read_text()), (
        "Parameters were renamed, reordered or reshaped. Checkpoints of users no longer load. If "
        "this is intended, translate the old names in vovnet_d2/layouts.py, add a line to "
        f"CHANGELOG.md, and record the new names with `python tests/{Path(__file__).name}`."
    )


@pytest.mark.parametrize(
    ("name", "counted"), [*((n, True) for n in TABLE), *((n, False) for n in STRUCTURES)]
)
def test_our_names_equal_a_second_derivation(name, counted):
    net = {**TABLE, **STRUCTURES}[name]
    expected = {n: s for _, n, s in tensors(net, num_classes=1000, counted=counted)}
    norm = "BN" if counted else "FrozenBN"
    with shapes_alone():
        model = build(net, norm=norm, num_classes=1000, out_features=None)
    assert {n: tuple(t.shape) for n, t in model.state_dict().items()} == expected


# Conversions between names


@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize("name", [*TABLE, *PUBLISHED])
def test_published_names(name, counted):
    net = {**TABLE, **PUBLISHED}[name]
    expected = native_names(net, num_classes=1000, counted=counted)
    assert rename_keys(expected) == expected  # each published name changes
    assert rename_keys(expected.values()) == {}
    assert rename_keys(expected, to="detectron2") == {}
    backwards = {native: published for published, native in expected.items()}
    assert rename_keys(backwards, to="detectron2") == backwards
    assert {match.layout for match in match_keys(expected).values()} == {"detectron2"}
    assert {match.layout for match in match_keys(backwards).values()} == {"native"}


TIMM_NETS = {
    "vovnet39a": replace(TABLE["V-39"], residual=False),
    "vovnet57a": replace(TABLE["V-57"], residual=False),
    "ese_vovnet19b_slim_dw": replace(TABLE["V-19-slim-dw-eSE"], ese="last"),
    "ese_vovnet19b_dw": replace(TABLE["V-19-dw-eSE"], ese="last"),
    "ese_vovnet19b_slim": replace(TABLE["V-19-slim-eSE"], ese="last"),
    "ese_vovnet19b": replace(TABLE["V-19-eSE"], ese="last"),
    "ese_vovnet39b": replace(TABLE["V-39-eSE"], ese="last"),
    "ese_vovnet57b": replace(TABLE["V-57-eSE"], ese="last"),
    "ese_vovnet99b": replace(TABLE["V-99-eSE"], ese="last"),
}


@pytest.mark.parametrize("name", TIMM_NETS)
def test_timm_names(name):
    with shapes_alone():
        theirs = [*TimmVoVNet(timm_configs[name]).state_dict()]
    published = native_names(TIMM_NETS[name], num_classes=1000, counted=True)
    ours = published.values()
    assert sorted(rename_keys(theirs).values()) == sorted(ours)
    assert sorted(rename_keys(theirs, to="detectron2").values()) == sorted(published)
    assert sorted(rename_keys(ours, to="timm").values()) == sorted(theirs)
    assert sorted(rename_keys(published, to="timm").values()) == sorted(theirs)
    to_ours, to_theirs = rename_keys(theirs), rename_keys(ours, to="timm")
    assert {new: old for old, new in to_ours.items()} == to_theirs
    assert {match.layout for match in match_keys(theirs).values()} == {"timm"}


@pytest.mark.parametrize(
    "key",
    [
        "fpn_lateral2.weight",
        "roi_heads.box_predictor.cls_score.weight",
        "stem.stem_1/conv.gamma",
        "stage2.OSA2_1.layers.0.OSA2_1_1/conv.weight",  # the two numbers of the layer differ
        "stage2.OSA3_1.concat.OSA3_1_concat/conv.weight",
        "xstem.conv1.weight",
        "res2.0.conv1.weight",
    ],
)
def test_other_names_do_not_change(key):
    assert rename_keys([key]) == {}
    assert match_keys([key]) == {}


# Loading


def compare(backbone: VoVNet, net, state: dict[str, torch.Tensor]) -> None:
    """Compare its feature maps with those from our names, and with the second implementation."""
    native = build(net)
    names = native_names(net, counted=True)
    native.load_state_dict({names[k]: v for k, v in state.items() if "num_batches" not in k})
    x = torch.randn(1, 3, 65, 64, dtype=torch.float64)
    actual = backbone.eval()(x)
    assert_same_maps(actual, native(x))
    assert_same_maps(actual, features(net, state, x))


@pytest.mark.parametrize(
    ("name", "norm", "counted"),
    [
        *((name, "FrozenBN", True) for name in PUBLISHED),
        *(("depthwise", norm, counted) for norm in NORMS for counted in (False, True)),
    ],
)
def test_published_weights_load(name, norm, counted):
    net = PUBLISHED[name]
    state = random_state(net, counted=counted)
    before = dict(state)
    model = build(net, **NORMS[norm])
    model.load_state_dict(state)
    compare(model, net, state)
    assert state.keys() == before.keys()  # the given dict does not change


@pytest.mark.parametrize("variant", ["V-27-slim", "V-39"])
def test_published_classifiers_load(variant):
    net = thin(TABLE[variant])
    state = random_state(net, num_classes=7, counted=True)
    model = build(net, norm="BN", num_classes=7, out_features=[*STAGES, "linear"])
    model.load_state_dict(state)
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    assert_same_maps(model(x), features(net, state, x))


def fpn(net, **args) -> FPN:
    return FPN(build(net, **args), in_features=["stage3", "stage4", "stage5"], out_channels=8)


@each_norm
def test_published_weights_load_below_an_fpn(norm):
    net = PUBLISHED["depthwise"]
    state = random_state(net, counted=True)
    model = fpn(net, **NORMS[norm])
    own = {k: torch.randn_like(v) for k, v in model.state_dict().items() if k.startswith("fpn_")}
    model.load_state_dict({**own, **{f"bottom_up.{k}": v for k, v in state.items()}})
    assert all(torch.equal(model.state_dict()[k], v) for k, v in own.items())
    compare(model.bottom_up, net, state)


class Detector(nn.Module):
    def __init__(self, backbone: FPN):
        super().__init__()
        self.backbone = backbone
        self.head = nn.Conv2d(8, 2, 1)


@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize(
    ("prefix", "wrap"),
    [("", lambda state: {"model": state, "iteration": 9}), ("module.", dict)],
    ids=["with the solver's state", "of a parallel model"],
)
def test_published_weights_load_by_detectron2(counted, prefix, wrap, tmp_path):
    net = PUBLISHED["depthwise"]
    state = random_state(net, counted=counted)
    model = Detector(fpn(net))
    own = {k: torch.randn_like(v) for k, v in model.state_dict().items() if ".bottom_up." not in k}
    whole = {**own, **{f"backbone.bottom_up.{k}": v for k, v in state.items()}}
    torch.save(wrap({prefix + k: v for k, v in whole.items()}), tmp_path / "model.pth")
    DetectionCheckpointer(model).load(str(tmp_path / "model.pth"))
    assert all(torch.equal(model.state_dict()[k], v) for k, v in own.items())
    compare(model.backbone.bottom_up, net, state)


@pytest.mark.parametrize("source", NORMS)
@pytest.mark.parametrize("target", NORMS)
def test_kinds_of_batch_norms_load_into_each_other(source, target):
    net = thin(TABLE["V-19-slim-eSE"])
    state = random_state(net)
    first, second = build(net, **NORMS[source]), build(net, **NORMS[target])
    first.load_state_dict(state)
    second.load_state_dict(first.state_dict())
    compare(second, net, state)


def test_missing_and_unexpected_tensors_are_reported():
    net = PUBLISHED["depthwise"]
    names = native_names(net)
    model = build(net)
    for lost in ("stem.stem_1/conv.weight", next(k for k in names if "concat/norm.bias" in k)):
        state = random_state(net)
        del state[lost]
        state["stage6.OSA6_1.concat.OSA6_1_concat/conv.weight"] = torch.zeros(1)
        result = model.load_state_dict(state, strict=False)
        assert result.missing_keys == [names[lost]]
        assert len(result.unexpected_keys) == 1
        with pytest.raises(RuntimeError, match="Missing key"):
            model.load_state_dict(state)


def test_weights_of_later_stages_are_reported():
    net = thin(TABLE["V-19-slim-eSE"])
    model = build(net, out_features=["stage3"])
    result = model.load_state_dict(random_state(net), strict=False)
    assert result.missing_keys == []
    assert {key.split(".")[0] for key in result.unexpected_keys} == {"stage4", "stage5"}


if __name__ == "__main__":
    PINNED.write_text(json.dumps(parameter_names(), indent=1) + "\n")
