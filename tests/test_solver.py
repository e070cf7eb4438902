# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Effects of SOLVER.OPTIMIZER, OPTIMIZER_ARGS and LAYER_DECAY on each parameter."""

import copy
from pathlib import Path
from typing import Any

import detectron2.solver
import pytest
import torch
from detectron2.modeling import build_model
from engine_runs import FASTER_RCNN, RETINANET, tiny_config
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from vovnet_d2.engine.agreed_steps import AgreedSteps, MixedPrecisionTrainer
from vovnet_d2.engine.lazy import LazyTrainer
from vovnet_d2.engine.lazy_config import load_lazy_config, to_cfg
from vovnet_d2.engine.solver import build_optimizer, list_optimizers, stage_lr_factor

ADAMW = ["SOLVER.OPTIMIZER", "AdamW", "SOLVER.WEIGHT_DECAY", "0.05"]


def setting_of_each(optimizer, model, key: str) -> dict[str, float]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        names[id(parameter)]: group[key]
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


def test_adamw_only_decays_weights(tmp_path):
    """Check that only parameters of two or more dimensions decay."""
    cfg = tiny_config(FASTER_RCNN, tmp_path, *ADAMW)
    model = build_model(cfg)
    optimizer = build_optimizer(cfg, model)
    assert isinstance(optimizer, torch.optim.AdamW)
    expected = {name: 0.05 if p.dim() > 1 else 0.0 for name, p in model.named_parameters()}
    assert setting_of_each(optimizer, model, "weight_decay") == expected
    assert {group["lr"] for group in optimizer.param_groups} == {cfg.SOLVER.BASE_LR}


def test_sgd_equals_that_of_detectron2(tmp_path):
    cfg = tiny_config(FASTER_RCNN, tmp_path, "SOLVER.NESTEROV", "True", "SOLVER.MOMENTUM", "0.8")
    model = build_model(cfg)
    optimizers = build_optimizer(cfg, model), detectron2.solver.build_optimizer(cfg, model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    ours, theirs = (
        [
            {**group, "params": [names[id(p)] for p in group["params"]]}
            for group in each.param_groups
        ]
        for each in optimizers
    )
    assert ours == theirs


@pytest.mark.parametrize(
    ("kind", "arguments", "fused"),
    [
        ("SGD", "[]", True),
        ("AdamW", "[]", True),
        ("SGD", "['foreach', True]", None),
        ("AdamW", "['fused', False]", False),
        ("NAdam", "[]", None),
    ],
)
def test_steps_are_fused_on_a_gpu(kind, arguments, fused, tmp_path):
    """Use fake tensors on a GPU."""
    words = ["SOLVER.OPTIMIZER", kind, "SOLVER.OPTIMIZER_ARGS", arguments]
    cfg = tiny_config(FASTER_RCNN, tmp_path, *words)
    model = nn.Module()
    with FakeTensorMode():
        model.weight = nn.Parameter(torch.empty(2, 3, device="cuda"))
        assert build_optimizer(cfg, model).defaults.get("fused") is fused
    assert not build_optimizer(cfg, nn.Linear(3, 2)).defaults.get("fused")


def test_a_step_equals_that_of_the_paper(tmp_path):
    """Compare with Algorithm 2 of arXiv 1711.05101. Its first moments equal the gradient."""
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
def test_decays_of_norms_and_biases_in_the_config(optimizer, tmp_path):
    words = ["SOLVER.WEIGHT_DECAY_NORM", "0.3", "SOLVER.WEIGHT_DECAY_BIAS", "0.2"]
    cfg = tiny_config(FASTER_RCNN, tmp_path, "SOLVER.OPTIMIZER", optimizer, *words)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    decays = setting_of_each(build_optimizer(cfg, model), model, "weight_decay")
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


# Resuming


def step_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    shape = (2, 3, 5, 7)
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    model(x).square().mean().backward()
    optimizer.step()


def resumed_weight(kind: str, saved_with: Any, options: dict[str, Any], layout: Any) -> Tensor:
    """Return the weight after three steps, before the last of which a checkpoint is loaded.

    Args:
        saved_with: the memory format of the first two steps.
        options: arguments of the optimizer of the first two steps.
        layout: the memory format of the last step, which is fused.
    """
    torch.manual_seed(0)
    first = nn.Conv2d(3, 4, (2, 3)).double().to(memory_format=saved_with)
    build = vars(torch.optim)[kind]
    arguments = {"lr": 0.1, **({"momentum": 0.9} if kind == "SGD" else {})}
    optimizer = build(first.parameters(), **arguments, **options)
    for _ in range(2):
        step_of(first, optimizer)
    model = nn.Conv2d(3, 4, (2, 3)).double().to(memory_format=layout)
    model.load_state_dict(first.state_dict())
    trainer = AgreedSteps(model, [], build(model.parameters(), **arguments, fused=True))
    state = copy.deepcopy(optimizer.state_dict())
    trainer.load_state_dict({"iteration": 1, "optimizer": state})
    assert trainer.iter == 1
    assert trainer.optimizer.param_groups[0]["fused"]
    assert not trainer.optimizer.param_groups[0]["foreach"]
    step_of(model, trainer.optimizer)
    return model.weight.detach()


@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}])
@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
def test_a_resumed_training_may_have_another_memory_format(kind, options):
    """Resume in another memory format. The fused step on a CPU ignores strides."""
    first, last = torch.contiguous_format, torch.channels_last
    expected = resumed_weight(kind, first, options, first)
    for layouts in ((first, last), (last, first), (last, last)):
        found = resumed_weight(kind, layouts[0], options, layouts[1])
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_a_float16_training_resumes_without_fused_steps_and_with_them():
    """Resume between fused and other steps, which the scaler of losses reads from the optimizer."""
    weights = []
    for fused in (None, True):
        layer = nn.Linear(1, 1, bias=False)
        nn.init.ones_(layer.weight)
        saved = torch.optim.SGD(layer.parameters(), lr=0.25, foreach=True).state_dict()
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.5, fused=fused)
        options = {"device": torch.device("cpu"), "dtype": torch.float16}
        trainer = MixedPrecisionTrainer(layer, [], optimizer, **options)
        trainer.load_state_dict({"iteration": 1, "optimizer": saved})
        trainer.backward(layer(torch.ones(1, 1)).sum())
        trainer.update()
        weights.append(layer.weight.item())
    assert weights == [1.0 - 0.25] * 2  # with the learning rate of the checkpoint


