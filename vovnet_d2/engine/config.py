# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""The arguments of a command line, and YAML files that are loaded safely."""

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
from ..errors import UserFileNotFoundError, UserKeyError, UserValueError, one_line
from ..words import suggest
from .other_projects import translate

__all__ = [
    "PICKLE_HELP",
    "PROGRESS_HELP",
    "add_options_argument",
    "argument_parser",
    "base_parser",
    "find_config",
    "get_value",
    "list_keys",
    "load_config",
    "resolve_config",
    "set_value",
]

PICKLE_HELP = (
    "read weights stored as Python pickles (.pkl). Only their arrays are read; a pickle that would "
    "run code is refused"
)
PROGRESS_HELP = (
    "show a progress bar with the time left instead of the log, which goes to OUTPUT_DIR/log.txt"
)

_EXAMPLES = """
Examples:

Eight GPUs of a machine:
    $ python tools/{tool}.py --num-gpus 8 --config-file FILE.yaml

Other values of config options, after all arguments:
    $ python tools/{tool}.py --config-file FILE.yaml MODEL.WEIGHTS FILE.pth SOLVER.BASE_LR 0.001

Two machines, with this command on each, and --machine-rank 1 on the second:
    $ python tools/{tool}.py --num-gpus 8 --num-machines 2 --machine-rank 0 \\
        --dist-url tcp://first.example:29500 --config-file FILE.yaml
"""
_STATUSES = """
Exit status:
    0   done
    1   failed on the way
    2   a mistake in what was asked for
    75  a signal (SIGTERM, SIGUSR1, SIGHUP or Ctrl-C) ended the run; --resume goes on from the last
        checkpoint, or starts if there is none
"""


def base_parser(examples: str) -> tuple[argparse.ArgumentParser, argparse._ArgumentGroup]:
    """Return Detectron2's parser of the arguments of a training, and the group for ours.

    Args:
        examples: the commands that the help ends with, before the exit statuses.
    """
    parser = default_argument_parser(examples + _STATUSES)
    parser.conflict_handler = "resolve"  # groups take it over when they are made
    group = parser.add_argument_group("arguments of vovnet_d2")
    parser.conflict_handler = "error"
    # These two replace Detectron2's arguments, only for a better help text.
    group.add_argument(
        "--config-file",
        default="",
        metavar="FILE",
        help="a config file, or the name of a config of this package",
    )
    group.add_argument(
        "--resume",
        action="store_true",
        help="go on from the last checkpoint in OUTPUT_DIR, or start if there is none",
    )
    group.conflict_handler = "error"
    return parser, group


def argument_parser(tool: str = "train_net") -> argparse.ArgumentParser:
    """Return the parser of Detectron2's arguments and those of this package, which precede the
    config options.

    Args:
        tool: the name of the tool, for the examples in the help.
    """
    parser, group = base_parser(_EXAMPLES.format(tool=tool))
    group.add_argument(
        "--auto-scale-lr",
        action="store_true",
        help="fit learning rate, schedule, warm-up and periods to the batch of this run. Those in "
        "the config file are for its own SOLVER.IMS_PER_BATCH. Options on the command line stay "
        "as they are. If SOLVER.MAX_ITER is one of them, steps, warm-up and periods keep their "
        "share of it",
    )
    group.add_argument(
        "--allow-partial",
        action="store_true",
        help="load the tensors that fit, instead of refusing weights that do not fit the network",
    )
    group.add_argument("--allow-pickle", action="store_true", help=PICKLE_HELP)
    group.add_argument(
        "--allow-unsafe-yaml",
        action="store_true",
        help="load config files with Python tags (!!python/...), which can run any code: only for "
        "files that you have read",
    )
    group.add_argument("--progress", action="store_true", help=PROGRESS_HELP)
    return parser


