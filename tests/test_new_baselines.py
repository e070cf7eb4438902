# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""LazyConfigs of long trainings with large-scale jittering are compared with Detectron2's."""

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from detectron2 import model_zoo
from detectron2.config import LazyConfig
from detectron2.layers import FrozenBatchNorm2d, NaiveSyncBatchNorm
from devices import shapes_alone
from module_facts import differences
from omegaconf import DictConfig, OmegaConf
from test_lazyconfig import launch
from torch import nn

from vovnet_d2 import VOVNET_SPECS, get_config_file
from vovnet_d2.engine.lazy_config import instantiate, load_lazy_config, to_cfg

pytest_plugins = ["engine_fixtures"]

ROOT = Path(get_config_file("Base-VoVNet-COCO.yaml")).parent
FILES = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("lazy/new_baselines/*.py"))
FIRST = "lazy/new_baselines/mask_rcnn_V_39_eSE_FPN_100ep_LSJ.py"
NAME = re.compile(r".*_rcnn_(?P<variant>V_\d+_eSE)_FPN_(?P<epochs>\d+)ep_LSJ(?P<extra>\w*)\.py")
COCO_IMAGES = 118_000  # the number with which Detectron2 counts epochs


@cache
def peer(epochs: str) -> DictConfig:
    name = f"new_baselines/mask_rcnn_R_50_FPN_{epochs}ep_LSJ.py"
    return LazyConfig.load(model_zoo.get_config_file(name))


def build(config: DictConfig) -> nn.Module:
    with shapes_alone():
        return instantiate(config, "model")


def test_there_is_a_file_for_each_variant_and_length() -> None:
    matches = [NAME.fullmatch(name) for name in FILES]
    found = {(m["variant"], m["epochs"]) for m in matches if not m["extra"]}
    variants = ("V_39_eSE", "V_57_eSE", "V_99_eSE")
    assert found == {(v, e) for v in variants for e in ("100", "200", "400")}
    assert {m["extra"] for m in matches} == {"", "_copy_paste", "_giou"}
    for name in FILES:
        text = (ROOT / name).read_text().splitlines()
        assert text[2] == "# Weights: none, trained from scratch. Not measured on COCO."
        assert len(text) <= 8 or name == FIRST, "a config should be a small diff over its base"


@pytest.mark.parametrize("name", FILES)
def test_variant_norms_and_length(name: str) -> None:
    match, config = NAME.fullmatch(name), load_lazy_config(name)
    cfg, model = to_cfg(config), build(config)
    assert model.backbone.bottom_up.spec == VOVNET_SPECS[match["variant"].replace("_", "-")]
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d | FrozenBatchNorm2d)]
    assert all(type(norm) is NaiveSyncBatchNorm for norm in norms)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert cfg.MODEL.WEIGHTS == ""
    epochs = cfg.SOLVER.MAX_ITER * cfg.SOLVER.IMS_PER_BATCH / COCO_IMAGES
    assert epochs == pytest.approx(int(match["epochs"]), rel=1e-4)


@pytest.mark.parametrize("epochs", ["100", "200", "400"])
def test_equals_the_config_of_detectron2_except_for_the_backbone(epochs: str) -> None:
    config, theirs = load_lazy_config(FIRST.replace("100ep", f"{epochs}ep")), peer(epochs)
    ours, other = build(config), build(theirs)
    for part in ("roi_heads", "proposal_generator"):
        assert differences(getattr(ours, part), getattr(other, part)) == {}
    assert config.model.pixel_mean == theirs.model.pixel_mean
    assert config.model.pixel_std == theirs.model.pixel_std
    mappers = [instantiate(c, "dataloader.train.mapper") for c in (config, theirs)]
    assert differences(*mappers) == {}
    assert config.dataloader.train.total_batch_size == theirs.dataloader.train.total_batch_size
    assert config.train.amp.enabled == theirs.train.amp.enabled
    assert config.train.max_iter == theirs.train.max_iter
    for key in ("lr", "momentum", "weight_decay"):
        assert config.optimizer[key] == theirs.optimizer[key]
    schedules = [instantiate(c, "lr_multiplier") for c in (config, theirs)]
    for place in [0.0, 1e-4, 1e-3, 0.004, 0.5, 0.88, 0.9, 0.96, 0.97, 0.999]:
        assert schedules[0](place) == pytest.approx(schedules[1](place), rel=1e-9)


def without(config: DictConfig, *keys: str) -> Any:
    plain = OmegaConf.to_container(config)
    for key in keys:
        *parents, last = key.split(".")
        node = plain
        for parent in parents:
            node = node[parent]
        node.pop(last, None)
    return plain


def test_extras_differ_in_one_thing() -> None:
    first = load_lazy_config(FIRST)
    pasted = load_lazy_config(FIRST.replace(".py", "_copy_paste.py"))
    assert pasted.dataloader.train.copy_paste == to_cfg(pasted).INPUT.COPY_PASTE == 0.5
    key = "dataloader.train.copy_paste"
    assert without(pasted, key) == without(first, key)
    giou = load_lazy_config(FIRST.replace(".py", "_giou.py"))
    predictor = "model.roi_heads.box_predictor"
    keys = [f"{predictor}.box_reg_loss_type", f"{predictor}.loss_weight"]
    assert without(giou, *keys) == without(first, *keys)
    with shapes_alone():
        built = instantiate(giou, "model").roi_heads.box_predictor
    assert built.box_reg_loss_type == "giou"
    assert built.loss_weight == {"loss_box_reg": 10.0}


TINY = [
    *["model.backbone.bottom_up.spec=V-19-slim-eSE", "model.backbone.out_channels=16"],
    *["model.roi_heads.box_head.conv_dims=[8]", "model.roi_heads.box_head.fc_dims=[16]"],
    *["model.roi_heads.mask_head.conv_dims=[8,8]", "model.roi_heads.batch_size_per_image=16"],
    *["train.max_iter=3", "train.eval_period=0", "train.device=cpu", "train.seed=1"],
    *[
        "dataloader.train.num_workers=0",
        "dataloader.train.total_batch_size=2",
        "optimizer.lr=0.001",
    ],
    *["dataloader.train.mapper.augmentations.0.target_height=64"],
    *["dataloader.train.mapper.augmentations.0.target_width=64"],
    *["dataloader.train.mapper.augmentations.1.crop_size=[64,64]"],
    *["dataloader.test.num_workers=0", "dataloader.train.copy_paste=1.0"],
    "dataloader.test.mapper.augmentations.0.short_edge_length=64",
]


def test_a_training_on_crops_with_pasted_objects(coco: Path, tmp_path: Path) -> None:
    pytest.importorskip("shapely", reason="Detectron2 needs it to crop polygons")
    name = FIRST.replace(".py", "_copy_paste.py")
    launch(tmp_path, config=name, options=TINY)
    lines = map(json.loads, (tmp_path / "metrics.json").read_text().splitlines())
    losses = [line["total_loss"] for line in lines if "total_loss" in line]
    assert losses
    assert all(0 < loss < 100 for loss in losses)
