# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
import re
from dataclasses import fields, replace

import pytest
import torch
import torch.nn.functional as F
import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.layers import FrozenBatchNorm2d, ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN, build_backbone
from detectron2.modeling.backbone.fpn import LastLevelP6P7
from devices import shapes_alone
from reference import assert_same_maps, thin
from torch import nn

import vovnet_d2.config
from vovnet_d2 import VOVNET_SPECS, VoVNet, VoVNetSpec, add_vovnet_config, get_config_file
from vovnet_d2.modeling.build import build_vovnet_backbone, build_vovnet_classifier
from vovnet_d2.modeling.layers import DeformableConv2d

STAGES = ["stage2", "stage3", "stage4", "stage5"]
THIN = thin(VOVNET_SPECS["V-19-slim-eSE"])
WIDTHS = ("stage_mid_channels", "stage_out_channels", "stem_channels")
BUILDERS = {
    "build_vovnet_backbone": STAGES,
    "build_vovnet_fpn_backbone": ["p2", "p3", "p4", "p5", "p6"],
    "build_retinanet_vovnet_fpn_backbone": ["p3", "p4", "p5", "p6", "p7"],
    "build_fcos_vovnet_fpn_backbone": ["p3", "p4", "p5", "p6", "p7"],
}

each_builder = pytest.mark.parametrize("builder", BUILDERS)


def config(builder: str = "build_vovnet_backbone", **vovnet) -> CfgNode:
    """Return a config of a thin V-19-slim-eSE. ``vovnet`` sets keys of MODEL.VOVNET."""
    cfg = get_cfg()
    add_vovnet_config(cfg)
    cfg.MODEL.BACKBONE.NAME = builder
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    cfg.MODEL.VOVNET.CONV_BODY = "V-19-slim-eSE"
    for width in WIDTHS:
        cfg.MODEL.VOVNET[width.upper()] = getattr(THIN, width)
    cfg.MODEL.FPN.IN_FEATURES = STAGES if "p2" in BUILDERS[builder] else STAGES[1:]
    cfg.MODEL.FPN.OUT_CHANNELS = 32
    for key, value in vovnet.items():
        cfg.MODEL.VOVNET[key] = value
    return cfg


def build(cfg: CfgNode, channels: int = 3) -> nn.Module:
    return build_backbone(cfg, ShapeSpec(channels=channels)).eval()


def strides(model: nn.Module) -> dict[str, int]:
    return {name: shape.stride for name, shape in model.output_shape().items()}


# The builders


def test_builders_are_registered():
    ours = {name for name, _ in BACKBONE_REGISTRY if "vovnet" in name}
    assert ours == BUILDERS.keys()