def add_options_argument(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """Add ``--opts``, for command lines on which arguments may take several words.

    The other command lines take config options as their last words.
    """
    parser.add_argument(
        "--opts",
        nargs=argparse.REMAINDER,
        default=[],
        metavar="OPTION",
        help="config options, after all other arguments: pairs such as MODEL.WEIGHTS FILE for a "
        "YAML file, words such as train.init_checkpoint=FILE for a LazyConfig",
    )


def find_config(name: str) -> str:
    """Return the path of a config file: ``name`` itself, or this package's file of that name.

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
        raise UserFileNotFoundError(
            f"There is no config file {name}. Close to it: {', '.join(close)}."
        ) from error


def resolve_config(name: str) -> tuple[str, bool]:
    """Return the path of a config, which may also be a name of Detectron2's model zoo.

    The names of this package come first, see :func:`find_config`.

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
    """Load Detectron2's defaults and this package's, overwritten by a file, then by options.

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
        raise UserValueError("OUTPUT_DIR is None: give the folder that a run writes to.")
    return cfg


def _merge_file(cfg: CfgNode, path: str, allow_unsafe: bool) -> None:
    from .lazy_config import is_lazy_file  # which imports this module

    if is_lazy_file(path):
        raise UserValueError(f"{path} is a LazyConfig: tools/lazyconfig_train_net.py runs it.")
    try:
        loaded = CfgNode(CfgNode.load_yaml_with_base(path, allow_unsafe=allow_unsafe))
        if translate(loaded, cfg):
            cfg.merge_from_other_cfg(loaded)
        else:
            cfg.merge_from_file(path, allow_unsafe=allow_unsafe)
    except FileNotFoundError as error:
        raise UserFileNotFoundError(
            f"Config file {path} inherits (_BASE_) from {error.filename}, which does not exist."
        ) from error
    except OSError as error:
        raise UserValueError(
            f"Config file {path} or one that it inherits from cannot be read: {one_line(error)}."
        ) from error
    except RecursionError as error:
        raise UserValueError(
            f"Config file {path} is nested too deeply, or inherits (_BASE_) from itself."
        ) from error
    except yaml.constructor.ConstructorError as error:
        raise UserValueError(
            f"Config file {path} is refused, as plain YAML has no such tag ({error.problem}). If "
            "you have read the file and those that it inherits from, add --allow-unsafe-yaml."
        ) from error
    except yaml.YAMLError as error:
        raise UserValueError(f"Config file {path} is not valid YAML: {one_line(error)}.") from error
    except KeyError as error:
        raise UserKeyError(f"Config file {path}: {_explain_key(cfg, error.args[0])}") from error
    except (AssertionError, AttributeError, TypeError, ValueError) as error:
        # yacs and fvcore raise these for the content of a file (no mapping at the top, a value of
        # another type, ...), and we for a config of another project.
        raise UserValueError(
            f"Config file {path} does not fit Detectron2's config: {one_line(error)}."
        ) from error


def _merge_options(cfg: CfgNode, options: Sequence[str]) -> None:
    if flags := [option for option in options if option.startswith("--")]:
        raise UserValueError(
            f"{flags[0]} stands among the config options: put it before the first of them."
        )
    for key, equals, value in (option.partition("=") for option in options[::2]):
        if equals and key in list_keys(cfg):
            raise UserValueError(
                f"{key}={value} is for a LazyConfig. Write {key} {value} for a YAML file."
            )
    if len(options) % 2:
        raise UserValueError(
            f"Config options are pairs of KEY and VALUE, but there are {len(options)} words: "
            f"{' '.join(options)}"
        )
    for key, value in zip(options[::2], options[1::2], strict=True):
        if key not in list_keys(cfg):
            raise UserKeyError(_explain_key(cfg, f"Non-existent config key: {key}"))
        try:
            cfg.merge_from_list([key, value])
        except (SyntaxError, ValueError) as error:
            raise UserValueError(f"Config option {key} {value}: {one_line(error)}.") from error


def _explain_key(cfg: CfgNode, message: str) -> str:
    """Return a message that ends with an unknown key, with the keys that are close to it."""
    return f"{message}.{suggest(message.rsplit(' ', 1)[-1], list_keys(cfg))}"


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
