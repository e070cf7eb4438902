# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""What the numbers that a network predicts stand for."""

from __future__ import annotations

import logging

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.catalog import Metadata

from ..data import register_digits
from ..data.own import register_own_data
from .checks import find_num_classes

__all__ = ["find_metadata"]

logger = logging.getLogger(__name__)


def find_metadata(cfg: CfgNode) -> Metadata:
    """Names and colours of the categories that a config's network predicts.

    They are those of the first data set in ``DATASETS.TEST``, then ``DATASETS.TRAIN``, that is
    registered and has as many categories as the network. Where there is none, the names are
    numbers from 0, and a warning says so.

    Raises:
        ValueError: ``DATASETS.OWN`` is not what it should be.
    """
    register_digits()
    register_own_data(cfg.DATASETS.OWN)
    obstacles = []
    for name in dict.fromkeys((*cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN)):
        if not (obstacle := _find_obstacle(cfg, name)):
            return MetadataCatalog.get(name)
        obstacles.append(obstacle)
    logger.warning(
        "Categories go by their numbers: %s.", "; ".join(obstacles) or "the config has no DATASETS"
    )
    numbers = {
        kind: [str(number) for number in range(count)]
        for kind, count in find_num_classes(cfg).items()
    }
    return Metadata(name="categories by number", **numbers)


def _find_obstacle(cfg: CfgNode, name: str) -> str:
    """Why a data set does not name the network's categories; empty if it does."""
    if name not in DatasetCatalog:
        return f"{name} is not registered here"
    metadata = MetadataCatalog.get(name)
    if not (metadata.get("thing_classes") or metadata.get("stuff_classes")):
        try:
            DatasetCatalog.get(name)  # some have their metadata from then on
        except Exception as error:  # anybody's code
            return f"{name} cannot be loaded ({type(error).__name__}: {error})"
    for kind, count in find_num_classes(cfg).items():
        if len(classes := metadata.get(kind, [])) != count:
            return f"{name} has {len(classes)} {kind} and the network {count}"
    return ""
