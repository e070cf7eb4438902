# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""All config files of this package, and config files of other VoVNet projects."""

import re
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import timm
import torch
import yaml
from detectron2 import model_zoo
from detectron2.config import CfgNode, get_cfg
from detectron2.data import MetadataCatalog
from detectron2.layers import FrozenBatchNorm2d, ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, build_backbone, build_model
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage
from devices import shapes_alone
from pytorchcv.models import vovnet as pytorchcv_vovnet
from torch import nn

from vovnet_d2 import VOVNET_SPECS, add_vovnet_config, get_config_file
from vovnet_d2.checkpoint import InputConvention
from vovnet_d2.checkpoint.zoo import ZOO
from vovnet_d2.engine import load_config
from vovnet_d2.engine.initial_weights import check_initialisation
from vovnet_d2.engine.lazy_config import instantiate, load_lazy_config, to_cfg
from vovnet_d2.engine.pretrain import add_pretraining_config
from vovnet_d2.engine.run_checks import check_network, check_run
from vovnet_d2.modeling.fcos import FCOS
from vovnet_d2.modeling.layers import DeformableConv2d

ROOT = Path(get_config_file("Base-RCNN-VoVNet-FPN.yaml")).parent
ALL_FILES = sorted(str(path.relative_to(ROOT)) for path in ROOT.rglob("*.yaml"))
# Configs of classifiers have other keys; test_pretrain.py tests them.
MODEL_FILES = [n for n in ALL_FILES if not re.match(r"Classification/|(.*/)?Base-", n)]

VARIANTS = {name.replace("-", "_"): name for name in VOVNET_SPECS}
VARIANT = "|".join(sorted(VARIANTS, key=len, reverse=True))
# The detectors that every variant has, with their folder here and in Detectron2.
FOLDERS = {
    "mask_rcnn": "COCO-InstanceSegmentation",
    "faster_rcnn": "COCO-Detection",
    "retinanet": "COCO-Detection",
}
# The detectors that only two variants with weights have: folder, schedules, and the config of
# Detectron2 with ResNet-50. Detectron2's FCOS has no YAML file; test_fcos.py tests it.
OTHERS = {
    "cascade_mask_rcnn": (
        "COCO-InstanceSegmentation",
        ("1x", "3x"),
        "Misc/cascade_mask_rcnn_R_50_FPN_{}.yaml",
    ),
    "keypoint_rcnn": (
        "COCO-Keypoints",
        ("1x", "3x"),
        "COCO-Keypoints/keypoint_rcnn_R_50_FPN_{}.yaml",
    ),
    "panoptic_fpn": (
        "COCO-PanopticSegmentation",
        ("1x", "3x"),
        "COCO-PanopticSegmentation/panoptic_fpn_R_50_{}.yaml",
    ),
    "semantic": ("COCO-SemanticSegmentation", ("1x",), "Misc/semantic_R_50_FPN_{}.yaml"),
    "fcos": ("COCO-Detection", ("1x",), ""),
}
GFL_FILES = [
    "COCO-Detection/gfl_V_19_slim_eSE_FPN_3x.yaml",
    "COCO-Detection/gfl_V_39_eSE_FPN_1x.yaml",
]
COCO_NAME = re.compile(
    rf"(?P<folder>COCO-\w+|quick_schedules)/(?P<scratch>scratch_)?"
    rf"(?P<kind>{'|'.join([*FOLDERS, *OTHERS, 'gfl'])})_"
    rf"(?P<variant>{VARIANT})(_(?P<neck>FPN|FPNLite))?_"
    rf"(?P<adamw>adamw_)?(?P<schedule>1x|3x|3x_gn|instant_test|training_acc_test)\.yaml"
)
COCO_FILES = [name for name in MODEL_FILES if COCO_NAME.fullmatch(name)]
THIN = replace(
    VOVNET_SPECS["V-39"],
    stage_mid_channels=VOVNET_SPECS["V-27-slim"].stage_mid_channels,
    stage_out_channels=VOVNET_SPECS["V-27-slim"].stage_out_channels,
)
HALF = replace(
    VOVNET_SPECS["V-19-slim-eSE"],
    stem_channels=(32, 32, 64),
    stage_mid_channels=(32, 40, 48, 56),
    stage_out_channels=(64, 128, 192, 256),
)
HALF_FILES = [f"Digits/{k}_V_19_slim_eSE_half_FPN.yaml" for k in ("mask_rcnn", "fcos", "gfl")]
OTHER_WIDTHS = {
    **dict.fromkeys(HALF_FILES, HALF),
    "Digits/mask_rcnn_V_19_slim_eSE_half_FPN_600.yaml": replace(HALF, stem_channels=(16, 16, 64)),
    **{
        f"Digits/ablation/mask_rcnn_V_39_thin_FPN{name}.yaml": spec
        for name, spec in {
            "": THIN,
            "_no_residual": replace(THIN, residual=False),
            "_bottleneck": replace(THIN, bottleneck=True),
            "_eSE": replace(THIN, ese="all"),
            "_eSE_last": replace(THIN, ese="last"),
        }.items()
    },
}


