# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""FCOS from a config is compared with Detectron2's FCOS, built by hand and from its own config."""

import copy
import inspect

import pytest
import torch
from detectron2 import model_zoo
from detectron2.config import CfgNode, LazyConfig, get_cfg
from detectron2.modeling import META_ARCH_REGISTRY, build_backbone, build_model
from detectron2.modeling.meta_arch import fcos
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from devices import shapes_alone
from module_facts import differences
from omegaconf import OmegaConf

from vovnet_d2 import add_vovnet_config, get_config_file
from vovnet_d2.engine import load_config
from vovnet_d2.modeling.fcos import FCOS

CONFIG = "COCO-Detection/fcos_V_39_eSE_FPN_1x.yaml"


def thin_config(**changes: object) -> CfgNode:
    options = ["MODEL.DEVICE", "cpu", "MODEL.VOVNET.CONV_BODY", "V-19-slim-eSE"]
    options += ["MODEL.VOVNET.NORM", "BN", "MODEL.FPN.OUT_CHANNELS", "32"]
    cfg = load_config(CONFIG, options)
    cfg.MODEL.FCOS.update(changes)
    return cfg


def assemble(cfg: CfgNode, **arguments: object) -> fcos.FCOS:
    """Build Detectron2's FCOS without a config."""
    backbone = build_backbone(cfg)
    names = ["p3", "p4", "p5", "p6", "p7"]
    head = fcos.FCOSHead(
        input_shape=[backbone.output_shape()[name] for name in names],
        num_classes=arguments["num_classes"],
        conv_dims=[32] * arguments.pop("num_convs"),
        norm="GN",
    )
    return fcos.FCOS(
        backbone=backbone,
        head=head,
        head_in_features=names,
        pixel_mean=cfg.MODEL.PIXEL_MEAN,
        pixel_std=cfg.MODEL.PIXEL_STD,
        **arguments,
    )


def make_it_detect(model: FCOS) -> None:
    """Make an untrained head detect objects. Its scores would be equal and low, and boxes empty."""
    torch.nn.init.normal_(model.head.cls_score.weight, std=0.2)
    torch.nn.init.constant_(model.head.bbox_pred.bias, 1.0)


def sample() -> dict[str, object]:
    instances = Instances((128, 160))
    instances.gt_boxes = Boxes([[8.0, 16.0, 72.0, 80.0], [40.0, 8.0, 150.0, 120.0]])
    instances.gt_classes = torch.tensor([3, 6])
    return {"image": torch.randint(0, 256, (3, 128, 160)), "instances": instances}


# Each value differs from the default.
KEYS = {
    "NUM_CLASSES": 7,
    "NUM_CONVS": 2,
    "POS_RADIUS": 0.7,
    "LOSS_ALPHA": 0.4,
    "LOSS_GAMMA": 1.5,
    "INFERENCE_TH_TEST": 0.05,
    "PRE_NMS_TOPK_TEST": 30,
    "NMS_TH": 0.5,
}
ARGUMENTS = {
    "num_classes": 7,
    "num_convs": 2,
    "center_sampling_radius": 0.7,
    "focal_loss_alpha": 0.4,
    "focal_loss_gamma": 1.5,
    "test_score_thresh": 0.05,
    "test_topk_candidates": 30,
    "test_nms_thresh": 0.5,
    "max_detections_per_image": 3,
}


def test_defaults_equal_those_of_detectron2() -> None:
    theirs = inspect.signature(fcos.FCOS.__init__).parameters
    node = load_config().MODEL.FCOS
    for key, name in {
        "POS_RADIUS": "center_sampling_radius",
        "LOSS_ALPHA": "focal_loss_alpha",
        "LOSS_GAMMA": "focal_loss_gamma",
        "INFERENCE_TH_TEST": "test_score_thresh",
        "PRE_NMS_TOPK_TEST": "test_topk_candidates",
        "NMS_TH": "test_nms_thresh",
    }.items():
        assert node[key] == theirs[name].default, key


def test_every_key_changes_its_default() -> None:
    defaults = load_config().MODEL.FCOS
    others = {"TOP_LEVELS", "IN_FEATURES", "NORM", "PRIOR_PROB"}  # tested below
    others |= {"ASSIGNMENT", "LOSSES", "REG_MAX"}  # test_gfl.py tests these
    assert KEYS.keys() | others == defaults.keys()
    assert all(defaults[key] != value for key, value in KEYS.items())


