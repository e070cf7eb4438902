# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Cityscapes' scripts under the name by which newer versions of Detectron2 import them."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType

__all__ = ["provide_cityscapes_scripts"]

_PACKAGE = "cityscapesscripts"
_PARENTS = ("deeplearning", "deeplearning.projects", "deeplearning.projects.cityscapesApi")


def provide_cityscapes_scripts() -> None:
    """Let ``deeplearning.projects.cityscapesApi.cityscapesscripts`` name ``cityscapesscripts``.

    Versions of Detectron2 since 2024 import Cityscapes' scripts by the first name, which exists
    inside Meta alone. Nothing is done where that package exists or the scripts are not installed.
    """
    if importlib.util.find_spec(_PACKAGE) is None:
        return
    if _PARENTS[0] not in sys.modules and importlib.util.find_spec(_PARENTS[0]) is not None:
        return
    for name in _PARENTS:
        sys.modules.setdefault(name, ModuleType(name))
    # Python finds the modules inside through the path of this one.
    sys.modules[f"{_PARENTS[-1]}.{_PACKAGE}"] = importlib.import_module(_PACKAGE)
