# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""From a command line to a config: the arguments, and YAML files loaded safely."""

from __future__ import annotations

import argparse
import logging
from difflib import get_close_matches

import torch
import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.engine import default_argument_parser
from detectron2.utils.file_io import PathManager

from ..config import add_vovnet_config, get_config_file

__all__ = ["argument_parser", "load_config"]

logger = logging.getLogger(__name__)


def argument_parser() -> argparse.ArgumentParser:
    """Detectron2's usual arguments and this package's, which stand before the config options."""
    parser = default_argument_parser()
    parser.add_argument(
        "--allow-unsafe-yaml",
        action="store_true",
        help="load config files with Python tags (!!python/...), which can run any code: "
        "only for files that you have read",
    )
    return parser


def load_config(args: argparse.Namespace) -> CfgNode:
    """The config that ``args`` (of :func:`argument_parser`) describe, not yet frozen.

    ``args.config_file`` may be a path or a name that :func:`vovnet_d2.get_config_file` knows; it
    is replaced by the path.

    Raises:
        FileNotFoundError: there is no such file, or not the one that it inherits from.
        KeyError: a key does not exist.
        ValueError: a file is not valid or not safe, or an option does not fit its key.
    """
    cfg = get_cfg()
    add_vovnet_config(cfg)
    if args.config_file:
        args.config_file = _find(args.config_file)
        _merge_file(cfg, args.config_file, args.allow_unsafe_yaml)
    _merge_options(cfg, args.opts)
    _choose_device(cfg)
    return cfg


def _find(name: str) -> str:
    return name if PathManager.isfile(name) else get_config_file(name)


def _merge_file(cfg: CfgNode, path: str, allow_unsafe: bool) -> None:
    try:
        cfg.merge_from_file(path, allow_unsafe=allow_unsafe)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"Config file {path} inherits (_BASE_) from {error.filename}, which does not exist."
        ) from error
    except yaml.constructor.ConstructorError as error:
        raise ValueError(
            f"Config file {path} needs tags that plain YAML does not have ({error.problem}); if "
            "you have read it and trust it, add --allow-unsafe-yaml."
        ) from error
    except yaml.YAMLError as error:
        raise ValueError(f"Config file {path} is not valid YAML: {error}") from error
    except KeyError as error:
        raise KeyError(f"Config file {path}: {_explain_key(cfg, error.args[0])}") from error
    except (AssertionError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"Config file {path} does not fit Detectron2's config: {error}") from error


def _explain_key(cfg: CfgNode, message: str) -> str:
    """yacs's message, and the keys that the user may have meant."""
    key = message.rsplit(" ", 1)[-1]
    close = get_close_matches(key, list(_flat_keys(cfg)), n=3)
    return f"{message}." + (f" Close to it: {', '.join(close)}." if close else "")


def _flat_keys(node: CfgNode, prefix: str = ""):
    for key, value in node.items():
        yield prefix + key
        if isinstance(value, CfgNode):
            yield from _flat_keys(value, f"{prefix}{key}.")


def _merge_options(cfg: CfgNode, options: list[str]) -> None:
    flags = [option for option in options if option.startswith("--")]
    if flags:
        raise ValueError(
            f"{flags[0]} stands after the config options: put it before the first of them."
        )
    if len(options) % 2:
        raise ValueError(
            f"Config options come in pairs of KEY VALUE, not {len(options)} words: "
            f"{' '.join(options)}"
        )
    for key, value in zip(options[::2], options[1::2], strict=True):
        try:
            cfg.merge_from_list([key, value])
        except (AssertionError, KeyError) as error:
            raise KeyError(_explain_key(cfg, f"Non-existent config key: {key}")) from error
        except ValueError as error:
            raise ValueError(f"Config option {key} {value}: {error}") from error


def _choose_device(cfg: CfgNode) -> None:
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        logger.warning("No GPU that torch can use: MODEL.DEVICE is set to cpu, which is slow.")
        cfg.MODEL.DEVICE = "cpu"
