# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""DenseNet-40 and the OSA networks that the paper compares with it."""

import pytest
import torch
from torch import nn

from vovnet_d2.modeling.baselines.cifar import CIFAR_SPECS, CifarClassifier


@pytest.fixture(params=CIFAR_SPECS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def test_densenet_40_has_the_published_size() -> None:
    model = CifarClassifier("DenseNet-40")
    weighted = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(weighted) == 40
    # Table 2 of the DenseNet paper gives 1.0M. Public implementations have exactly this number.
    assert sum(p.numel() for p in model.parameters()) == 1_019_722
    assert not model.linear.bias.any()  # as in the code of DenseNet


def test_names_give_the_widths() -> None:
    for name, (layers, width) in {"OSA-12x20": (12, 20), "OSA-5x43": (5, 43)}.items():
        spec = CIFAR_SPECS[name]
        assert (spec.connections, spec.layers, spec.width) == ("osa", layers, width)


def test_connections(name: str) -> None:
    """Compute a block again: dense layers extend their input, and OSA joins outputs of a chain."""
    model = CifarClassifier(name).eval()
    block = model.block2
    x = torch.randn(2, block.layers[0].norm.num_features, 6, 6)
    with torch.no_grad():
        if CIFAR_SPECS[name].connections == "dense":
            expected = x
            for layer in block.layers:
                expected = torch.cat([expected, layer(expected)], dim=1)
        else:
            cuts = range(1, len(block.layers) + 1)
            expected = torch.cat([x, *(nn.Sequential(*block.layers[:n])(x) for n in cuts)], dim=1)
        torch.testing.assert_close(block(x), expected)
    assert expected.shape[1] == block.out_channels


@pytest.mark.parametrize("last_transition", [False, True])
def test_trains_every_parameter(name: str, last_transition: bool) -> None:
    model = CifarClassifier(name, in_channels=1, num_classes=7, last_transition=last_transition)
    logits = model(torch.randn(4, 1, 8, 8))["linear"]
    assert logits.shape == (4, 7)
    nn.functional.cross_entropy(logits, torch.arange(4)).backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


def test_transitions_keep_the_width_and_halve_the_map(name: str) -> None:
    model = CifarClassifier(name, last_transition=True).eval()
    seen = {}
    for part, module in model.named_children():
        module.register_forward_hook(
            lambda m, inputs, output, part=part: seen.update({part: output.shape[1:]})
        )
    model(torch.randn(1, 3, 32, 32))
    for number, size in ((1, 32), (2, 16), (3, 8)):
        shape = (getattr(model, f"block{number}").out_channels, size, size)
        assert seen[f"block{number}"] == seen[f"transition{number}"] == shape
    without = dict(CifarClassifier(name).named_children())
    assert set(dict(model.named_children())) - set(without) == {"transition3"}


def test_unknown_name() -> None:
    with pytest.raises(ValueError, match=r"'DenseNet-41'.*DenseNet-40, OSA-12x20, OSA-5x43"):
        CifarClassifier("DenseNet-41")
