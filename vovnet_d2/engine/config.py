# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Configs are found, told apart, and loaded from YAML files safely."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.utils.file_io import PathManager

from ..config import add_vovnet_config, get_config_file
from ..errors import UserFileNotFoundError, UserKeyError, UserValueError, one_line
from ..words import suggest
from .other_projects import translate


def find_config(name: str) -> str:
    """Return the path of a config file: ``name`` itself, or the file of that name in this package.
    Raise FileNotFoundError, with the names that are close to it, if there is neither."""
    if PathManager.isfile(name):
        return name
    try:
        return get_config_file(name)
    except FileNotFoundError as error:
        beside = [str(path) for path in Path(name).parent.glob("*.*") if path.is_file()]
        if not (hint := suggest(str(Path(name)), beside, cutoff=0.8)):
            raise
        raise UserFileNotFoundError(f"There is no config file {name}.{hint}") from error


def resolve_config(name: str) -> tuple[str, bool]:
    """Return the path of a config, which may also be a name of Detectron2's model zoo. The names of
    this package come first, see :func:`find_config`. Raise FileNotFoundError, with the names of
    this package that are close to the name, if there is no such file.

    Returns:
        the path, and True if the file is Detectron2's own. The Python tags of such a file are
        trusted as the code of Detectron2 is.
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


def is_lazy(content: Any) -> bool:
    """Return True if the content of a YAML file is a LazyConfig, as a training saves it."""
    model = content.get("model") if isinstance(content, dict) else None
    return isinstance(model, dict) and "_target_" in model


def is_lazy_file(path: str) -> bool:
    """Return True if a config file is a LazyConfig: a Python file, or a saved config.yaml."""
    if path.endswith(".py"):
        return True
    try:
        text = Path(path).read_text(encoding="utf-8")
        return "_target_" in text and is_lazy(yaml.safe_load(text))
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return False


def load_config(
    config_file: str = "",
    options: Sequence[str] = (),
    *,
    allow_unsafe_yaml: bool = False,
    add_config: Callable[[CfgNode], None] | None = None,
) -> CfgNode:
    """Load the defaults of Detectron2 and of this package, overwritten by a file, then by options.

    Args:
        config_file: path of a YAML file, or its name among this package's; empty for none.
        options: ``[KEY, VALUE, ...]``.
        allow_unsafe_yaml: accept tags that make Python objects, and so can run any code.
        add_config: adds more keys to the defaults.

    Raises:
        FileNotFoundError: there is no such file, or no file that it inherits from.
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
    if cfg.OUTPUT_DIR is None:  # yacs accepts None for every key
        raise UserValueError("OUTPUT_DIR is None: give the folder that a run writes to.")
    return cfg


def _merge_file(cfg: CfgNode, path: str, allow_unsafe: bool) -> None:
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
        # yacs and fvcore raise these errors for the content of a file (no mapping at the top, a
        # value of another type, ...). This package raises them for a config of another project.
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
            f"Config options are pairs of KEY and VALUE, but the number of words is "
            f"{len(options)}: {' '.join(options)}"
        )
    for key, value in zip(options[::2], options[1::2], strict=True):
        if key not in list_keys(cfg):
            raise UserKeyError(_explain_key(cfg, f"Non-existent config key: {key}"))
        try:
            cfg.merge_from_list([key, value])
        except (SyntaxError, ValueError) as error:
            reason = _explain_type(get_value(cfg, key), value) or one_line(error)
            raise UserValueError(f"Config option {key} {value}: {reason}.") from error


def _explain_type(present: Any, given: str) -> str:
    """Return which values a key takes, or an empty string, from the present value of the key."""
    if isinstance(present, str) and not {"'", '"'} & set(given):
        return f"""the value must be text. Write "'{given}'" for the text {given}"""
    words = {
        bool: "True or False",
        int: "a whole number",
        float: "a number with a decimal point",
        str: "text",
        list: "a list in square brackets",
        tuple: "a list in round brackets",
    }
    if type(present) not in words:
        return ""
    example = f", such as {present!r}" if present and present is not True else ""
    return f"the value must be {words[type(present)]}{example}"


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