def load(path: str | Path) -> CfgNode:
    cfg = get_cfg()
    add_vovnet_config(cfg)
    cfg.merge_from_file(str(path), allow_unsafe=False)
    return cfg


@cache
def shipped(name: str) -> CfgNode:
    cfg = load(ROOT / name)
    cfg.freeze()
    return cfg


_models: dict[str, nn.Module] = {}
_backbones: dict[str, nn.Module] = {}
# The parts of a config that no backbone reads.
HEADS = (
    *("META_ARCHITECTURE", "PROPOSAL_GENERATOR", "RPN", "ROI_HEADS", "ROI_BOX_HEAD"),
    *("ROI_BOX_CASCADE_HEAD", "ROI_MASK_HEAD", "ROI_KEYPOINT_HEAD", "MASK_ON", "KEYPOINT_ON"),
    *("SEM_SEG_HEAD", "PANOPTIC_FPN", "ANCHOR_GENERATOR", "RETINANET"),
)


def build_on_meta(cfg: CfgNode) -> nn.Module:
    """Build the model of a config on the meta device.

    Configs that differ only in weights and schedules share one model, and configs that differ only
    in heads share one backbone."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.update(DEVICE="meta", WEIGHTS="", PIXEL_MEAN=[0.0] * 3, PIXEL_STD=[1.0] * 3)
    key = repr(cfg.MODEL)
    if key not in _models:
        name = cfg.MODEL.BACKBONE.NAME
        build = BACKBONE_REGISTRY.get(name)

        def build_once(cfg: CfgNode, input_shape: ShapeSpec) -> nn.Module:
            key = repr({k: v for k, v in cfg.MODEL.items() if k not in HEADS})
            if key not in _backbones:
                _backbones[key] = build(cfg, input_shape)
            return _backbones[key]

        with shapes_alone(), mock.patch.dict(BACKBONE_REGISTRY._obj_map, {name: build_once}):
            _models[key] = build_model(cfg)
    return _models[key]


def flatten(node: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in node.items():
        flat |= (
            flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        )
    return flat


# The files ----------------------------------------------------------------------------------------


def test_every_variant_has_its_detectors() -> None:
    for variant, kind in product(VARIANTS, FOLDERS):
        schedules = ["3x"] + (["1x"] if variant.removesuffix("_eSE") in ("V_39", "V_57") else [])
        expected = [
            f"{FOLDERS[kind]}/{kind}_{variant}_FPN_{schedule}.yaml" for schedule in schedules
        ]
        if kind == "faster_rcnn" and variant.startswith("V_19"):
            expected.append(f"{FOLDERS[kind]}/{kind}_{variant}_FPNLite_3x.yaml")
        pattern = re.compile(rf".*/{kind}_{variant}_FPN(Lite)?_\dx\.yaml")
        assert [name for name in COCO_FILES if pattern.fullmatch(name)] == sorted(expected)


def test_variants_with_weights_have_other_detectors() -> None:
    for kind, (folder, schedules, _) in OTHERS.items():
        neck = "" if kind == "panoptic_fpn" else "_FPN"
        variants = ["V_39_eSE", "V_57_eSE", *(["V_39"] if kind == "semantic" else [])]
        expected = {f"{folder}/{kind}_{v}{neck}_{s}.yaml" for v in variants for s in schedules}
        matches = [COCO_NAME.fullmatch(name) for name in COCO_FILES]
        assert {m[0] for m in matches if m["kind"] == kind and not m["adamw"]} == expected


def test_recipe_with_adamw() -> None:
    """Check that variants with weights of timm have this recipe for four detectors."""
    kinds = [*FOLDERS, "cascade_mask_rcnn"]
    variants = [name for name, entry in VARIANTS.items() if timm_weights(entry)]
    assert len(variants) == 3
    expected = {f"{k}_{v}_FPN_adamw_{s}" for k in kinds for v in variants for s in ("1x", "3x")}
    found = {Path(name).stem: name for name in COCO_FILES if COCO_NAME.fullmatch(name)["adamw"]}
    assert found.keys() == expected
    for stem, name in found.items():
        solver, weights = shipped(name).SOLVER, shipped(name).MODEL.WEIGHTS
        rate = 1e-4 if stem.startswith("retinanet") else 2e-4
        assert ("AdamW", rate, 0.05) == (solver.OPTIMIZER, solver.BASE_LR, solver.WEIGHT_DECAY)
        assert weights in timm_weights(shipped(name).MODEL.VOVNET.CONV_BODY)
        assert "not been measured on COCO" in (ROOT / name).read_text().splitlines()[0]


def timm_weights(variant: str) -> list[str]:
    return [n for n, e in ZOO.items() if e.variant == variant and n.startswith("timm://")]


def test_gfl_differs_from_fcos_by_its_assignment_and_losses() -> None:
    assert [name for name in COCO_FILES if "/gfl_" in name] == GFL_FILES
    expected = {"MODEL.FCOS.ASSIGNMENT": "atss", "MODEL.FCOS.LOSSES": "gfl"}
    for name in ("COCO-Detection/gfl_V_39_eSE_FPN_1x.yaml", HALF_FILES[2]):
        ours, peers = flatten(shipped(name)), flatten(shipped(name.replace("/gfl", "/fcos")))
        different = {key: value for key, value in ours.items() if value != peers[key]}
        lower = {} if "Digits" in name else {"MODEL.FCOS.INFERENCE_TH_TEST": 0.05}
        assert different == expected | lower
    for name in ("Base-GFL-VoVNet-FPN.yaml", *GFL_FILES):
        assert "Not measured on COCO" in (ROOT / name).read_text().splitlines()[0]


def test_dense_heads_of_the_digits_train_as_the_mask_rcnn() -> None:
    """Compare images, backbone, optimizer, schedule and evaluation."""
    mask_rcnn = flatten(shipped(HALF_FILES[0]))
    for name in HALF_FILES[1:]:
        different = {
            key for key, value in flatten(shipped(name)).items() if value != mask_rcnn[key]
        }
        assert {key for key in different if not key.startswith("MODEL.FCOS.")} == {
            "MODEL.META_ARCHITECTURE",
            "MODEL.BACKBONE.NAME",
            "MODEL.MASK_ON",
        }


def test_files_are_small_diffs_without_tags_and_addresses() -> None:
    for name in ALL_FILES:
        text = Path(get_config_file(name)).read_text()
        assert text.startswith("# Weights: "), name
        assert "!!" not in text, name  # a Python tag, which only the unsafe loader reads
        assert not re.search(r"https?:|www\.", text), name
        if name in MODEL_FILES:
            lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
            assert len(lines) <= 12, f"{name}: a config should be a small diff over its base"


def test_comments_name_the_weights() -> None:
    for name in MODEL_FILES:
        model = shipped(name).MODEL
        comment = (ROOT / name).read_text().splitlines()[0]
        if model.WEIGHTS:
            assert model.WEIGHTS in comment, name
            assert ZOO[model.WEIGHTS].commercial or "non-commercial" in comment, name
        else:
            assert comment.startswith("# Weights: none"), name
            assert not model.TIMM.PRETRAINED or model.TIMM.NAME in comment, name


# The models of the files --------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODEL_FILES)
def test_builds_the_variant_of_its_name(name: str) -> None:
    cfg = shipped(name)
    backbone = build_on_meta(cfg).backbone
    match = re.search(rf"_({VARIANT})_", name)
    assert bool(match) == ("vovnet" in cfg.MODEL.BACKBONE.NAME)
    if match:
        spec = OTHER_WIDTHS.get(name, VOVNET_SPECS[VARIANTS[match[1]]])
        if single_shot := re.match(r"(.*)/(refinedet|dsod)\d+_", name):
            # The digits do not have the stem of the paper, because it takes long.
            stem = "strided" if single_shot[1] == "Digits" else "pooled"
            spec = replace(spec, stem=stem, residual=False, bottleneck="_bottleneck_" in name)
        if cfg.MODEL.WEIGHTS.startswith("timm://"):
            spec = replace(spec, ese="last")
        assert VARIANTS[match[1]] == cfg.MODEL.VOVNET.CONV_BODY
        assert getattr(backbone, "bottom_up", backbone).spec == spec
        assert cfg.MODEL.BACKBONE.FREEZE_AT == 0


def test_every_ablation_has_its_file() -> None:
    assert set(OTHER_WIDTHS) == {n for n in MODEL_FILES if "ablation/" in n or "_half_" in n}


@pytest.mark.parametrize("name", COCO_FILES)
def test_coco_classes(name: str) -> None:
    cfg, model = shipped(name), build_on_meta(shipped(name))
    metadata = [MetadataCatalog.get(n) for n in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)]
    things = {len(data.get("thing_classes", [])) for data in metadata}
    stuff = {len(data.get("stuff_classes", [])) for data in metadata}
    kind = COCO_NAME.fullmatch(name)["kind"]
    if kind == "retinanet":
        assert things == {model.num_classes}
        assert model.head.cls_score.out_channels == 9 * model.num_classes  # 9 anchors per location
    elif kind in ("fcos", "gfl"):
        assert things == {model.num_classes} == {model.head.cls_score.out_channels}
    elif kind != "semantic":
        assert things == {model.roi_heads.num_classes}
        assert model.roi_heads.mask_on == (
            kind in ("mask_rcnn", "cascade_mask_rcnn", "panoptic_fpn")
        )
    if kind in ("semantic", "panoptic_fpn"):
        assert stuff == {model.sem_seg_head.predictor.out_channels}
    if kind == "keypoint_rcnn":
        keypoints = {len(data.keypoint_names) for data in metadata}
        assert keypoints == {model.roi_heads.keypoint_head.num_keypoints}


def detectron2_peer(match: re.Match[str]) -> CfgNode:
    """Return Detectron2's config with ResNet-50 for the same kind of detector and schedule."""
    cfg = get_cfg()
    kind, schedule = match["kind"], match["schedule"]
    if kind in OTHERS:
        name = OTHERS[kind][2].format(schedule)
    elif match["scratch"]:
        name = f"Misc/scratch_{kind}_R_50_FPN_{schedule}.yaml"
    else:
        own = schedule if schedule in ("1x", "3x") else "3x"
        name = f"{FOLDERS[kind]}/{kind}_R_50_FPN_{own}.yaml"
    # Detectron2's config of RetinaNet has a Python tag, which the safe loader refuses.
    cfg.merge_from_file(model_zoo.get_config_file(name), allow_unsafe=True)
    if match["folder"] == "quick_schedules":
        # Detectron2 has no quick schedule for some kinds, so the one of Mask R-CNN is used for all.
        name = f"quick_schedules/mask_rcnn_R_50_FPN_{schedule}.yaml"
        diff = yaml.safe_load(Path(model_zoo.get_config_file(name)).read_text())
        del diff["_BASE_"], diff["MODEL"]["MASK_ON"]
        diff.pop("TEST", None)  # expected results of ResNet-50
        cfg.merge_from_other_cfg(CfgNode(diff))
    return cfg