@each_builder
def test_feature_maps_of_builders(builder):
    model = build(config(builder))
    assert list(model.output_shape()) == BUILDERS[builder]
    x = torch.randn(1, 3, 128, 192)
    for name, map_ in model(x).items():
        shape = model.output_shape()[name]
        assert map_.shape == (1, shape.channels, 128 // shape.stride, -(-192 // shape.stride))
    backbone = model if builder == "build_vovnet_backbone" else model.bottom_up
    assert isinstance(backbone, VoVNet)
    assert backbone.spec == THIN


def test_plain_backbone_is_vovnet():
    model = build(config(NORM="BN"))
    peer = VoVNet(THIN, norm="BN", out_features=STAGES).eval()
    peer.load_state_dict(model.state_dict())
    x = torch.randn(1, 3, 65, 64)
    assert_same_maps(model(x), peer(x), tolerance=0)


def test_p6_by_max_pooling():
    maps = build(config("build_vovnet_fpn_backbone"))(torch.randn(1, 3, 160, 224))
    assert torch.equal(maps["p6"], maps["p5"][:, :, ::2, ::2])


@pytest.mark.parametrize(("in_feature", "channels"), [("stage5", 64), ("p5", 32)])
def test_retinanet_top_levels(in_feature, channels):
    """Compare the feature maps with those of Detectron2's own blocks with the same weights."""
    cfg = config("build_retinanet_vovnet_fpn_backbone", TOP_BLOCK_IN_FEATURE=in_feature)
    model = build(cfg)
    top = LastLevelP6P7(channels, 32, in_feature)
    peer = FPN(VoVNet(THIN, out_features=STAGES), STAGES[1:], 32, top_block=top).eval()
    peer.load_state_dict(model.state_dict())
    x = torch.randn(1, 3, 64, 96)
    assert_same_maps(model(x), peer(x), tolerance=0)
    p6 = model.top_block.p6
    source = (model.bottom_up if in_feature == "stage5" else model)(x)[in_feature]
    torch.testing.assert_close(model(x)["p6"], F.conv2d(source, p6.weight, p6.bias, 2, 1))


@pytest.mark.parametrize("top_levels", [0, 1, 2])
def test_fcos_top_levels(top_levels):
    cfg = config("build_fcos_vovnet_fpn_backbone")
    cfg.MODEL.FCOS.TOP_LEVELS = top_levels
    model = build(cfg)
    assert list(model.output_shape()) == ["p3", "p4", "p5", "p6", "p7"][: 3 + top_levels]
    maps = model(torch.randn(1, 3, 64, 96))
    assert list(maps) == list(model.output_shape())
    if top_levels:
        p6 = model.top_block.p6
        expected = F.conv2d(maps["p5"], p6.weight, p6.bias, stride=2, padding=1)
        torch.testing.assert_close(maps["p6"], expected)


@pytest.mark.parametrize("freeze_at", range(-1, 6))
@each_builder
def test_freeze_at(builder, freeze_at):
    cfg = config(builder, NORM="BN")
    cfg.MODEL.BACKBONE.FREEZE_AT = freeze_at
    frozen = ["stem", *STAGES][: max(freeze_at, 0)]
    model = build(cfg)
    for name, parameter in model.named_parameters():
        stage = name.removeprefix("bottom_up.").split(".")[0]
        assert parameter.requires_grad == (stage not in frozen), name
    kinds = {name: type(m) for name, m in model.named_modules() if "norm" in name.split(".")[-1:]}
    assert kinds
    for name, kind in kinds.items():
        stage = name.removeprefix("bottom_up.").split(".")[0]
        assert kind is (FrozenBatchNorm2d if stage in frozen else nn.BatchNorm2d), name


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_input_channels(channels):
    assert build(config(), channels).stem.conv1.in_channels == channels


@pytest.mark.parametrize(
    "out_features", [["stem"], ["stage3"], ["stage2", "stage4"], STAGES[2:], ["stem", *STAGES]]
)
def test_out_features(out_features):
    model = build(config(OUT_FEATURES=out_features))
    assert list(model(torch.randn(1, 3, 64, 64))) == out_features
    assert len(model.stage_names) == (
        0 if out_features == ["stem"] else int(out_features[-1][-1]) - 1
    )


def test_fpn_takes_some_of_the_features():
    cfg = config("build_fcos_vovnet_fpn_backbone", OUT_FEATURES=STAGES[1:])
    cfg.MODEL.FPN.IN_FEATURES = ["stage4", "stage5"]
    assert strides(build(cfg)) == {"p4": 16, "p5": 32, "p6": 64, "p7": 128}


def test_fpn_keys():
    cfg = config("build_vovnet_fpn_backbone")
    cfg.MODEL.FPN.NORM, cfg.MODEL.FPN.FUSE_TYPE = "GN", "avg"
    model = build(cfg)
    peer = FPN(
        VoVNet(THIN, out_features=STAGES), STAGES, 32, "GN", top_block=model.top_block,
        fuse_type="avg",
    ).eval()  # fmt: skip
    peer.load_state_dict(model.state_dict())
    x = torch.randn(1, 3, 64, 96)
    assert_same_maps(model(x), peer(x), tolerance=0)


def test_dilated_stage5():
    assert strides(build(config(STAGE5_DILATION=2)))["stage5"] == 16


def test_deformable_convolutions():
    cfg = config(
        STAGE_WITH_DCN=(False, False, True, True), WITH_MODULATED_DCN=True, DEFORMABLE_GROUPS=2
    )
    found = {n: m for n, m in build(cfg).named_modules() if isinstance(m, DeformableConv2d)}
    assert {name.split(".")[0] for name in found} == {"stage4", "stage5"}
    assert {module.offset.out_channels for module in found.values()} == {2 * 27}


# The keys

OTHER_VALUES = {
    "stage_mid_channels": (8, 8, 8, 8),
    "stage_out_channels": (16, 24, 32, 40),
    "blocks_per_stage": (2, 1, 1, 1),
    "layers_per_block": 2,
    "stem_channels": (4, 4, 8),
    "stem": "pooled",
    "residual": False,
    "ese": "last",
    "depthwise": True,
    "bottleneck": True,
}


@pytest.mark.parametrize("field", [field.name for field in fields(VoVNetSpec)])
def test_every_field_of_a_spec_has_its_key(field):
    value = OTHER_VALUES[field]
    assert getattr(THIN, field) != value
    cfg = config()
    cfg.merge_from_list([f"MODEL.VOVNET.{field.upper()}", str(value)])  # as text
    assert build(cfg).spec == replace(THIN, **{field: value})


@pytest.mark.parametrize("variant", VOVNET_SPECS)
def test_every_variant_is_reached_by_its_name(variant):
    cfg = get_cfg()
    add_vovnet_config(cfg)
    cfg.MODEL.VOVNET.CONV_BODY = variant
    with shapes_alone():
        model = BACKBONE_REGISTRY.get("build_vovnet_backbone")(cfg, ShapeSpec(channels=3))
    assert model.spec == VOVNET_SPECS[variant]


def test_keys_may_be_added_twice():
    cfg = config(NORM="GN", STEM="pooled")
    cfg.MODEL.FCOS.TOP_LEVELS = 1
    before = cfg.clone()
    add_vovnet_config(cfg)
    assert cfg == before


@each_builder
def test_a_config_that_was_written_is_read_again(builder, tmp_path):
    cfg = config(builder, STEM="pooled")
    (tmp_path / "config.yaml").write_text(cfg.dump())
    again = get_cfg()
    add_vovnet_config(again)
    again.merge_from_file(str(tmp_path / "config.yaml"))
    assert yaml.safe_load(again.dump()) == yaml.safe_load(cfg.dump())
    assert strides(build(again)) == strides(build(cfg))


YAML_OF_ANOTHER_PROJECT = """
MODEL:
  META_ARCHITECTURE: "GeneralizedRCNN"
  BACKBONE:
    NAME: "build_vovnet_fpn_backbone"
    FREEZE_AT: 2
  VOVNET:
    CONV_BODY: "V-19-slim-eSE"
    OUT_FEATURES: ["stage2", "stage3", "stage4", "stage5"]
    NORM: "BN"
    OUT_CHANNELS: 128
    BACKBONE_OUT_CHANNELS: 64
    STAGE_WITH_DCN: [False, False, False, True]
    WITH_MODULATED_DCN: True
    DEFORMABLE_GROUPS: 2
  FPN:
    IN_FEATURES: ["stage2", "stage3", "stage4", "stage5"]
    OUT_CHANNELS: 128
"""


def test_yaml_of_another_project(tmp_path):
    (tmp_path / "config.yaml").write_text(YAML_OF_ANOTHER_PROJECT)
    cfg = get_cfg()
    add_vovnet_config(cfg)
    cfg.merge_from_file(str(tmp_path / "config.yaml"))
    model = build(cfg)
    assert model.bottom_up.spec == VOVNET_SPECS["V-19-slim-eSE"]
    assert model.output_shape()["p6"] == ShapeSpec(channels=128, stride=64)  # ignores OUT_CHANNELS
    assert isinstance(model.bottom_up.stem.conv1.norm, FrozenBatchNorm2d)
    assert isinstance(model.bottom_up.stage3[0].aggregation.norm, nn.BatchNorm2d)
    assert model.bottom_up.stage5[0].layers[0].offset.out_channels == 54


NODES_OF_OTHER_PROJECTS = {
    "VOVNET": {
        "CONV_BODY": "V-19-slim-eSE",
        "OUT_FEATURES": ["stage3", "stage4", "stage5"],
        "NORM": "GN",
        "OUT_CHANNELS": 128,
        "BACKBONE_OUT_CHANNELS": 64,
        "STAGE_WITH_DCN": (False, False, False, True),
        "WITH_MODULATED_DCN": True,
        "DEFORMABLE_GROUPS": 2,
    },
    "FCOS": {"TOP_LEVELS": 1, "NUM_CLASSES": 80, "FPN_STRIDES": [8, 16, 32, 64, 128]},
}


def config_of_another_project() -> CfgNode:
    cfg = get_cfg()
    for name, node in NODES_OF_OTHER_PROJECTS.items():
        cfg.MODEL[name] = CfgNode(dict(node))
    cfg.MODEL.BACKBONE.NAME = "build_fcos_vovnet_fpn_backbone"
    cfg.MODEL.FPN.IN_FEATURES = ["stage3", "stage4", "stage5"]
    return cfg


def test_nodes_of_other_projects_keep_their_values():
    cfg = config_of_another_project()
    add_vovnet_config(cfg)
    for name, node in NODES_OF_OTHER_PROJECTS.items():
        assert {key: cfg.MODEL[name][key] for key in node} == node
    model = build(cfg)
    assert list(model.output_shape()) == ["p3", "p4", "p5", "p6"]
    assert isinstance(model.bottom_up.stem.conv1.norm, nn.GroupNorm)


# Errors


@pytest.mark.parametrize("make", [get_cfg, config_of_another_project], ids=["none", "another's"])
@each_builder
def test_keys_were_not_added(builder, make):
    cfg = make()
    cfg.MODEL.BACKBONE.NAME = builder
    with pytest.raises(KeyError, match=r"no MODEL\.VOVNET of vovnet_d2: call vovnet_d2\.add_vovn"):
        build(cfg)


@each_builder
@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("VOVNET.CONV_BODY", "V-39-ESE", "variant 'V-39-ESE'. Close to it: 'V-39-eSE'"),
        ("VOVNET.NORM", "frozenBN", "Unknown norm 'frozenBN': choose from '', 'BN', 'SyncBN',"),
        ("VOVNET.OUT_FEATURES", ["res5"], "no feature 'res5': choose from stem, stage2, stage3,"),
        ("VOVNET.STEM", "max", "MODEL.VOVNET.STEM is 'max': choose from strided, pooled."),
        ("VOVNET.ESE", "both", "MODEL.VOVNET.ESE is 'both': choose from all, last, none."),
        ("VOVNET.STEM_CHANNELS", (8, 8), "VOVNET.STEM_CHANNELS is (8, 8): expected 3 positive"),
        ("VOVNET.STAGE_MID_CHANNELS", (8, 0, 8, 8), "is (8, 0, 8, 8): expected 4 positive integ"),
        ("VOVNET.LAYERS_PER_BLOCK", 0, "LAYERS_PER_BLOCK is 0: expected a positive integer."),
        ("VOVNET.STAGE5_DILATION", 3, "stage5_dilation is 3: choose 1 or 2."),
        ("VOVNET.STAGE_WITH_DCN", (True,), "stage_with_dcn is [True]: give four booleans"),
        ("BACKBONE.FREEZE_AT", 6, "freeze_at is 6: choose 0 (nothing), 1 (stem)"),
    ],
)
def test_wrong_values(builder, key, value, message):
    cfg = config(builder)
    cfg.merge_from_list([f"MODEL.{key}", value])
    with pytest.raises(ValueError, match=re.escape(message)):
        build(cfg)