def test_a_checkpoint_of_other_groups_is_refused():
    layer = nn.Linear(1, 1)
    trainer = AgreedSteps(layer, [], torch.optim.SGD(layer.parameters(), lr=1.0))
    groups = [{"params": [parameter]} for parameter in layer.parameters()]
    saved = torch.optim.SGD(groups, lr=1.0).state_dict()
    with pytest.raises(ValueError, match="different number of parameter groups"):
        trainer.load_state_dict({"iteration": 1, "optimizer": saved})


# Any optimizer of torch


@pytest.mark.parametrize("name", list_optimizers())
def test_every_optimizer_of_torch_makes_a_step(name, tmp_path):
    """Compare a step with that of torch's optimizer with the same arguments."""
    cfg = tiny_config(FASTER_RCNN, tmp_path, "SOLVER.OPTIMIZER", name)
    cfg.SOLVER.BASE_LR, cfg.SOLVER.WEIGHT_DECAY, cfg.SOLVER.MOMENTUM = 0.01, 0.1, 0.0
    weights = []
    for build in (
        lambda model: build_optimizer(cfg, model),
        lambda model: vars(torch.optim)[name](model.parameters(), lr=0.01, weight_decay=0.1),
    ):
        model = nn.Linear(3, 2, bias=False)
        nn.init.constant_(model.weight, 0.5)
        optimizer = build(model)
        for _ in range(2):
            optimizer.zero_grad()
            model(torch.tensor([[1.0, 2.0, 3.0]])).square().sum().backward()
            optimizer.step()
        weights.append(model.weight.detach())
    assert not torch.equal(weights[0], torch.full((2, 3), 0.5))
    torch.testing.assert_close(*weights, rtol=1e-6, atol=0)


def test_arguments_reach_the_optimizer(tmp_path):
    words = ["SOLVER.OPTIMIZER_ARGS", "['betas', (0.8, 0.7), 'eps', 0.5]"]
    cfg = tiny_config(FASTER_RCNN, tmp_path, *ADAMW, *words)
    (group,) = build_optimizer(cfg, nn.Linear(1, 1, bias=False)).param_groups
    assert (tuple(group["betas"]), group["eps"]) == ((0.8, 0.7), 0.5)
    # PyYAML reads this number as text.
    (tmp_path / "a.yaml").write_text("SOLVER: {OPTIMIZER_ARGS: [eps, 1e-6]}")
    cfg.merge_from_file(tmp_path / "a.yaml")
    (group,) = build_optimizer(cfg, nn.Linear(1, 1, bias=False)).param_groups
    assert group["eps"] == 1e-6


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("adamw", [], r"OPTIMIZER is 'adamw': choose one of torch\.optim's, which are .*AdamW"),
        ("LBFGS", [], r"OPTIMIZER is 'LBFGS': choose one of torch\.optim's"),
        ("AdamW", ["beta", 1], r"OPTIMIZER_ARGS has 'beta': choose from amsgrad, betas, "),
        ("AdamW", ["lr", 1], r"OPTIMIZER_ARGS has 'lr': .* learning rate is SOLVER\.BASE_LR"),
        ("AdamW", ["betas"], r"OPTIMIZER_ARGS is \['betas'\]: give pairs of a name and a value"),
        ("AdamW", ["eps", -1.0], r"optim\.AdamW .* cannot be used with .*'eps': -1\.0\}: Invalid"),
    ],
)
def test_unknown_optimizers_and_arguments(name, arguments, message, tmp_path):
    cfg = tiny_config(FASTER_RCNN, tmp_path, "SOLVER.OPTIMIZER", name)
    cfg.SOLVER.OPTIMIZER_ARGS = arguments
    with pytest.raises(ValueError, match=message):
        build_optimizer(cfg, nn.Linear(1, 1))