@pytest.mark.parametrize("name", [n for n in COCO_FILES if not re.search("/(fcos|gfl)_", n)])
def test_equals_detectron2_apart_from_the_backbone(name: str) -> None:
    match = COCO_NAME.fullmatch(name)
    cfg = shipped(name)
    ours, peers = flatten(cfg), flatten(detectron2_peer(match))
    expected = {"MODEL.BACKBONE.NAME", "MODEL.FPN.IN_FEATURES", "TEST.EVAL_PERIOD"}
    optional = {"MODEL.BACKBONE.FREEZE_AT", "MODEL.WEIGHTS"}
    if match["kind"] == "retinanet":
        expected |= {"SOLVER.CLIP_GRADIENTS.ENABLED", "SOLVER.CLIP_GRADIENTS.CLIP_TYPE"}
        expected |= {"SOLVER.WARMUP_ITERS"}
        optional |= {"SOLVER.WARMUP_FACTOR"}
        assert ours["SOLVER.WARMUP_ITERS"] >= 1000 >= peers["SOLVER.WARMUP_ITERS"]
        assert ours["SOLVER.WARMUP_FACTOR"] <= peers["SOLVER.WARMUP_FACTOR"]
    # Without evaluations during training there would be no best checkpoint.
    assert 0 < ours["TEST.EVAL_PERIOD"] <= ours["SOLVER.MAX_ITER"] or "_test" in match["schedule"]
    if match["adamw"]:
        expected |= {"SOLVER.BASE_LR", "SOLVER.WEIGHT_DECAY"}
    if match["neck"] == "FPNLite":
        expected |= {"MODEL.FPN.OUT_CHANNELS"}
        assert ours["MODEL.FPN.OUT_CHANNELS"] == 128
    if cfg.MODEL.WEIGHTS:
        expected |= {"MODEL.PIXEL_STD"}
        if ZOO[cfg.MODEL.WEIGHTS].input.format == "RGB":
            expected |= {"MODEL.PIXEL_MEAN", "INPUT.FORMAT"}
    different = {
        key for key in peers if ours[key] != peers[key] and not key.startswith("MODEL.RESNETS.")
    }
    assert expected <= different <= expected | optional