@pytest.mark.parametrize("builder", [name for name in BUILDERS if "fpn" in name])
def test_fpn_features_that_do_not_fit(builder):
    cfg = config(builder, OUT_FEATURES=["stage3", "stage5"])
    cfg.MODEL.FPN.IN_FEATURES = ["stage3", "stage4", "stage5"]
    with pytest.raises(ValueError, match="asks for stage4, but the backbone returns stage3, stage"):
        build(cfg)
    cfg = config(builder, STAGE5_DILATION=2)
    with pytest.raises(ValueError, match=r"STAGE5_DILATION 2, stage5 has the stride of stage4"):
        build(cfg)


def test_wrong_source_of_retinanet_top_levels():
    cfg = config("build_retinanet_vovnet_fpn_backbone", TOP_BLOCK_IN_FEATURE="res5")
    with pytest.raises(ValueError, match="from 'res5': choose from stage2, stage3, stage4, stage5"):
        build(cfg)


def test_wrong_number_of_fcos_top_levels():
    cfg = config("build_fcos_vovnet_fpn_backbone")
    cfg.MODEL.FCOS.TOP_LEVELS = 3
    with pytest.raises(ValueError, match=r"top levels is 3: choose 0, 1 \(P6\) or 2 \(P6, P7\)"):
        build(cfg)


