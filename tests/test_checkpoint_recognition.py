# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
from dataclasses import replace
from itertools import product

import pytest
import torch
from reference import KINDS, STRUCTURES, TABLE, Net, native_names, random_state, tensors, thin
from state_dicts import COMPLETE_LAYOUTS

from vovnet_d2 import VOVNET_SPECS, VoVNetSpec, convert_state_dict
from vovnet_d2.checkpoint import describe_state_dict
from vovnet_d2.layouts import rename_keys

TOLD = {"stage_mid_channels", "stage_out_channels", "blocks_per_stage", "layers_per_block"} | {
    "stem_channels",
    "ese",
    "depthwise",
    "bottleneck",
}


def shapes(net: Net, layout: str = "detectron2", **options) -> dict[str, torch.Tensor]:
    """Return tensors without values under the names of a layout."""
    state = {
        published: torch.empty(shape, device="meta")
        for published, _, shape in tensors(net, **options)
    }
    return convert_state_dict(state, layout)


@pytest.mark.parametrize(
    ("variant", "layout"),
    [
        *((variant, COMPLETE_LAYOUTS[0]) for variant in TABLE),
        *product(KINDS, COMPLETE_LAYOUTS[1:]),
    ],
)
def test_variants(variant, layout):
    found = describe_state_dict(shapes(TABLE[variant], layout, counted=True))
    assert found.variant == variant
    assert found.layout == layout
    assert found.differences(VOVNET_SPECS[variant]) == {}
    assert found.config_lines() == [f'MODEL.VOVNET.CONV_BODY: "{variant}"']
    assert (found.prefix, found.in_channels, found.num_classes, found.norm) == ("", 3, None, "BN")


@pytest.mark.parametrize("structure", STRUCTURES)
def test_config_lines_of_structures(structure):
    """Check that the printed config lines give the architecture of the file."""
    net = STRUCTURES[structure]
    layout = "native" if net.bottleneck else "detectron2"
    found = describe_state_dict(shapes(net, layout))
    first, *others = [
        line.removeprefix("MODEL.VOVNET.").split(": ") for line in found.config_lines()
    ]
    fields = {name.lower(): eval(value) for name, value in others}
    spec = replace(VOVNET_SPECS[eval(first[1])], **fields)
    assert found.differences(spec) == {}
    expected = VoVNetSpec(**vars(net))
    assert {name for name in TOLD if getattr(spec, name) != getattr(expected, name)} == set()
    assert found.fields.keys() == TOLD


@pytest.mark.parametrize("variant", ["V-39-eSE", "V-57-eSE", "V-99-eSE"])
def test_placement_of_ese(variant):
    net = replace(TABLE[variant], ese="last")
    found = describe_state_dict(shapes(net, "timm"))
    assert found.differences(VOVNET_SPECS[variant]) == {"ese": ("last", "all")}
    assert found.config_lines()[1:] == ['MODEL.VOVNET.ESE: "last"']


def test_placement_of_ese_does_not_matter_with_one_block_per_stage():
    found = describe_state_dict(shapes(replace(TABLE["V-19-eSE"], ese="last")))
    for ese in ("last", "all"):
        assert found.differences(replace(VOVNET_SPECS["V-19-eSE"], ese=ese)) == {}


@pytest.mark.parametrize("num_classes", [None, 1000])
@pytest.mark.parametrize("in_channels", [1, 3, 6])
@pytest.mark.parametrize("layout", COMPLETE_LAYOUTS)
def test_channels_and_classes(layout, in_channels, num_classes):
    net = TABLE["V-27-slim"]
    found = describe_state_dict(
        shapes(net, layout, in_channels=in_channels, num_classes=num_classes)
    )
    assert (found.in_channels, found.num_classes) == (in_channels, num_classes)
    assert f", {in_channels} input channel{'s' * (in_channels > 1)}" in str(found)


PREFIXES = [
    "module.",
    "backbone.bottom_up.",
    "bottom_up.",
    "img_backbone.",
    "backbone.",
    "module.backbone.bottom_up.",
    "model.img_backbone.body.",
    "pts.stem.",  # looks like the beginning of a name of VoVNet
]


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("layout", COMPLETE_LAYOUTS)
def test_prefixes(layout, prefix):
    outer = prefix.rpartition(".bottom_up.")[0]
    state = {prefix + name: t for name, t in shapes(thin(TABLE["V-19-slim-eSE"]), layout).items()}
    state |= {
        f"{outer}fpn_lateral2.weight": torch.empty(3, device="meta"),
        "roi_heads.box_head.fc1.weight": torch.empty(3, device="meta"),
        "stem.conv.weight": torch.empty(3, device="meta"),
    }
    assert describe_state_dict(state).prefix == prefix


