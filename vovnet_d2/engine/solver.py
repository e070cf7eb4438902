# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Detectron2's optimizer, with what a network wants to be treated differently."""

from __future__ import annotations

from typing import Any

from detectron2.config import CfgNode
from detectron2.solver import build_optimizer as build_common_optimizer
from torch import nn
from torch.optim import Optimizer

__all__ = ["build_optimizer"]


def build_optimizer(cfg: CfgNode, model: nn.Module) -> Optimizer:
    """Detectron2's optimizer for the config's ``SOLVER``. A model may have a method
    ``solver_overrides``; see :meth:`SingleShotDetector.solver_overrides`."""
    optimizer = build_common_optimizer(cfg, model)
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