# Layer-wise decay of the learning rate


def expected_rates(model: nn.Module, base: float, decay: float) -> dict[str, float]:
    """Return the expected learning rates by module, from the last layers to the first."""
    rates = {name: base for name, p in model.named_parameters() if p.requires_grad}
    net = model.backbone.bottom_up
    named = {id(parameter): name for name, parameter in model.named_parameters()}
    rate = base
    for part in (net.stage5, net.stage4, net.stage3, net.stage2, net.stem):
        rate *= decay
        rates |= {named[id(p)]: rate for p in part.parameters() if p.requires_grad}
    return rates


def test_frozen_parameters_that_a_model_treats_differently_stay_frozen(tmp_path):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    biases = [layer.bias for layer in model]
    model.solver_overrides = lambda: [{"params": biases, "lr_factor": 2.0, "weight_decay": 0.0}]
    biases[1].requires_grad_(False)
    optimizer = build_optimizer(tiny_config(FASTER_RCNN, tmp_path), model)
    trained = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(trained) == sorted(id(p) for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("config", [FASTER_RCNN, RETINANET])
def test_each_stage_learns_slower_than_the_next(config, tmp_path):
    words = [*ADAMW, "SOLVER.LAYER_DECAY", "0.7", "MODEL.BACKBONE.FREEZE_AT", "1"]
    cfg = tiny_config(config, tmp_path, *words)
    model = build_model(cfg)
    optimizer = build_optimizer(cfg, model)
    rates = setting_of_each(optimizer, model, "lr")
    assert rates == pytest.approx(expected_rates(model, cfg.SOLVER.BASE_LR, 0.7))
    assert not any(".stem." in name for name in rates)  # the stem is frozen
    decays = setting_of_each(optimizer, model, "weight_decay")
    dimensions = {name: p.dim() for name, p in model.named_parameters() if p.requires_grad}
    assert decays == {name: 0.05 if dim > 1 else 0.0 for name, dim in dimensions.items()}
    # There are 5 rates, and a group of weights and a group of norms and biases for each.
    assert len(optimizer.param_groups) == 10


def test_a_backbone_without_fpn(tmp_path):
    factor = stage_lr_factor(0.5)
    names = ["backbone.stem.conv1.conv.weight", "backbone.stage5.0.ese.fc.bias", "head.stage2.w"]
    assert [factor(name) for name in names] == [0.5**5, 0.5, 1.0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["SOLVER.LAYER_DECAY", "1.5"], r"LAYER_DECAY is 1\.5: give a factor above 0 and up to 1"),
        (["SOLVER.LAYER_DECAY", "0.0"], r"LAYER_DECAY is 0\.0: give a factor"),
        (["SOLVER.LAYER_DECAY", "0.7"], r"build_vovnet_fpn_backbone has no stages with VoVNet's"),
        (
            ["SOLVER.LAYER_DECAY", "0.7", "SOLVER.BIAS_LR_FACTOR", "2.0"],
            r"SOLVER\.BIAS_LR_FACTOR 2\.0: one of them must be 1\.0",
        ),
    ],
)
def test_a_decay_without_stages_is_refused(words, message, tmp_path):
    cfg = tiny_config(FASTER_RCNN, tmp_path, *words)
    with pytest.raises(ValueError, match=message):
        build_optimizer(cfg, nn.Linear(1, 1))


def test_a_lazy_config_gives_the_same(tmp_path: Path):
    config = load_lazy_config("lazy/COCO-Detection/retinanet_V_39_eSE_FPN_1x.py")
    example = "lazy/COCO-InstanceSegmentation/mask_rcnn_V_39_eSE_FPN_adamw_1x.py"
    decay = "optimizer.params.lr_factor_func.decay=0.7"
    config.optimizer = load_lazy_config(example, ["optimizer.lr=0.002", decay]).optimizer
    cfg = tiny_config(RETINANET, tmp_path, *ADAMW, "SOLVER.LAYER_DECAY", "0.7")
    model = build_model(cfg)
    optimizers = (
        LazyTrainer.of(config).build_optimizer(to_cfg(config), model),
        build_optimizer(cfg, model),
    )
    for key in ("lr", "weight_decay", "betas"):
        ours, theirs = (setting_of_each(optimizer, model, key) for optimizer in optimizers)
        assert ours == theirs