def test_norm_of_the_backbone() -> None:
    """Check that norms are frozen if and only if the config names weights."""
    for name in (n for n in COCO_FILES if n.startswith("COCO")):
        model = shipped(name).MODEL
        norm = "FrozenBN" if model.WEIGHTS else "naiveSyncBN"
        expected = "GN" if COCO_NAME.fullmatch(name)["scratch"] else norm
        assert expected == model.VOVNET.NORM, name


def check_start(cfg: CfgNode, backbone: nn.Module) -> None:
    check_run(cfg, training=True)
    check_initialisation(cfg, training=True, resuming=False, backbone=backbone)


@pytest.mark.parametrize("name", MODEL_FILES)
def test_starts_as_shipped(name: str) -> None:
    cfg = shipped(name)
    check_network(cfg)
    check_start(cfg, build_on_meta(cfg).backbone)


@pytest.mark.parametrize(
    "name", sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("lazy/*/*_V_*.py"))
)
def test_lazy_config_starts_as_shipped(name: str) -> None:
    config = load_lazy_config(str(ROOT / name), [])
    with shapes_alone():
        backbone = instantiate(config, "model.backbone")
    check_start(to_cfg(config), backbone)


@pytest.mark.parametrize("name", [n for n in ALL_FILES if n.startswith("Classification/")])
def test_classifier_starts_as_shipped(name: str) -> None:
    """Check the backbone and weights, but not the data, which most files leave to the user."""
    cfg = load_config(str(ROOT / name), add_config=add_pretraining_config)
    with shapes_alone():
        check_start(cfg, build_backbone(cfg))


def without_norm(model: nn.Module) -> set[str]:
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    assert not any(isinstance(m, FrozenBatchNorm2d | nn.BatchNorm2d) for m in model.modules())
    return {n for n, m in layers.items() if not isinstance(getattr(m, "norm", None), nn.GroupNorm)}


@pytest.mark.parametrize("name", [n for n in COCO_FILES if "/scratch_" in n])
def test_configs_from_scratch_have_group_norm_as_in_detectron2(name: str) -> None:
    model = build_on_meta(shipped(name))
    cfg = detectron2_peer(COCO_NAME.fullmatch(name))
    cfg.MODEL.DEVICE = "meta"
    with shapes_alone():
        peer = build_model(cfg)
    assert shipped(name).MODEL.WEIGHTS == ""
    assert without_norm(model) == without_norm(peer)
    assert repr(model.roi_heads) == repr(peer.roi_heads)


