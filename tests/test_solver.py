# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""SOLVER.OPTIMIZER: which optimizer, and which parameters it decays."""

import pytest
import torch
from detectron2.modeling import build_model
from engine_runs import FASTER_RCNN, tiny_config
from torch import nn

from vovnet_d2.engine.solver import build_optimizer


def decay_of_each(optimizer, model) -> dict[str, float]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        names[id(parameter)]: group["weight_decay"]
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


def test_adamw_decays_weights_alone(tmp_path):
    """A weight has two dimensions or more; those of norms and biases have one."""
    cfg = tiny_config(
        FASTER_RCNN, tmp_path, "SOLVER.OPTIMIZER", "AdamW", "SOLVER.WEIGHT_DECAY", "0.05"
    )
    model = build_model(cfg)
    optimizer = build_optimizer(cfg, model)
    assert isinstance(optimizer, torch.optim.AdamW)
    expected = {name: 0.05 if p.dim() > 1 else 0.0 for name, p in model.named_parameters()}
    assert decay_of_each(optimizer, model) == expected
    assert {group["lr"] for group in optimizer.param_groups} == {cfg.SOLVER.BASE_LR}


def test_a_step_is_the_one_of_the_paper(tmp_path):
    """Compare with Algorithm 2 of arXiv 1711.05101, whose first moments are the gradient."""
    cfg = tiny_config(FASTER_RCNN, tmp_path, "SOLVER.OPTIMIZER", "AdamW")
    cfg.SOLVER.BASE_LR, cfg.SOLVER.WEIGHT_DECAY = 0.01, 0.1
    model = nn.Linear(3, 2).double()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = build_optimizer(cfg, model)
    model(torch.ones(4, 3, dtype=torch.float64)).square().sum().backward()
    optimizer.step()
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        decay = 0.1 if name == "weight" else 0.0
        expected = before[name] * (1 - 0.01 * decay)
        expected -= 0.01 * gradient / (gradient.abs() + 1e-8)
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
def test_what_the_config_says_of_norms_and_biases_holds(optimizer, tmp_path):
    words = ["SOLVER.WEIGHT_DECAY_NORM", "0.3", "SOLVER.WEIGHT_DECAY_BIAS", "0.2"]
    cfg = tiny_config(FASTER_RCNN, tmp_path, "SOLVER.OPTIMIZER", optimizer, *words)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    decays = decay_of_each(build_optimizer(cfg, model), model)
    weight = cfg.SOLVER.WEIGHT_DECAY
    assert decays == {"0.weight": weight, "0.bias": 0.2, "1.weight": 0.3, "1.bias": 0.2}


def test_gradients_are_clipped(tmp_path):
    words = ["SOLVER.OPTIMIZER", "AdamW", "SOLVER.CLIP_GRADIENTS.ENABLED", "True"]
    words += ["SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "norm", "SOLVER.CLIP_GRADIENTS.CLIP_VALUE", "1.0"]
    cfg = tiny_config(FASTER_RCNN, tmp_path, *words)
    model = nn.Linear(1, 1, bias=False)
    optimizer = build_optimizer(cfg, model)
    model.weight.grad = torch.tensor([[50.0]])
    optimizer.step()
    assert model.weight.grad.item() == pytest.approx(1.0, rel=1e-5)


def test_an_unknown_name_is_told_with_the_choices(tmp_path):
    cfg = tiny_config(FASTER_RCNN, tmp_path, "SOLVER.OPTIMIZER", "adam")
    with pytest.raises(ValueError, match=r"SOLVER\.OPTIMIZER is 'adam': choose from SGD, AdamW\."):
        build_optimizer(cfg, nn.Linear(1, 1))
