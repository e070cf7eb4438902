# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Tests of the page for users of PETR, StreamPETR and MMDetection."""

import re
import sys
import types
from pathlib import Path

import pytest
import torch
from devices import shapes_alone
from reference import TABLE, random_state, thin
from torch import nn

from vovnet_d2 import VOVNET_SPECS, VoVNet, VoVNetSpec

PAGE = (Path(__file__).parent.parent / "docs" / "mmdetection.md").read_text()
SNIPPET, CONFIG = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
NET = thin(TABLE["V-99-eSE"])


class Registry:
    """Stand-in for the registry of MMEngine.

    A decorator registers a class. A dict with the name and the arguments builds an object.
    """

    def __init__(self):
        self.classes: dict[str, type] = {}

    def register_module(self, name=None, force=False, module=None):
        def register(cls: type) -> type:
            if not force and (name or cls.__name__) in self.classes:
                raise KeyError(f"{name} is already registered")
            self.classes[name or cls.__name__] = cls
            return cls

        return register(module) if module is not None else register

    def build(self, cfg: dict) -> nn.Module:
        arguments = dict(cfg)
        return self.classes[arguments.pop("type")](**arguments)


@pytest.fixture
def build(monkeypatch):
    """Return a function that builds the backbone of the page's config, with changes."""
    registry = Registry()
    module = types.ModuleType("mmengine.registry")
    module.MODELS = registry
    monkeypatch.setitem(sys.modules, "mmengine", types.ModuleType("mmengine"))
    monkeypatch.setitem(sys.modules, "mmengine.registry", module)
    exec(SNIPPET, {})
    config: dict = {}
    exec(CONFIG, config)

    def build(**changes) -> nn.Module:
        return registry.build({**config["img_backbone"], **changes})

    return build


def test_the_snippet_is_short():
    assert len([line for line in SNIPPET.splitlines() if line.strip()]) <= 10


def test_the_config_builds_the_network(build):
    with shapes_alone():
        model = build()
    assert model.spec == VOVNET_SPECS["V-99-eSE"]
    assert model.norm_eval
    assert model.checkpoint_blocks
    assert all(p.requires_grad for p in model.parameters())


@torch.no_grad()
@pytest.mark.parametrize("prefix", ["img_backbone.", "module.img_backbone."])
def test_published_weights_load_from_the_whole_detector(build, prefix):
    """Load weights into a whole detector, as ``load_from`` does, and compare feature maps."""
    detector = nn.Module()
    detector.img_backbone = build(spec_name=VoVNetSpec(**vars(NET))).eval()
    state = {prefix + name: tensor for name, tensor in random_state(NET).items()}
    state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    detector.load_state_dict(state)
    peer = VoVNet(VoVNetSpec(**vars(NET)), norm="BN", out_features=["stage4", "stage5"]).eval()
    peer.load_state_dict(random_state(NET))
    x = torch.randn(2, 3, 64, 96)
    maps = detector.img_backbone(x)
    assert isinstance(maps, tuple)
    for ours, theirs in zip(maps, peer(x).values(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("frozen_stages", [-1, 0, 1, 4])
def test_frozen_stages_count_as_in_mmdetection(build, frozen_stages):
    model = build(spec_name=VoVNetSpec(**vars(NET)), frozen_stages=frozen_stages)
    stages = ["stem", "stage2", "stage3", "stage4", "stage5"]
    for name, parameter in model.named_parameters():
        frozen = stages.index(name.split(".")[0]) <= frozen_stages
        assert parameter.requires_grad == (not frozen), name


def test_the_channels_on_the_page():
    assert "768 and 1,024 channels" in PAGE
    assert "256 and 512 channels" in PAGE
    assert VOVNET_SPECS["V-99-eSE"].stage_out_channels == (256, 512, 768, 1024)