TIMM_FILES = [n for n in MODEL_FILES if shipped(n).MODEL.WEIGHTS.startswith("timm://")]


def test_weights_of_the_zoo_are_used() -> None:
    """Check that all detectors of a variant use its weights of the zoo, if there are any."""
    # If a variant has several weights, the first of the list are used.
    expected = {entry.variant: name for name, entry in reversed(ZOO.items())}
    for name in COCO_FILES:
        match = COCO_NAME.fullmatch(name)
        if not match["scratch"] and match["schedule"] != "instant_test":
            weights = expected.get(VARIANTS[match["variant"]], "")
            assert weights == shipped(name).MODEL.WEIGHTS, name


def test_networks_and_inputs_match_the_weights() -> None:
    """Compare architecture, channel order and pixel statistics with the entry of the zoo."""
    with_weights = [name for name in MODEL_FILES if shipped(name).MODEL.WEIGHTS]
    assert with_weights
    for name in with_weights:
        cfg = shipped(name)
        entry = ZOO[cfg.MODEL.WEIGHTS]
        assert build_on_meta(cfg).backbone.bottom_up.spec == entry.spec, name
        assert InputConvention.of_config(cfg) == entry.input, name


@pytest.mark.parametrize(("name", "weights"), [("V_27_slim", "vovnet27s"), ("V_39", "vovnet39")])
def test_agrees_with_pytorchcv(name: str, weights: str) -> None:
    cfg = shipped(f"COCO-InstanceSegmentation/mask_rcnn_{name}_FPN_3x.yaml")
    assert f"osmr://{weights}" == cfg.MODEL.WEIGHTS
    with shapes_alone():
        peer = getattr(pytorchcv_vovnet, weights)()
    keys = build_on_meta(cfg).backbone.bottom_up.load_state_dict(peer.state_dict(), strict=False)
    assert not keys.missing_keys
    assert keys.unexpected_keys == ["linear.weight", "linear.bias"]


CLIPPING = ("ENABLED", "CLIP_TYPE")
HGNET_FILES = [name for name in MODEL_FILES if "HGNet" in name]


def test_hgnets_have_their_detectors() -> None:
    networks = {"HGNet_T": "hgnet_tiny", "HGNetV2_B4": "hgnetv2_b4"}
    expected = {
        f"{FOLDERS[kind]}/{kind}_{short}_FPN_3x.yaml": name
        for kind in ("mask_rcnn", "retinanet")
        for short, name in networks.items()
    }
    found = {name: shipped(name).MODEL.TIMM.NAME.partition(".")[0] for name in HGNET_FILES}
    assert found == expected


@pytest.mark.parametrize("name", HGNET_FILES)
def test_hgnets_have_the_input_of_their_weights(name: str) -> None:
    cfg, model = shipped(name), build_on_meta(shipped(name))
    record = timm.get_pretrained_cfg(cfg.MODEL.TIMM.NAME)
    assert record.license.lower() == "apache-2.0"
    assert cfg.MODEL.TIMM.PRETRAINED
    assert cfg.INPUT.FORMAT == "RGB"
    for ours, peers in ((cfg.MODEL.PIXEL_MEAN, record.mean), (cfg.MODEL.PIXEL_STD, record.std)):
        assert ours == pytest.approx([255 * value for value in peers])
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    assert any(isinstance(m, FrozenBatchNorm2d) for m in model.modules())
    kind = Path(name).name.partition("_HGNet")[0]
    peer = get_cfg()
    peer.merge_from_file(
        model_zoo.get_config_file(f"{FOLDERS[kind]}/{kind}_R_50_FPN_3x.yaml"), allow_unsafe=True
    )
    different = {k for k, v in flatten(peer).items() if flatten(cfg)[k] != v}
    backbone = {"MODEL.BACKBONE.NAME", "MODEL.BACKBONE.FREEZE_AT", "MODEL.FPN.IN_FEATURES"}
    backbone |= {"MODEL.WEIGHTS", "MODEL.RESNETS.OUT_FEATURES", "TEST.EVAL_PERIOD"}
    backbone |= {"MODEL.PIXEL_MEAN", "MODEL.PIXEL_STD", "INPUT.FORMAT"}
    if kind == "retinanet":
        backbone |= {"SOLVER.WARMUP_ITERS", *(f"SOLVER.CLIP_GRADIENTS.{k}" for k in CLIPPING)}
    assert different - {"MODEL.RESNETS.DEPTH"} <= backbone


