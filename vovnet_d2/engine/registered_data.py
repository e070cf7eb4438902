# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Data sets are registered and loaded, or a sentence says why they cannot be."""

import argparse
import importlib.util
import os
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.catalog import Metadata

from ..data import register_digits
from ..data.check.registered import find_foreign_file, states_categories
from ..data.cityscapes import provide_cityscapes_scripts
from ..data.own import register_own_data
from ..data.voc import register_voc
from ..errors import UserFileNotFoundError, UserValueError, describe, one_line
from .main_process import in_main_process
from .own_data import use_own_data


def register_package_data() -> None:
    """Register the data sets that Detectron2 does not know or cannot evaluate by itself."""
    register_digits()
    register_voc()
    provide_cityscapes_scripts()


def register_data(
    cfg: CfgNode, args: argparse.Namespace, *, training: bool, folder: str = ""
) -> None:
    """Register the data sets that a config may name, and complete the config by the user's files.
    For the arguments see :func:`use_own_data`.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: see :func:`use_own_data` and :func:`register_own_data`.
    """
    register_package_data()
    use_own_data(cfg, args, training=training, folder=folder)
    register_own_data(cfg.DATASETS.OWN)


def load_records(name: str) -> list[dict[str, Any]]:
    """Load a registered data set in Detectron2's format. Raise ValueError if its files cannot be
    used."""
    try:
        return DatasetCatalog.get(name)
    except Exception as error:
        if not _is_of_data(error):
            raise
        raise _loading_error(name, error, evaluated=False) from error


def load_metadata(name: str, *, evaluated: bool) -> Metadata:
    """Return the metadata of a data set. If its categories or files are missing, load it first. For
    an evaluation (``evaluated``), look for its files too.

    Some data sets have their categories only once they are loaded, and some write their files then.

    Raises:
        FileNotFoundError: files of the data set are missing.
        ValueError: the data set cannot be loaded, or a file belongs to another data set.
    """
    metadata = MetadataCatalog.get(name)
    known = metadata.get("thing_classes") or metadata.get("stuff_classes")
    failure: Exception | None = None
    if not known or _find_missing(metadata, evaluated):
        try:
            DatasetCatalog.get(name)
        except Exception as error:
            if not _is_of_data(error):
                raise
            failure = error
    if missing := _find_missing(metadata, evaluated):
        raise UserFileNotFoundError(_describe_missing(name, missing)) from failure
    if failure:
        raise _loading_error(name, failure, evaluated=evaluated) from failure
    if known and states_categories(name):
        _require_named_file(name, "val" if evaluated else "train")
    return metadata


def _find_missing(metadata: Metadata, evaluated: bool) -> list[str]:
    return [path for path in _paths(metadata, evaluated) if not os.path.exists(path)]


def _paths(metadata: Metadata, evaluated: bool) -> list[str]:
    keys = ["json_file", "image_root", "image_dir", "gt_dir", "dirname", "sem_seg_root"]
    if evaluated and importlib.util.find_spec("panopticapi"):  # see _panoptic in evaluation.py
        keys += ["panoptic_root", "panoptic_json"]
    return [metadata.get(key) for key in keys if metadata.get(key)]


def _describe_missing(name: str, missing: Sequence[str]) -> str:
    what = ", ".join(map(os.path.abspath, missing))
    if MetadataCatalog.get(name).get("own_data_set"):
        return (
            f"Data set {name} is not where DATASETS.OWN has it; missing: {what}. Say where it is "
            "now with --train-annotations and --train-images, or --val-annotations and "
            "--val-images."
        )
    root = os.environ.get("DETECTRON2_DATASETS")
    where = f"which is {root}" if root else f"unset, so {os.path.abspath('datasets')}"
    return (
        f"Data set {name} is not complete; missing: {what}. Detectron2's own data sets are looked "
        f"for in DETECTRON2_DATASETS ({where}): `export DETECTRON2_DATASETS=FOLDER`, the folder "
        "that holds coco/, VOC2007/ and so on."
    )


def _require_named_file(name: str, split: str) -> None:
    """Refuse a file that belongs to another data set. The main process reads it for all."""
    if found := in_main_process(lambda: find_foreign_file(name)):
        metadata = MetadataCatalog.get(name)
        file, folder = metadata.get("json_file", "FILE"), metadata.get("image_root", "FOLDER")
        raise UserValueError(
            f"Data set {name} is not what it is registered as: {found}. If these are data of your "
            f"own, leave the name out and give --{split}-annotations {file} --{split}-images "
            f"{folder}."
        )


def _loading_error(name: str, error: Exception, *, evaluated: bool) -> UserValueError:
    metadata = MetadataCatalog.get(name)
    source = next(iter(_paths(metadata, evaluated)), "the function that is registered for it")
    hint = " tools/check_dataset.py lists all that is wrong with it." * bool(
        metadata.get("json_file")
    )
    return UserValueError(
        f"Data set {name} cannot be loaded from {source}: {describe(error)}.{hint}"
    )


@contextmanager
def explain_loading() -> Iterator[None]:
    """Raise a ValueError with a sentence if training data cannot be loaded in this context, or have
    no image to train on."""
    try:
        yield
    except Exception as error:
        # Detectron2 raises AssertionError if no image is left to train on.
        if not isinstance(error, AssertionError) and not _is_of_loader(error):
            raise
        reason = one_line(error) if isinstance(error, AssertionError) else describe(error)
        raise UserValueError(
            f"The data to train on cannot be loaded: {reason}. "
            "tools/check_dataset.py lists what is wrong with annotations in COCO's format."
        ) from error


def _is_of_data(error: Exception) -> bool:
    """Return True if an error says that files cannot be used. Other errors are bugs of the
    function that loads them.
    """
    kinds = AssertionError | KeyError | OSError | ValueError
    return isinstance(error, kinds) or _is_of_loader(error)


def _is_of_loader(error: Exception) -> bool:
    """Return True if an error comes from Detectron2's own loaders of data sets.

    These loaders raise errors of all kinds if a file has something unexpected.
    """
    frames = traceback.walk_tb(error.__traceback__)
    modules = (frame.f_globals.get("__name__", "") for frame, _ in frames)
    return any(module.startswith("detectron2.data.datasets.") for module in modules)
