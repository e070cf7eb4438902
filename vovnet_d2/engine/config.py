# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""From a command line to a config: the arguments, and YAML files loaded safely."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.engine import default_argument_parser
from detectron2.utils.file_io import PathManager

from ..config import add_vovnet_config, get_config_file
from .other_projects import translate

__all__ = [
    "PROGRESS_HELP",
    "argument_parser",
    "find_config",
    "get_value",
    "list_keys",
    "load_config",
    "resolve_config",
    "set_value",
]

PROGRESS_HELP = (
    "show a progress bar with the time left instead of the log, which goes to OUTPUT_DIR/log.txt"
)


def argument_parser() -> argparse.ArgumentParser:
    """Detectron2's usual arguments and this package's, all of which precede the config options."""
    parser = default_argument_parser()
    parser.epilog += (
        "\nExit status: 0 done, 1 failed on the way, 2 a mistake in what was asked for,\n"
        "75 ended by SIGTERM, SIGUSR1, SIGHUP or Ctrl-C: the same command with --resume goes on.\n"
    )
    group = parser.add_argument_group("added by vovnet_d2")
    group.add_argument(
        "--auto-scale-lr",
        action="store_true",
        help="fit learning rate, schedule, warm-up and periods to the batch of this run: the "
        "config file's hold for its own SOLVER.IMS_PER_BATCH. Options given on the command line "
        "stay as they are; steps, warm-up and periods keep their share of a SOLVER.MAX_ITER that "
        "is one of them",
    )
    group.add_argument(
        "--allow-partial",
        action="store_true",
        help="load what fits of weights that do not fit the network, instead of refusing them",
    )
    group.add_argument(
        "--allow-pickle",
        action="store_true",
        help="load weights stored as Python pickles (.pkl), which can run any code: only for "
        "files whose origin you trust",
    )
    group.add_argument(
        "--allow-unsafe-yaml",
        action="store_true",
        help="load config files with Python tags (!!python/...), which can run any code: only for "
        "files that you have read",
    )
    group.add_argument("--progress", action="store_true", help=PROGRESS_HELP)
    return parser


def find_config(name: str) -> str:
    """The path of a config file: ``name`` itself, or of this package's file of that name.

    Raises:
        FileNotFoundError: there is neither; the message names the closest ones.
    """
    if PathManager.isfile(name):
        return name
    try:
        return get_config_file(name)
    except FileNotFoundError as error:
        beside = [str(path) for path in Path(name).parent.glob("*.*")]
        if not (close := get_close_matches(str(Path(name)), beside, n=3, cutoff=0.8)):
            raise
        raise FileNotFoundError(
            f"There is no config file {name}. Close to it: {', '.join(close)}."
        ) from error


def resolve_config(name: str) -> tuple[str, bool]:
    """As :func:`find_config`, and then of Detectron2's model zoo.

    Returns:
        the path, and whether it is Detectron2's own, whose Python tags are as trusted as its code.

    Raises:
        FileNotFoundError: there is none of these; the message names the closest of ours.
    """
    try:
        return find_config(name), False
    except FileNotFoundError:
        from detectron2 import model_zoo  # slow, and rarely needed

        try:
            return model_zoo.get_config_file(name), True
        except RuntimeError:
            pass
        raise


def load_config(
    config_file: str = "",
    options: Sequence[str] = (),
    *,
    allow_unsafe_yaml: bool = False,
    add_config: Callable[[CfgNode], None] | None = None,
) -> CfgNode:
    """Detectron2's defaults and this package's, overwritten by a file, then by options.

    Args:
        config_file: path of a YAML file, or its name among this package's; empty for none.
        options: ``[KEY, VALUE, ...]``.
        allow_unsafe_yaml: accept tags that make Python objects, and so can run any code.
        add_config: adds more keys to the defaults.

    Raises:
        FileNotFoundError: there is no such file, or not the one that it inherits from.
        KeyError: a key does not exist.
        ValueError: a file is not valid or not safe, or an option does not fit its key.
    """
    cfg = get_cfg()
    add_vovnet_config(cfg)
    if add_config:
        add_config(cfg)
    if config_file:
        _merge_file(cfg, find_config(config_file), allow_unsafe_yaml)
    _merge_options(cfg, options)
    if cfg.OUTPUT_DIR is None:  # which yacs lets every key be
        raise ValueError("OUTPUT_DIR is None: give the folder that a run writes to.")
    return cfg