@pytest.mark.parametrize("weights", sorted({shipped(n).MODEL.WEIGHTS for n in TIMM_FILES}))
def test_agrees_with_timm(weights: str) -> None:
    """Compare the input, and the names and shapes of all tensors, with timm."""
    entry = weights.removeprefix("timm://")
    record = timm.get_pretrained_cfg(entry)
    with shapes_alone():
        state = timm.create_model(entry, pretrained=False).state_dict()
    for name in (n for n in TIMM_FILES if weights == shipped(n).MODEL.WEIGHTS):
        cfg = shipped(name)
        assert cfg.INPUT.FORMAT == "RGB", name
        for ours, peers in ((cfg.MODEL.PIXEL_MEAN, record.mean), (cfg.MODEL.PIXEL_STD, record.std)):
            assert ours == pytest.approx([255 * value for value in peers]), name
        # Tensors without data suffice, because only a wrong shape raises an error.
        keys = build_on_meta(cfg).backbone.bottom_up.load_state_dict(state, strict=False)
        assert not keys.missing_keys, name
        assert {key.split(".")[0] for key in keys.unexpected_keys} <= {"head", "linear"}, name


# Training and prediction --------------------------------------------------------------------------

RCNN_LOSSES = {"loss_rpn_cls", "loss_rpn_loc", "loss_cls", "loss_box_reg"}
LOSSES = {
    "mask_rcnn": RCNN_LOSSES | {"loss_mask"},
    "faster_rcnn": RCNN_LOSSES,
    "retinanet": {"loss_cls", "loss_box_reg"},
}


@pytest.mark.parametrize(
    "name",
    [n for n in COCO_FILES if n.endswith("instant_test.yaml")]
    + ["COCO-Detection/faster_rcnn_V_19_slim_dw_eSE_FPNLite_3x.yaml"],
)
def test_trains_and_predicts(name: str) -> None:
    cfg = load(ROOT / name)
    cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = 16
    cfg.MODEL.RPN.POST_NMS_TOPK_TEST = cfg.TEST.DETECTIONS_PER_IMAGE = 20
    cfg.MODEL.DEVICE = "cpu"
    model = build_model(cfg)
    height, width = 96, 128
    targets = Instances((height, width))
    targets.gt_boxes = Boxes([[8.0, 16.0, 72.0, 80.0], [40.0, 8.0, 120.0, 90.0]])
    targets.gt_classes = torch.tensor([3, 79])
    masks = torch.zeros(2, height, width, dtype=torch.bool)
    masks[0, 16:80, 8:72] = masks[1, 8:90, 40:120] = True
    targets.gt_masks = BitMasks(masks)
    image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8)
    sample = {"image": image, "height": 2 * height, "width": 2 * width, "instances": targets}

    with EventStorage():
        losses = model([sample])
    assert losses.keys() == LOSSES[COCO_NAME.fullmatch(name)["kind"]]
    assert all(0 < loss < 100 for loss in losses.values())  # also fails for NaN and infinity
    sum(losses.values()).backward()
    without = [n for n, p in model.named_parameters() if p.grad is None]
    assert not without
    assert all(p.grad.isfinite().all() for p in model.parameters())

    with torch.no_grad():
        predicted = model.eval()([sample])[0]["instances"]
    assert predicted.image_size == (2 * height, 2 * width)
    assert ((predicted.scores >= 0) & (predicted.scores <= 1)).all()
    assert predicted.has("pred_masks") == cfg.MODEL.MASK_ON


# Files of other VoVNet projects -------------------------------------------------------------------

FOREIGN_BASE = """
MODEL:
  META_ARCHITECTURE: "GeneralizedRCNN"
  BACKBONE:
    NAME: "build_vovnet_fpn_backbone"
    FREEZE_AT: 0
  VOVNET:
    OUT_FEATURES: ["stage2", "stage3", "stage4", "stage5"]
  FPN:
    IN_FEATURES: ["stage2", "stage3", "stage4", "stage5"]
  ANCHOR_GENERATOR:
    SIZES: [[32], [64], [128], [256], [512]]
  RPN:
    IN_FEATURES: ["p2", "p3", "p4", "p5", "p6"]
  ROI_HEADS:
    NAME: "StandardROIHeads"
    IN_FEATURES: ["p2", "p3", "p4", "p5"]
  ROI_BOX_HEAD:
    NAME: "FastRCNNConvFCHead"
    NUM_FC: 2
    POOLER_RESOLUTION: 7
  ROI_MASK_HEAD:
    NAME: "MaskRCNNConvUpsampleHead"
    NUM_CONV: 4
    POOLER_RESOLUTION: 14
VERSION: 2
"""
FOREIGN_MODEL = """
_BASE_: "{base}"
MODEL:
  WEIGHTS: "https://www.dropbox.com/s/0/vovnet_ese_detectron2.pth?dl=1"
  MASK_ON: True
  VOVNET:
    CONV_BODY: "{variant}"
    NORM: "FrozenBN"
    OUT_CHANNELS: 256
    BACKBONE_OUT_CHANNELS: 256
SOLVER:
  STEPS: (210000, 250000)
  MAX_ITER: 270000
"""


@pytest.mark.parametrize(
    ("variant", "base"), [*((v, "foreign") for v in VOVNET_SPECS), ("V-39-eSE", "ours")]
)
def test_vovnet_detectron2_file(variant: str, base: str, tmp_path: Path) -> None:
    """Load the file with its own base, and in a folder with our base, which has the same name."""
    base_path = tmp_path / "Base-RCNN-VoVNet-FPN.yaml"
    base_path.write_text(FOREIGN_BASE)
    if base == "ours":
        base_path = ROOT / base_path.name
    path = tmp_path / "mask_rcnn.yaml"
    path.write_text(FOREIGN_MODEL.format(variant=variant, base=base_path))
    cfg = load(path)
    model = build_on_meta(cfg)
    assert model.backbone.bottom_up.spec == VOVNET_SPECS[variant]
    assert {k: s.stride for k, s in model.backbone.output_shape().items()} == {
        "p2": 4, "p3": 8, "p4": 16, "p5": 32, "p6": 64,
    }  # fmt: skip
    assert model.roi_heads.mask_on
    assert cfg.SOLVER.MAX_ITER == 270000


