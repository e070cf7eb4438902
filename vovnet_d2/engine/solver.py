# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""The optimizer of a training, and its groups of parameters."""

import inspect
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.solver.build import get_default_optimizer_params, maybe_add_gradient_clipping
from torch import nn, optim

from ..errors import UserValueError

_FUSED = (optim.SGD, optim.Adam, optim.AdamW)  # these have a fused step on GPUs
_PARTS = ("stem", "stage2", "stage3", "stage4", "stage5")
_PART = re.compile(rf"(?:^|\.)backbone\.(?:bottom_up\.)?({'|'.join(_PARTS)})\.")


def build_optimizer(cfg: CfgNode, model: nn.Module) -> optim.Optimizer:
    """Build the optimizer that the config's ``SOLVER`` describes.

    Parameters of one learning rate and weight decay are one group. The rates differ by
    ``LAYER_DECAY`` and ``BIAS_LR_FACTOR``, the decays by ``WEIGHT_DECAY_NORM`` and
    ``WEIGHT_DECAY_BIAS``, and both by the overrides of a model; see
    :meth:`SingleShotDetector.solver_overrides`.

    Raises:
        ValueError: torch has no such optimizer, the optimizer does not take an argument or a
            parameter, or ``LAYER_DECAY`` has no stages to hold for.
    """
    solver = cfg.SOLVER
    if solver.OPTIMIZER not in (optimizers := list_optimizers()):
        raise UserValueError(
            f"SOLVER.OPTIMIZER is {solver.OPTIMIZER!r}: choose one of torch.optim's, which are "
            f"{', '.join(optimizers)}."
        )
    kind = optimizers[solver.OPTIMIZER]
    arguments = {"lr": solver.BASE_LR, "weight_decay": solver.WEIGHT_DECAY}
    if kind is optim.SGD:  # as Detectron2's build_optimizer does
        arguments |= {"momentum": solver.MOMENTUM, "nesterov": solver.NESTEROV, "foreach": True}
    given = _read_arguments(solver.OPTIMIZER_ARGS, kind)
    on_gpu = all(parameter.device.type == "cuda" for parameter in model.parameters())
    if kind in _FUSED and on_gpu and not {"foreach", "fused"} & given.keys():
        arguments |= {"fused": True, "foreach": False}  # one kernel for all parameters
    arguments |= given
    groups = _group_parameters(cfg, model)
    try:
        optimizer = kind(groups, **arguments)
    except (RuntimeError, TypeError, ValueError) as error:
        raise UserValueError(
            f"torch.optim.{solver.OPTIMIZER} (SOLVER.OPTIMIZER) cannot be used with {arguments}: "
            f"{error}"
        ) from error
    return maybe_add_gradient_clipping(cfg, optimizer)


def load_optimizer_state(optimizer: optim.Optimizer, state: dict[str, Any]) -> None:
    """Load the state of an optimizer that may have run on another device or in another memory
    format.

    The optimizer keeps its own kernels (``fused`` and ``foreach``). Each tensor of the shape of its
    parameter gets the strides of the parameter, because fused kernels on a CPU ignore strides.

    Args:
        state: what :meth:`torch.optim.Optimizer.state_dict` has returned.
    """
    saved, own = state["param_groups"], optimizer.param_groups
    groups = [
        {**group, **{key: mine[key] for key in ("fused", "foreach") if key in mine}}
        for group, mine in zip(saved, own, strict=False)
    ]
    # torch raises an error if there are other numbers of groups.
    optimizer.load_state_dict({**state, "param_groups": groups + saved[len(own) :]})
    for parameter, values in optimizer.state.items():
        for name, value in values.items():
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                like = torch.empty_like(parameter, dtype=value.dtype, device=value.device)
                values[name] = like.copy_(value)