def _merge_file(cfg: CfgNode, path: str, allow_unsafe: bool) -> None:
    from .lazy_config import is_lazy_file  # which imports this module

    if is_lazy_file(path):
        raise ValueError(f"{path} is a LazyConfig: tools/lazyconfig_train_net.py runs it.")
    try:
        loaded = CfgNode(CfgNode.load_yaml_with_base(path, allow_unsafe=allow_unsafe))
        if translate(loaded, cfg):
            cfg.merge_from_other_cfg(loaded)
        else:
            cfg.merge_from_file(path, allow_unsafe=allow_unsafe)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"Config file {path} inherits (_BASE_) from {error.filename}, which does not exist."
        ) from error
    except OSError as error:
        raise ValueError(
            f"Config file {path} or one that it inherits from cannot be read: {_one_line(error)}."
        ) from error
    except RecursionError as error:
        raise ValueError(
            f"Config file {path} is nested too deeply, or inherits (_BASE_) from itself."
        ) from error
    except yaml.constructor.ConstructorError as error:
        raise ValueError(
            f"Config file {path} is refused, as plain YAML has no such tag ({error.problem}). If "
            "you have read the file and those that it inherits from, add --allow-unsafe-yaml."
        ) from error
    except yaml.YAMLError as error:
        raise ValueError(f"Config file {path} is not valid YAML: {_one_line(error)}.") from error
    except KeyError as error:
        raise KeyError(f"Config file {path}: {_explain_key(cfg, error.args[0])}") from error
    except (AssertionError, AttributeError, TypeError, ValueError) as error:
        # Of yacs and fvcore, about contents: no mapping at the top, a value of another type, ...;
        # or of a config that is another project's.
        raise ValueError(
            f"Config file {path} does not fit Detectron2's config: {_one_line(error)}."
        ) from error


def _merge_options(cfg: CfgNode, options: Sequence[str]) -> None:
    if flags := [option for option in options if option.startswith("--")]:
        raise ValueError(
            f"{flags[0]} stands among the config options: put it before the first of them."
        )
    if len(options) % 2:
        raise ValueError(
            f"Config options are pairs of KEY and VALUE, but there are {len(options)} words: "
            f"{' '.join(options)}"
        )
    for key, value in zip(options[::2], options[1::2], strict=True):
        if key not in list_keys(cfg):
            raise KeyError(_explain_key(cfg, f"Non-existent config key: {key}"))
        try:
            cfg.merge_from_list([key, value])
        except (SyntaxError, ValueError) as error:
            raise ValueError(f"Config option {key} {value}: {_one_line(error)}.") from error


def _explain_key(cfg: CfgNode, message: str) -> str:
    """A message that ends with a key, and the keys that may have been meant."""
    close = get_close_matches(message.rsplit(" ", 1)[-1], list(list_keys(cfg)), n=3)
    return f"{message}." + (f" Close to it: {', '.join(close)}." if close else "")


def list_keys(node: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield the keys of all values of a config, such as "SOLVER.MAX_ITER"."""
    for key, value in node.items():
        if isinstance(value, Mapping):
            yield from list_keys(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def get_value(cfg: CfgNode, key: str) -> Any:
    """Return the value of a key such as "SOLVER.MAX_ITER"."""
    for part in key.split("."):
        cfg = cfg[part]
    return cfg


def set_value(cfg: CfgNode, key: str, value: Any) -> None:
    """Set the value of a key such as "SOLVER.MAX_ITER"."""
    *path, name = key.split(".")
    for part in path:
        cfg = cfg[part]
    cfg[name] = value


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()).removesuffix(".")