@pytest.mark.parametrize("defaults", [True, False])
def test_results_equal_those_of_detectron2(defaults: bool) -> None:
    if defaults:
        cfg = thin_config()
        peer = assemble(cfg, num_classes=80, num_convs=4)
    else:
        cfg = thin_config(**KEYS)
        cfg.TEST.DETECTIONS_PER_IMAGE = 3
        peer = assemble(cfg, **ARGUMENTS)
    model = build_model(cfg)
    peer.load_state_dict(model.state_dict())
    inputs = [sample()]
    with EventStorage():
        losses, expected = model(copy.deepcopy(inputs)), peer(copy.deepcopy(inputs))
    assert losses == expected
    sum(losses.values()).backward()
    sum(expected.values()).backward()
    for ours, theirs in zip(model.parameters(), peer.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)

    make_it_detect(model)
    peer.load_state_dict(model.state_dict())
    with torch.no_grad():
        found, wanted = model.eval()(inputs)[0]["instances"], peer.eval()(inputs)[0]["instances"]
    assert len(found) == len(wanted)
    assert 3 < len(found) <= 100 if defaults else len(found) == 3
    assert torch.equal(found.pred_boxes.tensor, wanted.pred_boxes.tensor)
    assert torch.equal(found.scores, wanted.scores)
    assert torch.equal(found.pred_classes, wanted.pred_classes)


def test_boxes_are_float32_in_mixed_precision() -> None:
    """Compare with float32, because bfloat16 cannot represent all whole numbers above 256."""
    model = build_model(thin_config()).eval()
    make_it_detect(model)
    inputs = [sample()]
    with torch.no_grad():
        exact = model(inputs)[0]["instances"].pred_boxes.tensor
        with torch.autocast("cpu", torch.bfloat16):
            boxes = model(inputs)[0]["instances"].pred_boxes.tensor
    assert boxes.dtype == exact.dtype == torch.float32
    nearest = (boxes[:, None] - exact).abs().amax(dim=2).amin(dim=1)
    assert nearest.median() < 0.25


def test_config_equals_that_of_detectron2_except_for_the_backbone() -> None:
    """Compare model, schedule, batch and data with Detectron2's LazyConfig."""
    cfg = load_config(CONFIG, ["MODEL.DEVICE", "meta"])
    theirs = LazyConfig.load(model_zoo.get_config_file("COCO-Detection/fcos_R_50_FPN_1x.py"))
    with shapes_alone():
        model = build_model(cfg)
        arguments = OmegaConf.to_container(theirs.model, structured_config_mode="instantiate")
        arguments = {k: v for k, v in arguments.items() if k not in ("_target_", "backbone")}
        head = arguments.pop("head")
        head = fcos.FCOSHead(
            **{
                k: v for k, v in head.items() if k not in ("_target_", "num_classes", "input_shape")
            },
            num_classes=80,
            input_shape=list(model.backbone.output_shape().values()),
        )
        peer = fcos.FCOS(backbone=build_backbone(cfg), head=head, **arguments)
    different = {name.split("[")[0] for name in differences(model, peer)}
    assert different <= {
        *("pixel_mean", "pixel_std"),  # these belong to the weights
        *("assignment", "learns_distributions"),  # Detectron2 does not have these
    }
    train = theirs.dataloader.train
    assert {
        "rate": cfg.SOLVER.BASE_LR,
        "iterations": cfg.SOLVER.MAX_ITER,
        "steps": list(cfg.SOLVER.STEPS),
        "batch": cfg.SOLVER.IMS_PER_BATCH,
        "data": list(cfg.DATASETS.TRAIN),
    } == {
        "rate": theirs.optimizer.lr,
        "iterations": theirs.train.max_iter,
        "steps": list(theirs.lr_multiplier.scheduler.milestones[:-1]),
        "batch": train.total_batch_size,
        "data": [train.dataset.names],
    }


def test_one_top_level_and_another_norm() -> None:
    cfg = thin_config(TOP_LEVELS=1, IN_FEATURES=["p3", "p4", "p5", "p6"], NORM="", PRIOR_PROB=0.2)
    model = build_model(cfg)
    assert model.head_in_features == ["p3", "p4", "p5", "p6"]
    assert not any(isinstance(m, torch.nn.GroupNorm) for m in model.head.modules())
    with torch.no_grad():  # a new head predicts the prior if there are no objects
        score = model.head.cls_score.bias.sigmoid()
    assert score.tolist() == pytest.approx([0.2] * 80)


def test_registration() -> None:
    assert META_ARCH_REGISTRY.get("FCOS") is FCOS
    cfg = get_cfg()
    add_vovnet_config(cfg)
    cfg.merge_from_file(get_config_file(CONFIG))
    cfg.MODEL.DEVICE = "meta"
    with shapes_alone():
        assert type(build_model(cfg)) is FCOS
