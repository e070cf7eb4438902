# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Configs with heads that need feature maps which the backbone does not return."""

import pytest
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import SEM_SEG_HEADS_REGISTRY
from engine_runs import FASTER_RCNN, RETINANET
from torch import nn

from vovnet_d2.engine import Trainer, load_config
from vovnet_d2.engine.anchors import read_anchors
from vovnet_d2.engine.any_config import build_network
from vovnet_d2.engine.in_features import _NODES, _SEMANTIC, build_explained

# The feature maps are thin, because only their names matter.
THIN = ["MODEL.WEIGHTS", "", "MODEL.DEVICE", "cpu", "MODEL.FPN.OUT_CHANNELS", "32"]
# The other meta-architectures are built from the config of Faster R-CNN.
FILES = {"RetinaNet": RETINANET}
CASES = [(name, node, "['res4']") for name, nodes in _NODES.items() for node in nodes]
# Detectron2's semantic head leaves out names that it does not find, if it finds another.
CASES += [(n, "SEM_SEG_HEAD", found) for n in _SEMANTIC for found in ("['res4']", "['p3', 'res4']")]


@pytest.mark.parametrize(("architecture", "node", "names"), CASES)
def test_the_message_names_the_key_and_the_feature_maps(
    architecture: str, node: str, names: str
) -> None:
    file, key = FILES.get(architecture, FASTER_RCNN), f"MODEL.{node}.IN_FEATURES"
    cfg = load_config(file, [*THIN, "MODEL.META_ARCHITECTURE", architecture, key, names])
    returned = ", ".join(cfg.MODEL.FPN.IN_FEATURES).replace("stage", "p")
    message = rf"{cfg.MODEL.BACKBONE.NAME} returns no .*'res4', which is in {key}\. .* {returned}"
    with pytest.raises(KeyError, match=message):
        build_network(cfg, cfg)
    with pytest.raises(KeyError, match=message):
        Trainer.build_model(cfg)
    with pytest.raises(KeyError, match=message):
        read_anchors(cfg)


@pytest.mark.parametrize("architecture", _SEMANTIC)
def test_a_semantic_head_of_the_user_takes_what_it_likes(
    architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Build a head that has no use for ``IN_FEATURES``, then a head that raises an error."""

    def build_head(cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> nn.Module:
        if cfg.MODEL.SEM_SEG_HEAD.NORM == "wrong":
            raise ValueError("The norm is wrong.")
        return nn.Conv2d([*input_shape.values()][-1].channels, 3, 1)

    monkeypatch.setitem(SEM_SEG_HEADS_REGISTRY._obj_map, "Mine", build_head)
    names = ["MODEL.META_ARCHITECTURE", architecture, "MODEL.SEM_SEG_HEAD.NAME", "Mine"]
    names += ["MODEL.SEM_SEG_HEAD.IN_FEATURES", "['res4']"]
    if architecture == "SemanticSegmentor":
        names += ["MODEL.BACKBONE.NAME", "build_vovnet_backbone"]
    cfg = load_config(FASTER_RCNN, [*THIN, *names])
    assert type(build_explained(cfg).sem_seg_head) is nn.Conv2d
    cfg.MODEL.SEM_SEG_HEAD.NORM = "wrong"
    with pytest.raises(ValueError, match=r"^The norm is wrong\.$"):
        build_explained(cfg)


def test_other_key_errors_do_not_change() -> None:
    def build(_: CfgNode) -> nn.Module:
        raise KeyError("something")

    with pytest.raises(KeyError, match=r"^'something'$"):
        build_explained(load_config(FASTER_RCNN, THIN), build)
