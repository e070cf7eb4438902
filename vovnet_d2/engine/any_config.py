# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Configs of both kinds, YAML files and LazyConfigs, for all tools that use a trained network."""

import logging
from collections.abc import Sequence
from typing import TypeAlias

from detectron2.config import CfgNode
from omegaconf import DictConfig
from torch import nn

from ..checkpoint import VoVNetCheckpointer, check_input_convention
from ..errors import UserValueError
from .config import find_config, is_lazy_file, load_config
from .in_features import build_explained
from .initial_weights import check_all_loaded
from .lazy_config import instantiate, load_lazy_config, to_cfg

logger = logging.getLogger(__name__)

AnyConfig: TypeAlias = CfgNode | DictConfig


def load_any_config(
    config_file: str, options: Sequence[str] = (), *, allow_unsafe_yaml: bool = False
) -> AnyConfig:
    """Load a YAML file, a LazyConfig, or the config.yaml of a training with one of them. For the
    arguments and the errors see :func:`load_config` and :func:`load_lazy_config`."""
    path = find_config(config_file)
    if not is_lazy_file(path):
        return load_config(path, options, allow_unsafe_yaml=allow_unsafe_yaml)
    return load_lazy_config(path, options, allow_unsafe_yaml=allow_unsafe_yaml)


def as_cfg(config: AnyConfig) -> CfgNode:
    """Return a config under the keys of YAML files, which may be changed."""
    cfg = to_cfg(config) if isinstance(config, DictConfig) else config.clone()
    cfg.defrost()
    return cfg


def build_network(config: AnyConfig, cfg: CfgNode) -> nn.Module:
    """Build the network that ``config`` describes. ``cfg`` is the same config under the keys of
    YAML files, with the device that was chosen."""
    if not isinstance(config, DictConfig):
        return build_explained(cfg)
    return instantiate(config, "model").to(cfg.MODEL.DEVICE)


def load_network(
    config: AnyConfig, cfg: CfgNode, *, allow_partial: bool = False, allow_pickle: bool = False
) -> tuple[nn.Module, dict[str, list[str]]]:
    """Build the network that ``config`` describes, and load the weights ``cfg.MODEL.WEIGHTS``.

    Args:
        cfg: see :func:`build_network`.
        allow_partial, allow_pickle: see :class:`VoVNetCheckpointer`.

    Returns:
        the network, and the names of the categories that the weights tell.

    Raises:
        FileNotFoundError: there is no such file of weights.
        ValueError: there are no weights, or they are not those of the whole network.
    """
    if not cfg.MODEL.WEIGHTS:
        raise UserValueError(
            "There are no weights: set MODEL.WEIGHTS to a file, on a command line by --opts "
            "MODEL.WEIGHTS FILE. A training writes OUTPUT_DIR/model_final.pth."
        )
    model = build_network(config, cfg)
    checkpointer = VoVNetCheckpointer(model, allow_partial=allow_partial, allow_pickle=allow_pickle)
    checkpointer.load(cfg.MODEL.WEIGHTS)
    if not allow_partial:
        check_all_loaded(checkpointer, cfg.MODEL.WEIGHTS)
    if warning := check_input_convention(cfg, checkpointer.input_convention):
        logger.warning(warning)
    return model, checkpointer.loaded_categories
