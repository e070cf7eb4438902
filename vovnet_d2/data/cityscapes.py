# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Support for Cityscapes: its scripts get the name that newer versions of Detectron2 import, and
its files are checked."""

import importlib
import importlib.util
import json
import os
import sys
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import ModuleType

from ..errors import UserValueError, describe

_PACKAGE = "cityscapesscripts"
_PARENTS = ("deeplearning", "deeplearning.projects", "deeplearning.projects.cityscapesApi")


def provide_cityscapes_scripts() -> None:
    """Let ``import deeplearning.projects.cityscapesApi.cityscapesscripts`` find the package
    ``cityscapesscripts``.

    Versions of Detectron2 since 2024 import Cityscapes' scripts by the first name, which exists
    only inside Meta. This function does nothing if that package exists or the scripts are not
    installed.
    """
    if importlib.util.find_spec(_PACKAGE) is None:
        return
    if _PARENTS[0] not in sys.modules and importlib.util.find_spec(_PARENTS[0]) is not None:
        return
    for name in _PARENTS:
        sys.modules.setdefault(name, ModuleType(name))
    # Python finds the modules inside the package by the path of the package.
    sys.modules[f"{_PARENTS[-1]}.{_PACKAGE}"] = importlib.import_module(_PACKAGE)


_PICTURE, _OBJECTS = "leftImg8bit.png", "gtFine_polygons.json"
_WAY_OUT = (
    "for a custom data set give --train-annotations and --val-annotations, in a format that --help "
    "names, and no name of Cityscapes"
)


def check_cityscapes(image_dir: str, gt_dir: str) -> None:
    """Check the files of a split before a run. Both folders have a folder for each city. The
    classes of objects are checked only if Cityscapes' scripts are installed. A training on objects
    needs these scripts anyway.

    Raises:
        ValueError: there is no picture, a file name is not one of Cityscapes, annotations are
            missing or malformed, or an object has an unknown class. The message names the first
            file.
    """
    cities = [path for path in sorted(Path(image_dir).iterdir()) if path.is_dir()]
    pictures = [path for city in cities for path in sorted(city.iterdir())]
    if not pictures:
        raise UserValueError(f"{image_dir} has no pictures in folders of cities: {_WAY_OUT}.")
    classes = _class_names()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        problems = pool.map(partial(_find_problem, Path(gt_dir), classes), pictures)
        if problem := next(filter(None, problems), ""):
            raise UserValueError(problem)


def _class_names() -> Collection[str]:
    if importlib.util.find_spec(_PACKAGE) is None:
        return ()
    labels = importlib.import_module(f"{_PACKAGE}.helpers.labels")
    return labels.name2label.keys()


def _find_problem(gt_dir: Path, classes: Collection[str], picture: Path) -> str:
    if not picture.name.endswith(_PICTURE):
        return (
            f"{picture} is not a picture of Cityscapes, whose names end in {_PICTURE}: {_WAY_OUT}."
        )
    path = gt_dir / picture.parent.name / (picture.name.removesuffix(_PICTURE) + _OBJECTS)
    if not path.is_file():
        return f"There is no annotation file {path} for {picture}."
    try:
        content = json.loads(path.read_bytes())
        names = [str(item["label"]) for item in content["objects"] if "deleted" not in item]
    except (KeyError, TypeError, ValueError) as error:
        return f"{path} is not an annotation file of Cityscapes ({describe(error)})."
    wrong = [n for n in names if n not in classes and n.removesuffix("group") not in classes]
    if classes and wrong:
        found = f"an object of class {wrong[0]!r}, which Cityscapes does not have"
        return f"{path} has {found}: {_WAY_OUT}."
    return ""