# The first lines of config files of CenterMask2 and AdelaiDet.
FOR_FCOS = """
MODEL:
  BACKBONE:
    NAME: "build_fcos_vovnet_fpn_backbone"
    FREEZE_AT: 0
  FPN:
    IN_FEATURES: ["stage3", "stage4", "stage5"]
  VOVNET:
    CONV_BODY: "V-39-eSE"
    OUT_FEATURES: ["stage3", "stage4", "stage5"]
"""
CENTERMASK_STYLE = f"""{FOR_FCOS}
    NORM: "FrozenBN"
    OUT_CHANNELS: 256
    BACKBONE_OUT_CHANNELS: 256
    STAGE_WITH_DCN: (False, False, True, True)
    DEFORMABLE_GROUPS: 2
    WITH_MODULATED_DCN: {{}}
  FCOS:
    TOP_LEVELS: 1
VERSION: 2
"""


def written(text: str, folder: Path) -> str:
    path = folder / "other.yaml"
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize("modulated", [False, True])
def test_centermask_node(modulated: bool, tmp_path: Path) -> None:
    cfg = load(written(CENTERMASK_STYLE.format(modulated), tmp_path))
    with shapes_alone():
        backbone = build_backbone(cfg)
    assert list(backbone.output_shape()) == ["p3", "p4", "p5", "p6"]
    assert not hasattr(backbone.bottom_up, "stage6")
    deformable = [m for m in backbone.modules() if isinstance(m, DeformableConv2d)]
    # Stages 4 and 5 have two blocks each, with five 3x3 convolutions in each block.
    assert len(deformable) == 2 * 2 * 5
    # Each group of channels has two offsets and, if modulated, a mask for each of the 9 taps.
    assert {m.offset.out_channels for m in deformable} == {2 * 9 * (3 if modulated else 2)}


ADELAIDET_STYLE = f"""{FOR_FCOS}
  META_ARCHITECTURE: "OneStageDetector"
  PROPOSAL_GENERATOR:
    NAME: "FCOS"
  FCOS:
    NUM_CLASSES: 7
    FPN_STRIDES: [8, 16, 32, 64, 128]
    NUM_CLS_CONVS: 2
    NUM_BOX_CONVS: 2
    THRESH_WITH_CTR: True
    POST_NMS_TOPK_TEST: 50
"""


MASKS = """  ROI_HEADS:
    NAME: "CenterROIHeads"
  MASKIOU_ON: True
  FCOS:"""


def test_fcos_of_adelaidet_is_translated_to_ours(tmp_path: Path) -> None:
    cfg = load_config(written(ADELAIDET_STYLE, tmp_path))
    assert cfg.MODEL.META_ARCHITECTURE == "FCOS"
    assert cfg.TEST.DETECTIONS_PER_IMAGE == 50
    cfg.MODEL.DEVICE = "meta"
    model = build_model(cfg)
    assert isinstance(model, FCOS)
    assert model.head.cls_score.out_channels == 7
    assert sum(isinstance(m, nn.Conv2d) for m in model.head.cls_subnet) == 2


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ({"    FPN_STRIDES: [8": "    FPN_STRIDES: [4"}, r"here: MODEL\.FCOS\.FPN_STRIDES \[4, 16"),
        ({"BOX_CONVS: 2": "BOX_CONVS: 3"}, r"here: MODEL\.FCOS\.NUM_CLS_CONVS other than"),
        (
            {"MODEL:": "MODEL:\n  BASIS_MODULE:\n    NAME: X", "OneStageDetector": "BlendMask"},
            r"it is of AdelaiDet, .*MODEL\.META_ARCHITECTURE BlendMask, .* are not .* the keys "
            r"MODEL\.BASIS_MODULE, MODEL\.FCOS",
        ),
        (
            {"OneStageDetector": "GeneralizedRCNN", "  FCOS:": MASKS},
            r"of CenterMask2, .*FCOS, MODEL\.ROI_HEADS\.NAME CenterROIHeads are not registered, "
            r"and the keys MODEL\.MASKIOU_ON, MODEL\.FCOS\.FPN_STRIDES",
        ),
        (
            {"OneStageDetector": "Novel", "  FCOS:": "  NOVELTY: 3\n  FCOS:"},
            r"it is of another project, .*META_ARCHITECTURE Novel, .* keys MODEL\.NOVELTY",
        ),
        ({'    NAME: "build': '    CONV_BODY: "build'}, "it is of maskrcnn-benchmark"),
    ],
)
def test_keys_that_only_other_projects_have_are_named(
    lines: dict[str, str], message: str, tmp_path: Path
) -> None:
    text = ADELAIDET_STYLE
    for old, new in lines.items():
        text = text.replace(old, new)
    with pytest.raises(ValueError, match=message):
        load_config(written(text, tmp_path))


