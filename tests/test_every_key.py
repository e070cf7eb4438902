# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Every config key of this package has an effect: another value changes what is built."""

from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_backbone, build_model
from omegaconf import OmegaConf
from test_single_shot_models import tiny_config
from torch import nn

from vovnet_d2.data.digit_images import load_sources
from vovnet_d2.data.digits import digit_split
from vovnet_d2.engine import load_config
from vovnet_d2.engine.classifier import ClassifierTrainer
from vovnet_d2.engine.lazy_config import load_lazy_config, to_cfg
from vovnet_d2.engine.pretrain import add_pretraining_config
from vovnet_d2.modeling import build

PLAIN = (bool, int, float, str, type(None), torch.dtype)


def facts(value: Any, place: str = "", seen: tuple[int, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Yield all values inside an object with their paths.

    A tensor is described by its shape, its strides and its sum."""
    if isinstance(value, PLAIN):
        yield place, value
    elif isinstance(value, torch.Tensor):
        yield (
            place,
            (tuple(value.shape), value.stride(), value.requires_grad, float(value.double().sum())),
        )
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from facts(inner, f"{place}.{key}", seen)
    elif isinstance(value, list | tuple | set):
        for index, inner in enumerate(value):
            yield from facts(inner, f"{place}.{index}", seen)
    elif isinstance(value, partial):
        yield from facts((value.func.__name__, value.args, value.keywords), place, seen)
    elif id(value) not in seen:
        yield place, type(value).__qualname__
        yield from facts(getattr(value, "__dict__", {}), place, (*seen, id(value)))


def expect_to_be_read(
    cfg: CfgNode, changes: Mapping[str, Any], make: Callable[[CfgNode], Any]
) -> None:
    """Fail if another value of a key changes nothing.

    Args:
        changes: maps a key to another value, or to a dict with this value and with other keys to
            set first.
        make: builds the object that the keys are for from a config.
    """

    def made(options: Mapping[str, Any]) -> dict[str, Any]:
        torch.manual_seed(0)
        changed = cfg.clone()
        changed.merge_from_list([word for pair in options.items() for word in pair])
        return dict(facts(make(changed)))

    usual = made({})
    assert made({}) == usual, "two builds from one config differ"
    for key, value in changes.items():
        options = value if isinstance(value, dict) else {key: value}
        before = {other: setting for other, setting in options.items() if other != key}
        assert made(options) != (made(before) if before else usual), f"{key} has no effect"


def keys_of(node: CfgNode, prefix: str) -> set[str]:
    return {f"{prefix}.{key}" for key in node}


SINGLE_SHOT = {
    "MODEL.SINGLE_SHOT.NUM_CLASSES": 4,
    "MODEL.SINGLE_SHOT.NORM": "FrozenBN",
    "MODEL.SINGLE_SHOT.NORM_MOMENTUM": 0.2,
    "MODEL.SINGLE_SHOT.IOU_THRESHOLDS": [0.3, 0.6],
    "MODEL.SINGLE_SHOT.NEGATIVE_RATIO": 2.0,
    "MODEL.SINGLE_SHOT.BBOX_REG_WEIGHTS": (1.0, 2.0, 3.0, 4.0),
    "MODEL.SINGLE_SHOT.SCORE_THRESH_TEST": 0.3,
    "MODEL.SINGLE_SHOT.TOPK_CANDIDATES_TEST": 7,
    "MODEL.SINGLE_SHOT.NMS_THRESH_TEST": 0.2,
    "TEST.DETECTIONS_PER_IMAGE": 3,
    "MODEL.PIXEL_MEAN": [1.0, 2.0, 3.0],
    "MODEL.PIXEL_STD": [1.0, 2.0, 3.0],
}
SSD_EXTRAS = {"MODEL.SINGLE_SHOT.EXTRA_TYPE": "ssd"}
SSD = {
    "MODEL.SINGLE_SHOT.EXTRA_CHANNELS": [16, 16, 32],
    "MODEL.SINGLE_SHOT.EXTRA_TYPE": "ssd",
    "MODEL.SINGLE_SHOT.EXTRA_STRIDES": {
        **SSD_EXTRAS,
        "MODEL.SINGLE_SHOT.EXTRA_STRIDES": [2, 2, 1],
    },
    "MODEL.SINGLE_SHOT.EXTRA_REDUCED_CHANNELS": {
        **SSD_EXTRAS,
        "MODEL.SINGLE_SHOT.EXTRA_REDUCED_CHANNELS": [4, 4, 4],
    },
    "MODEL.SINGLE_SHOT.ANCHOR_STEPS": [8, 16, 32, 64, 100, 200],
    "MODEL.SINGLE_SHOT.L2_NORM_SCALE": 3.0,
    "MODEL.SINGLE_SHOT.BLOCK_CHANNELS": [16, 4],
    "MODEL.SINGLE_SHOT.PREDICTOR_KERNEL": 1,
    "MODEL.SINGLE_SHOT.PREDICTOR_NORM": "",
}
REFINEDET = {
    "MODEL.REFINEDET.ARM_IOU_THRESHOLDS": [0.3, 0.6],
    "MODEL.REFINEDET.OBJECTNESS_THRESHOLD": 0.2,
    "MODEL.REFINEDET.EXTRA_CHANNELS": 32,
    "MODEL.REFINEDET.TCB_CHANNELS": 8,
    "MODEL.REFINEDET.HEAD_CHANNELS": 16,
}


@pytest.mark.parametrize(("kind", "own"), [("dsod", SSD), ("refinedet", REFINEDET)])
def test_single_shot_detectors(kind: str, own: dict[str, Any]) -> None:
    cfg = tiny_config(kind)
    known = keys_of(cfg.MODEL.SINGLE_SHOT, "MODEL.SINGLE_SHOT")
    known |= keys_of(cfg.MODEL.REFINEDET, "MODEL.REFINEDET")
    # Feature maps that contradict other keys are an error; test_single_shot_models.py tests it.
    assert known - {*SINGLE_SHOT, *SSD, *REFINEDET} == {"MODEL.SINGLE_SHOT.IN_FEATURES"}
    expect_to_be_read(cfg, SINGLE_SHOT | own, build_model)


DEFORMABLE = {"MODEL.VOVNET.STAGE_WITH_DCN": (False, False, False, True)}
VOVNET = {
    "MODEL.VOVNET.OUT_FEATURES": ["stage2", "stage3", "stage4", "stage5"],
    "MODEL.VOVNET.NORM": "GN",
    **DEFORMABLE,
    "MODEL.VOVNET.WITH_MODULATED_DCN": {**DEFORMABLE, "MODEL.VOVNET.WITH_MODULATED_DCN": True},
    "MODEL.VOVNET.DEFORMABLE_GROUPS": {**DEFORMABLE, "MODEL.VOVNET.DEFORMABLE_GROUPS": 2},
    "MODEL.VOVNET.STAGE5_DILATION": {
        "MODEL.FPN.IN_FEATURES": ["stage3", "stage4"],
        "MODEL.VOVNET.STAGE5_DILATION": 2,
    },
    "MODEL.VOVNET.CHECKPOINT_BLOCKS": True,
    "MODEL.VOVNET.TOP_BLOCK_IN_FEATURE": "p5",
    "MODEL.BACKBONE.FREEZE_AT": 2,
    "MODEL.FPN.IN_FEATURES": ["stage4", "stage5"],
    "MODEL.FPN.OUT_CHANNELS": 8,
    "MODEL.FPN.NORM": "BN",
    "MODEL.FPN.FUSE_TYPE": "avg",
}


def test_vovnet_with_fpn() -> None:
    options = ["MODEL.VOVNET.CONV_BODY", "V-19-slim-eSE", "MODEL.VOVNET.NORM", "BN"]
    options += ["MODEL.VOVNET.STAGE_MID_CHANNELS", "(8, 8, 8, 8)", "MODEL.FPN.OUT_CHANNELS", "16"]
    options += ["MODEL.VOVNET.STAGE_OUT_CHANNELS", "(8, 8, 8, 16)", "MODEL.DEVICE", "cpu"]
    cfg = load_config("COCO-Detection/retinanet_V_39_eSE_FPN_1x.yaml", options)
    known = keys_of(cfg.MODEL.VOVNET, "MODEL.VOVNET")
    read_by_nothing = {"MODEL.VOVNET.OUT_CHANNELS", "MODEL.VOVNET.BACKBONE_OUT_CHANNELS"}
    # test_build.py tests the fields of the spec.
    fields = {key for key in known if cfg.MODEL.VOVNET[key.rpartition(".")[2]] is None}
    fields |= {"MODEL.VOVNET.CONV_BODY"} | {k for k in known if k.endswith(("_MID_CHANNELS",))}
    fields |= {"MODEL.VOVNET.STAGE_OUT_CHANNELS", "MODEL.VOVNET.ESE"}
    assert known - fields - {*VOVNET} == read_by_nothing
    expect_to_be_read(cfg, VOVNET, build_backbone)


PEERS: dict[str, tuple[str, dict[str, Any]]] = {
    "TIMM": (
        "build_retinanet_timm_fpn_backbone",
        {
            "MODEL.TIMM.NAME": "resnet18",
            "MODEL.TIMM.OUT_FEATURES": ["stage4", "stage5"],
            "MODEL.TIMM.NORM": "FrozenBN",
            "MODEL.TIMM.PRETRAINED": True,
            "MODEL.TIMM.TOP_BLOCK_IN_FEATURE": "p5",
            "MODEL.TIMM.ARGUMENTS.drop_path_rate": 0.1,
            "MODEL.BACKBONE.FREEZE_AT": 1,
        },
    ),
    "TORCHVISION": (
        "build_torchvision_backbone",
        {
            "MODEL.TORCHVISION.NAME": "resnet18",
            "MODEL.TORCHVISION.NODES": ["layer4"],
            "MODEL.TORCHVISION.NORM": "FrozenBN",
            "MODEL.TORCHVISION.PRETRAINED": True,
            "MODEL.BACKBONE.FREEZE_AT": 1,
        },
    ),
    "DENSENET67": ("build_densenet67_backbone", {"MODEL.DENSENET67.NORM": "FrozenBN"}),
    "PELEENET": (
        "build_peleenet_backbone",
        {
            "MODEL.PELEENET.NORM": "FrozenBN",
            "MODEL.PELEENET.OUT_FEATURES": ["stage5"],
            "MODEL.BACKBONE.FREEZE_AT": 1,
        },
    ),
}


@pytest.mark.parametrize("node", PEERS)
def test_networks_to_compare_with(node: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check the arguments of the adapters. test_baselines.py tests the effects of arguments."""

    class Given(nn.Module):
        def __init__(self, *arguments: Any, **named: Any):
            super().__init__()
            self.given = arguments, named

        def output_shape(self) -> dict[str, ShapeSpec]:
            strides = {f"stage{number}": 2**number for number in (3, 4, 5)}
            return {k: ShapeSpec(channels=8, stride=stride) for k, stride in strides.items()}

    for adapter in ("TimmBackbone", "TorchvisionBackbone", "DenseNet67", "PeleeNet"):
        monkeypatch.setattr(build, adapter, Given)
    monkeypatch.setattr(
        build,
        "attach_fpn",
        lambda bottom_up, top_block, **_: nn.ModuleList([bottom_up, top_block]),
    )
    builder, changes = PEERS[node]
    cfg = load_config()
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    cfg.MODEL.TIMM.ARGUMENTS.drop_path_rate = 0.0
    known = keys_of(cfg.MODEL[node], f"MODEL.{node}")
    assert known == {k.removesuffix(".drop_path_rate") for k in changes if f".{node}." in k}
    make = getattr(build, builder)
    expect_to_be_read(cfg, changes, lambda changed: make(changed, ShapeSpec(channels=3)))
    if node != "TORCHVISION":  # these networks always have three
        given = [dict(facts(make(cfg, ShapeSpec(channels=number)))) for number in (3, 4)]
        assert given[0] != given[1]


PRETRAIN = {
    "PRETRAIN.NUM_CLASSES": 7,
    "PRETRAIN.NETWORK": "VoVNet",
    "PRETRAIN.IMAGE_SIZE": 24,
    "PRETRAIN.CROP_PCT": 0.5,
    "PRETRAIN.SCALE": (0.5, 0.6),
    "PRETRAIN.RATIO": (0.5, 0.6),
    "PRETRAIN.HFLIP": 0.25,
    "PRETRAIN.COLOR_JITTER": 0.2,
    "PRETRAIN.AUTO_AUGMENT": "rand-m9-mstd0.5",
    "PRETRAIN.RE_PROB": 0.25,
    "PRETRAIN.MIXUP": 0.3,
    "PRETRAIN.CUTMIX": 0.3,
    "PRETRAIN.LABEL_SMOOTHING": 0.3,
    "PRETRAIN.OPTIMIZER": "adamw",
    "INPUT.FORMAT": "RGB",
    "MODEL.PIXEL_MEAN": [1.0, 2.0, 3.0],
    "MODEL.PIXEL_STD": [1.0, 2.0, 3.0],
    "MODEL.CHANNELS_LAST": False,
    "SOLVER.BASE_LR": 0.3,
    "SOLVER.WEIGHT_DECAY": 0.3,
    "SOLVER.MOMENTUM": 0.3,
    "SOLVER.CLIP_GRADIENTS.ENABLED": True,
    "SOLVER.IMS_PER_BATCH": 6,
    "DATALOADER.NUM_WORKERS": 1,
    "SEED": 7,
}


def classification_config() -> CfgNode:
    name = "Classification/Base-Classification.yaml"
    options = ["PRETRAIN.DATA", "digits", "PRETRAIN.NUM_CLASSES", "10", "MODEL.DEVICE", "cpu"]
    options += ["PRETRAIN.NETWORK", "OSA-5x43", "PRETRAIN.IMAGE_SIZE", "16", "SEED", "1"]
    options += ["SOLVER.IMS_PER_BATCH", "4", "DATALOADER.NUM_WORKERS", "0"]
    options += ["MODEL.VOVNET.CONV_BODY", "V-19-slim-eSE", "MODEL.CHANNELS_LAST", "True"]
    return load_config(name, options, add_config=add_pretraining_config)


def classification(cfg: CfgNode) -> dict[str, Any]:
    model = ClassifierTrainer.build_model(cfg)
    loaders = (
        ClassifierTrainer.build_train_loader(cfg),
        ClassifierTrainer.build_test_loader(cfg, "val"),
    )
    for loader in loaders:
        loader.dataset.images = loader.dataset.images[0].size
        loader.dataset.targets = []
    augmentations = [
        [cell.cell_contents for cell in getattr(a, "__closure__", None) or ()] or a
        for a in model.augmentations
    ]
    optimizer = ClassifierTrainer.build_optimizer(cfg, model)
    groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    return {
        "model": model,
        "augmentations": augmentations,
        "optimizer": (type(optimizer).__qualname__, groups),
        "loaders": loaders,
    }


def test_classification(monkeypatch: pytest.MonkeyPatch) -> None:
    # The digits are the same for all values, and reading them takes most of the time.
    monkeypatch.setattr("vovnet_d2.data.classification.load_sources", cache(load_sources))
    few = tuple(part[:20] for part in digit_split())
    monkeypatch.setattr("vovnet_d2.data.classification.digit_split", lambda: few)
    cfg = classification_config()
    assert keys_of(cfg.PRETRAIN, "PRETRAIN") - {*PRETRAIN} == {"PRETRAIN.DATA"}
    # Mixup smooths labels in another place than the loss.
    mixed = {"PRETRAIN.MIXUP": 0.5, "PRETRAIN.LABEL_SMOOTHING": 0.3}
    expect_to_be_read(cfg, PRETRAIN, classification)
    expect_to_be_read(cfg, {"PRETRAIN.LABEL_SMOOTHING": mixed}, classification)


@pytest.mark.parametrize("order", ["BGR", "RGB"])
def test_borders_are_filled_with_the_mean_colour_in_rgb(order: str) -> None:
    """Check networks of RGB and BGR, because augmentation always gets RGB images."""
    cfg = classification_config()
    cfg.PRETRAIN.AUTO_AUGMENT, cfg.INPUT.FORMAT = "rand-m9-mstd0.5", order
    rgb = [250.0, 120.0, 10.0]
    cfg.MODEL.PIXEL_MEAN = rgb if order == "RGB" else rgb[::-1]
    transform = ClassifierTrainer.build_train_loader(cfg).dataset.transform
    held = dict(facts(transform))
    found = {
        tuple(held[f"{place[:-1]}{channel}"] for channel in range(3))
        for place in held
        if place.endswith(".fillcolor.0")
    }
    assert found == {(250, 120, 10)}


TRAIN = {
    "output_dir": "elsewhere",
    "init_checkpoint": "weights.pth",
    "max_iter": 7,
    "seed": 7,
    "device": "cpu",
    "channels_last": False,
    "amp.enabled": True,
    "amp.dtype": "bfloat16",
    "compile.enabled": True,
    "compile.memory_budget": 0.5,
    "clip_gradients.enabled": True,
    "clip_gradients.clip_type": "value",
    "clip_gradients.clip_value": 7.0,
    "clip_gradients.norm_type": 1.0,
    "accumulate": 7,
    "ema": 0.5,
    "max_skipped_steps": 7,
    "checkpointer.period": 7,
    "checkpointer.max_to_keep": 7,
    "eval_period": 7,
    "patience": 7,
    "backend": "openvino",
    "int8": "dense.int8.onnx",
    "distillation.teacher": "teacher.yaml",
    "distillation.weights": "teacher.pth",
    "distillation.loss_weight": 7.0,
    "distillation.in_features": ["p3"],
    "loggers": ["wandb"],
}


def leaves(node: Any, prefix: str = "") -> Iterator[str]:
    for key in node:
        if OmegaConf.is_dict(node[key]):
            yield from leaves(node[key], f"{prefix}{key}.")
        else:
            yield prefix + key


def test_lazy_configs() -> None:
    name = "lazy/COCO-Detection/faster_rcnn_V_39_eSE_FPN_1x.py"
    usual = to_cfg(load_lazy_config(name))
    assert set(leaves(load_lazy_config(name).train)) == set(TRAIN)
    for key, value in TRAIN.items():
        config = load_lazy_config(name)
        OmegaConf.update(config, f"train.{key}", value)
        assert to_cfg(config) != usual, f"train.{key} has no effect"
