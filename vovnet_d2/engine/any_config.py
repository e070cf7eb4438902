# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Configs of both kinds, YAML files and LazyConfigs, for whatever uses a trained network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from detectron2.config import CfgNode
from detectron2.modeling import build_model
from omegaconf import DictConfig
from torch import nn

from .config import find_config, load_config
from .lazy_config import instantiate, is_lazy_file, load_lazy_config, set_options, to_cfg

__all__ = ["AnyConfig", "as_cfg", "build_network", "load_any_config"]

AnyConfig: TypeAlias = CfgNode | DictConfig


def load_any_config(
    config_file: str, options: Sequence[str] = (), *, allow_unsafe_yaml: bool = False
) -> AnyConfig:
    """Load a YAML file, a LazyConfig, or the config.yaml that the training of either has left.

    Args:
        config_file: a path, or the name of a file among this package's.
        options: ``[KEY, VALUE, ...]``, with the keys of YAML files for a LazyConfig, too.
        allow_unsafe_yaml: accept a YAML file that may run any code.

    Raises:
        FileNotFoundError, KeyError, ValueError: see :func:`load_config` and
            :func:`load_lazy_config`.
    """
    path = find_config(config_file)
    if not is_lazy_file(path):
        return load_config(path, options, allow_unsafe_yaml=allow_unsafe_yaml)
    config = load_lazy_config(path, allow_unsafe_yaml=allow_unsafe_yaml)
    set_options(config, options)
    return config


def as_cfg(config: AnyConfig) -> CfgNode:
    """Return a config under the keys of YAML files, which may be changed."""
    cfg = to_cfg(config) if isinstance(config, DictConfig) else config.clone()
    cfg.defrost()
    return cfg


def build_network(config: AnyConfig, cfg: CfgNode) -> nn.Module:
    """Build the network that ``config`` describes.

    Args:
        cfg: the same config under the keys of YAML files, with the device that was chosen.
    """
    if not isinstance(config, DictConfig):
        return build_model(cfg)
    return instantiate(config, "model").to(cfg.MODEL.DEVICE)
