# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Find which keys of a config the user has set, and the config without them."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import detectron2
import yaml
from detectron2.config import CfgNode
from fvcore.common.config import BASE_KEY

from ..config import find_config_folder
from .config import find_config, list_keys, load_config

COMMAND_LINE = "set on the command line"


class Written(NamedTuple):
    """Separates the settings of a user from the rest of a config.

    Attributes:
        base: the config without the values of the user. It is the config of a file of this package
            or of Detectron2, or Detectron2's defaults.
        given: the keys that the user has set, with the origin of each, such as "set in FILE".
    """

    base: CfgNode
    given: dict[str, str]


def find_written(
    config_file: str,
    options: Sequence[str],
    *,
    allow_unsafe_yaml: bool = False,
) -> Written:
    """Separate the settings of a user from those in the files of this package. For the arguments
    see :func:`load_config`."""
    given: dict[str, str] = {}
    shipped = _split(find_config(config_file), given) if config_file else []
    base = load_config()
    for path in shipped:
        base.merge_from_other_cfg(
            CfgNode(CfgNode.load_yaml_with_base(path, allow_unsafe=allow_unsafe_yaml))
        )
    return Written(base, given | dict.fromkeys(options[::2], COMMAND_LINE))


def _split(path: str, given: dict[str, str]) -> list[str]:
    """Add the keys of a user's file, and of the user's files that it inherits from, to ``given``.
    Return the shipped files that these inherit from, or ``path`` if it is one."""
    if not os.path.isfile(path):  # on a server
        return []
    if is_shipped(path):
        return [path]
    content = yaml.load(Path(path).read_text(encoding="utf-8"), _Untagged) or {}
    inherited = content.pop(BASE_KEY, [])
    shipped = []
    for name in [inherited] if isinstance(inherited, str) else inherited:
        shipped += _split(os.path.join(os.path.dirname(path), os.path.expanduser(name)), given)
    given |= dict.fromkeys(list_keys(content), f"set in {path}")
    return shipped


def is_shipped(path: str) -> bool:
    """Return True if a config file belongs to this package or to Detectron2."""
    folders = [find_config_folder(), Path(detectron2.__file__).parent / "model_zoo" / "configs"]
    return any(Path(path).resolve().is_relative_to(folder.resolve()) for folder in folders)


class _Untagged(yaml.SafeLoader):
    """Reads the keys of a file, and leaves out values with tags."""


_Untagged.add_multi_constructor("", lambda loader, suffix, node: None)