def test_fewer_stages():
    state = {n: t for n, t in shapes(TABLE["V-39-eSE"]).items() if not n.startswith("stage5")}
    found = describe_state_dict(state)
    assert found.num_stages == 3
    assert found.differences(VOVNET_SPECS["V-39-eSE"]) == {}
    assert "no stages beyond stage4" in str(found)


def test_norms():
    state = shapes(thin(TABLE["V-39"]))
    group = {name: t for name, t in state.items() if "running_" not in name}
    none = {name: t for name, t in group.items() if "norm" not in name}
    assert [describe_state_dict(s).norm for s in (state, group, none)] == ["BN", "GN", ""]


def test_custom_widths():
    found = describe_state_dict(shapes(thin(TABLE["V-39-eSE"])))
    assert 'MODEL.VOVNET.CONV_BODY: "V-39-eSE"' in found.config_lines()
    assert "MODEL.VOVNET.STAGE_OUT_CHANNELS: [32, 64, 96, 128]" in found.config_lines()


@pytest.mark.parametrize(
    ("names", "what"),
    [
        (["stem.conv1.weight", "res2.0.conv1.weight"], "a Detectron2 ResNet"),
        (["res2_0_branch2a_w", "res_conv1_bn_s"], "a Caffe2"),
        (["conv1.weight", "layer2.0.conv1.weight"], "a ResNet or one of its relatives"),
        (["patch_embed.proj.weight", "blocks.0.attn.qkv.weight"], "a vision transformer"),
        (["layers.0.blocks.0.attn.qkv.weight"], "a vision transformer"),
        (["stem.0.weight", "stages.0.blocks.0.conv_dw.weight"], "a ConvNeXt or"),
    ],
)
def test_other_networks(names, what):
    with pytest.raises(ValueError, match=f"No VoVNet is in it. It looks like {what}"):
        describe_state_dict({name: torch.ones(3) for name in names})


@pytest.mark.parametrize(
    "names",
    [
        ["features.0.weight"],  # VGG, AlexNet, SqueezeNet, ...
        ["conv1.weight", "layer1.0.conv1.weight", "stage2.0.branches.0.0.conv1.weight"],  # HRNet
        ["layers.0.attn.fc.weight"],
    ],
)
def test_names_that_several_networks_have_are_not_recognised(names):
    with pytest.raises(ValueError, match=r"^No VoVNet is in it\. Its tensors: "):
        describe_state_dict({name: torch.ones(3) for name in names})


# Renaming


@pytest.mark.parametrize("to", ["detectron2", "timm"])
@pytest.mark.parametrize("variant", KINDS)
def test_round_trips(variant, to):
    """Convert native names to another layout and back. Names and tensors must not change."""
    net = thin(TABLE[variant])
    names = native_names(net, num_classes=5, counted=True)
    native = {names[k]: t for k, t in random_state(net, num_classes=5, counted=True).items()}
    there = convert_state_dict(native, to)
    assert not there.keys() & native.keys()
    back = convert_state_dict(there, "native")
    assert back.keys() == native.keys()
    assert all(torch.equal(back[name], native[name]) for name in native)


@pytest.mark.parametrize("variant", KINDS)
def test_published_names(variant):
    net = thin(TABLE[variant])
    names = native_names(net, num_classes=5, counted=True)
    published = random_state(net, num_classes=5, counted=True)
    native = {names[name]: tensor for name, tensor in published.items()}
    assert convert_state_dict(native, "detectron2").keys() == published.keys()
    converted = convert_state_dict({f"module.{k}": t for k, t in published.items()})
    assert converted.keys() == native.keys()
    assert all(torch.equal(converted[name], native[name]) for name in native)


def test_the_conversion_leaves_other_tensors_out():
    state = random_state(thin(TABLE["V-39-eSE"]))
    detector = {f"backbone.bottom_up.{k}": t for k, t in state.items()}
    detector["backbone.fpn_lateral2.weight"] = torch.ones(1)
    assert convert_state_dict(detector, "detectron2").keys() == state.keys()


def test_tensors_without_a_name_in_other_layouts_are_refused():
    net = thin(STRUCTURES["bottleneck"])
    native = random_state(net)
    native = {native_names(net)[name]: tensor for name, tensor in native.items()}
    assert convert_state_dict(native, "native").keys() == native.keys()
    with pytest.raises(ValueError, match=r"detectron2 layout has no name for .*reduce"):
        convert_state_dict(native, "detectron2")


def test_an_unknown_layout():
    with pytest.raises(ValueError, match="Unknown layout 'keras': choose from native, detectron2"):
        convert_state_dict(random_state(thin(TABLE["V-39"])), "keras")


def test_other_layouts_rename_every_published_name():
    """Check that every other layout renames every name of the published layout."""
    names = [name for name, _, _ in tensors(TABLE["V-19-dw-eSE"], num_classes=2, counted=True)]
    assert {len(rename_keys(names, to)) for to in COMPLETE_LAYOUTS} == {0, len(names)}
