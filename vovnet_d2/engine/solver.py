# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Detectron2's optimizer, with what a network wants to be treated differently."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from detectron2.config import CfgNode
from detectron2.solver import build_optimizer as build_sgd
from detectron2.solver.build import get_default_optimizer_params, maybe_add_gradient_clipping
from torch import nn
from torch.optim import AdamW, Optimizer

__all__ = ["build_optimizer"]


def build_optimizer(cfg: CfgNode, model: nn.Module) -> Optimizer:
    """Detectron2's optimizer for the config's ``SOLVER``. A model may have a method
    ``solver_overrides``; see :meth:`SingleShotDetector.solver_overrides`."""
    optimizer = _OPTIMIZERS[_find_name(cfg)](cfg, model)
    find_overrides: Any = getattr(model, "solver_overrides", list)
    overrides = find_overrides()
    moved = {id(parameter) for group in overrides for parameter in group["params"]}
    for group in optimizer.param_groups:
        group["params"] = [p for p in group["params"] if id(p) not in moved]
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
    for group in overrides:
        if params := [p for p in group["params"] if p.requires_grad]:
            lr = cfg.SOLVER.BASE_LR * group["lr_factor"]
            optimizer.add_param_group(
                {"params": params, "lr": lr, "weight_decay": group["weight_decay"]}
            )
    return optimizer


def _build_adamw(cfg: CfgNode, model: nn.Module) -> Optimizer:
    """Build AdamW (arXiv 1711.05101), by default without weight decay on norms and biases."""
    solver = cfg.SOLVER
    no_decay_on_biases = 0.0 if solver.WEIGHT_DECAY_BIAS is None else solver.WEIGHT_DECAY_BIAS
    groups = get_default_optimizer_params(
        model,
        base_lr=solver.BASE_LR,
        weight_decay_norm=solver.WEIGHT_DECAY_NORM,
        bias_lr_factor=solver.BIAS_LR_FACTOR,
        weight_decay_bias=no_decay_on_biases,
    )
    optimizer = AdamW(groups, lr=solver.BASE_LR, weight_decay=solver.WEIGHT_DECAY)
    return maybe_add_gradient_clipping(cfg, optimizer)


_OPTIMIZERS: dict[str, Callable[[CfgNode, nn.Module], Optimizer]] = {
    "SGD": build_sgd,
    "AdamW": _build_adamw,
}


def _find_name(cfg: CfgNode) -> str:
    if cfg.SOLVER.OPTIMIZER not in _OPTIMIZERS:
        raise ValueError(
            f"SOLVER.OPTIMIZER is {cfg.SOLVER.OPTIMIZER!r}: choose from {', '.join(_OPTIMIZERS)}."
        )
    return cfg.SOLVER.OPTIMIZER