# Config files


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Make a ``configs`` folder at the location in an installed package."""
    monkeypatch.setattr(vovnet_d2.config, "__file__", str(tmp_path / "vovnet_d2" / "config.py"))
    for name in ("COCO-Detection/faster_rcnn_V_39_eSE.yaml", "Base-FPN.yaml", "lazy/mask.py"):
        file = tmp_path / "vovnet_d2" / "configs" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("VERSION: 2\n")
    return tmp_path


def test_config_file(folder):
    for name in ("Base-FPN.yaml", "lazy/mask.py"):
        assert get_config_file(name) == str(folder / "vovnet_d2" / "configs" / name)


def test_config_file_of_a_checkout(folder):
    (folder / "vovnet_d2" / "configs").rename(folder / "configs")
    assert get_config_file("Base-FPN.yaml") == str(folder / "configs" / "Base-FPN.yaml")


@pytest.mark.parametrize(
    ("name", "close"),
    [
        ("COCO-Detection/faster_rcnn_V_39.yaml", "COCO-Detection/faster_rcnn_V_39_eSE.yaml"),
        ("Base-FPN.yml", "Base-FPN.yaml"),
        ("faster_rcnn_V_39_eSE.yaml", "COCO-Detection/faster_rcnn_V_39_eSE.yaml"),
    ],
)
def test_unknown_config_file(folder, name, close):
    message = f"No config file '{name}' in .*configs. Close to it: '{close}'"
    with pytest.raises(FileNotFoundError, match=message):
        get_config_file(name)


def test_name_unlike_any_config_file(folder):
    with pytest.raises(FileNotFoundError, match=r"No config file 'zzz' in .*configs\.$"):
        get_config_file("zzz")


@pytest.mark.parametrize("form", ["{}/no/Base-FPN.yml", "{}/Base-FPN.yml", "mine/Base-FPN.yml"])
def test_a_path_is_not_compared_with_the_names_of_configs(folder, tmp_path, monkeypatch, form):
    """Check paths that are absolute or whose folder exists."""
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path)
    name = form.format(tmp_path)
    with pytest.raises(FileNotFoundError, match=rf"^There is no config file {re.escape(name)}\.$"):
        get_config_file(name)
    with pytest.raises(FileNotFoundError, match=r"Close to it: 'Base-FPN\.yaml'"):
        get_config_file("another/Base-FPN.yml")


def test_no_config_files(tmp_path, monkeypatch):
    monkeypatch.setattr(vovnet_d2.config, "__file__", str(tmp_path / "vovnet_d2" / "config.py"))
    with pytest.raises(FileNotFoundError, match=r"No configs folder .*: reinstall vovnet_d2"):
        get_config_file("Base-FPN.yaml")


def test_classifier_is_the_backbone_with_a_linear_layer() -> None:
    cfg = get_cfg()
    add_vovnet_config(cfg)
    cfg.MODEL.VOVNET.CONV_BODY = "V-19-slim-eSE"
    cfg.MODEL.VOVNET.NORM = "BN"
    cfg.MODEL.VOVNET.STAGE5_DILATION = 2
    cfg.MODEL.VOVNET.STAGE_WITH_DCN = (False, False, False, True)
    with shapes_alone():
        backbone = build_vovnet_backbone(cfg, ShapeSpec(channels=3))
        classifier = build_vovnet_classifier(cfg, ShapeSpec(channels=3), num_classes=7)
    assert classifier.linear.weight.shape == (7, 512)
    without = "\n".join(line for line in str(classifier).split("\n") if "(linear)" not in line)
    assert without == str(backbone)