# One line of a config file of each of the other projects.
OF_OTHERS = {
    "MODEL: {META_ARCHITECTURE: CondInst}": "of AdelaiDet",
    "MODEL: {META_ARCHITECTURE: OneStageRCNN, PROPOSAL_GENERATOR: {NAME: FCOS}}": "of AdelaiDet",
    "MODEL: {META_ARCHITECTURE: OneStageDetector, PROPOSAL_GENERATOR: {NAME: MEInst}}": "AdelaiDet",
    "MODEL: {ROI_HEADS: {NAME: CenterROIHeads}}": "of CenterMask2",
    "MODEL: {ROI_MASK_HEAD: {NAME: SpatialAttentionMaskHead}}": "of CenterMask2",
    "MODEL: {PROPOSAL_GENERATOR: {NAME: TridentRPN}, TRIDENT: {NUM_BRANCH: 3}}": "of TridentNet",
    "MODEL: {ROI_MASK_HEAD: {NAME: PointRendMaskHead}}": "of Detectron2's PointRend",
    "MODEL: {SEM_SEG_HEAD: {NAME: DeepLabV3PlusHead, ASPP_CHANNELS: 1}}": "Detectron2's DeepLab",
    "MODEL: {META_ARCHITECTURE: PanopticDeepLab}": "Panoptic-DeepLab",
    "MODEL: {META_ARCHITECTURE: TensorMask, TENSOR_MASK: {}}": "of Detectron2's TensorMask",
    "MODEL: {META_ARCHITECTURE: MaskFormer}": "of MaskFormer or Mask2Former",
    "MODEL: {META_ARCHITECTURE: SparseRCNN, SparseRCNN: {NUM_HEADS: 6}}": "of Sparse R-CNN",
    "MODEL: {ROI_HEADS: {NAME: DensePoseROIHeads}, DENSEPOSE_ON: True}": "Detectron2's DensePose",
}
UNKNOWN_PARTS = {
    "ROI_HEADS.NAME": "StandardROIHead",
    "ROI_BOX_HEAD.NAME": "FastRCNNConvFCHeads",
    "ROI_MASK_HEAD.NAME": "MaskHead",
    "PROPOSAL_GENERATOR.NAME": "RPM",
    "RPN.HEAD_NAME": "StandardRPN",
    "META_ARCHITECTURE": "MaskRCNN",
    "BACKBONE.NAME": "build_vovnet_backbones",
}


@pytest.mark.parametrize("text", OF_OTHERS)
def test_other_projects_are_named(text: str, tmp_path: Path) -> None:
    path = tmp_path / "other.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"{OF_OTHERS[text]}.* not registered") as caught:
        load_config(str(path))
    unknown = {"TRIDENT", "ASPP_CHANNELS", "TENSOR_MASK", "SparseRCNN", "DENSEPOSE_ON"}
    named = re.search(r"and the keys MODEL\.(.*) have no counterpart", str(caught.value))
    assert (named[1].split(".")[-1] if named else "") in {"", *unknown}
    assert bool(named) == any(f"{key}:" in text for key in unknown)


@pytest.mark.parametrize("key", UNKNOWN_PARTS)
def test_parts_that_are_not_registered(key: str) -> None:
    options = [f"MODEL.{key}", UNKNOWN_PARTS[key]]
    cfg = load_config("COCO-InstanceSegmentation/mask_rcnn_V_39_eSE_FPN_1x.yaml", options)
    with pytest.raises(ValueError, match=rf"MODEL\.{key} '.*' is not registered\. (Close|There)"):
        check_network(cfg)
    cfg.MODEL.MASK_ON = False
    cfg.MODEL.META_ARCHITECTURE = "RetinaNet"
    if key not in ("META_ARCHITECTURE", "BACKBONE.NAME"):  # RetinaNet has no other parts
        check_network(cfg)


def test_node_of_another_project_keeps_its_values() -> None:
    cfg = get_cfg()
    cfg.MODEL.VOVNET = CfgNode({"CONV_BODY": "V-19-slim-eSE", "NORM": "GN", "OUT_CHANNELS": 128})
    cfg.MODEL.FCOS = CfgNode({"TOP_LEVELS": 1, "NUM_CLASSES": 20, "USE_SCALE": True})
    add_vovnet_config(cfg)
    assert (cfg.MODEL.VOVNET.CONV_BODY, cfg.MODEL.VOVNET.NORM) == ("V-19-slim-eSE", "GN")
    fcos = cfg.MODEL.FCOS
    assert (fcos.TOP_LEVELS, fcos.NUM_CLASSES, fcos.USE_SCALE) == (1, 20, True)
    assert cfg.MODEL.VOVNET.OUT_CHANNELS == 128


def test_digits_are_not_mirrored() -> None:
    for name in (name for name in ALL_FILES if "Digits" in name):
        if name.startswith("Classification"):
            assert load_config(name, add_config=add_pretraining_config).PRETRAIN.HFLIP == 0
        else:
            assert load_config(name).INPUT.RANDOM_FLIP == "none", name