def _read_arguments(pairs: Sequence[Any], kind: Callable[..., optim.Optimizer]) -> dict[str, Any]:
    """Return ``[NAME, VALUE, ...]`` as a dictionary of arguments that an optimizer takes."""
    if len(pairs) % 2:
        raise UserValueError(
            f"SOLVER.OPTIMIZER_ARGS is {pairs!r}: give pairs of a name and a value, such as "
            "\"['betas', (0.9, 0.98)]\"."
        )
    found = {name: _decode(value) for name, value in zip(pairs[::2], pairs[1::2], strict=True)}
    known = inspect.signature(kind).parameters.keys() - {"params", "lr", "weight_decay"}
    if unknown := [name for name in found if name not in known]:
        raise UserValueError(
            f"SOLVER.OPTIMIZER_ARGS has {unknown[0]!r}: choose from {', '.join(sorted(known))}. "
            "The learning rate is SOLVER.BASE_LR, the weight decay SOLVER.WEIGHT_DECAY."
        )
    return found


def _decode(value: Any) -> Any:
    """Return a number for text such as "1e-6", which YAML does not read as a number."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def list_optimizers() -> dict[str, Callable[..., optim.Optimizer]]:
    """Return the optimizers of torch.optim that have a learning rate and a weight decay."""
    found = {name: kind for name, kind in vars(optim).items() if inspect.isclass(kind)}
    return {
        name: kind
        for name, kind in sorted(found.items())
        if issubclass(kind, optim.Optimizer)
        and {"lr", "weight_decay"} <= inspect.signature(kind).parameters.keys()
    }


def stage_lr_factor(decay: float) -> Callable[[str], float]:
    """Return a function from the name of a parameter to the factor of its learning rate.

    The factor is 1 behind the backbone, ``decay`` in stage5, ``decay ** 2`` in stage4, and so on to
    ``decay ** 5`` in the stem (layer-wise decay as BEiT fine-tunes with it, arXiv 2106.08254, by
    VoVNet's stages).
    """

    def find_factor(name: str) -> float:
        part = _PART.search(name)
        return decay ** (len(_PARTS) - _PARTS.index(part[1])) if part else 1.0

    return find_factor


def _group_parameters(cfg: CfgNode, model: nn.Module) -> list[dict[str, Any]]:
    solver = cfg.SOLVER
    if solver.LAYER_DECAY != 1:
        _check_layer_decay(cfg, model)
    decay_of_biases = solver.WEIGHT_DECAY_BIAS
    if decay_of_biases is None and solver.OPTIMIZER != "SGD":
        decay_of_biases = 0.0
    groups = get_default_optimizer_params(
        model,
        base_lr=solver.BASE_LR,
        weight_decay_norm=solver.WEIGHT_DECAY_NORM,
        bias_lr_factor=solver.BIAS_LR_FACTOR,
        weight_decay_bias=decay_of_biases,
        lr_factor_func=stage_lr_factor(solver.LAYER_DECAY),
    )
    find_overrides: Any = getattr(model, "solver_overrides", list)
    overrides = find_overrides()
    moved = {id(parameter) for group in overrides for parameter in group["params"]}
    for group in groups:
        group["params"] = [p for p in group["params"] if id(p) not in moved]
    for group in overrides:
        params = [p for p in group["params"] if p.requires_grad]
        lr = solver.BASE_LR * group["lr_factor"]
        groups.append({"params": params, "lr": lr, "weight_decay": group["weight_decay"]})
    return [group for group in groups if group["params"]]


def _check_layer_decay(cfg: CfgNode, model: nn.Module) -> None:
    decay = cfg.SOLVER.LAYER_DECAY
    if not 0 < decay <= 1:
        raise UserValueError(f"SOLVER.LAYER_DECAY is {decay}: give a factor above 0 and up to 1.")
    if cfg.SOLVER.BIAS_LR_FACTOR != 1:  # Detectron2 would drop the factor of the stage
        raise UserValueError(
            f"SOLVER.LAYER_DECAY is {decay} and SOLVER.BIAS_LR_FACTOR {cfg.SOLVER.BIAS_LR_FACTOR}: "
            "one of them must be 1.0."
        )
    if not any(_PART.search(name) for name, _ in model.named_parameters()):
        raise UserValueError(
            f"SOLVER.LAYER_DECAY is {decay}, and the backbone {cfg.MODEL.BACKBONE.NAME} has no "
            "stages with VoVNet's names (stem, stage2 to stage5): set it to 1.0."
        )
