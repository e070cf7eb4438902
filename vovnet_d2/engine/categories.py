# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""The names of the categories that a network predicts by number."""

import logging
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.catalog import Metadata

from ..checkpoint.checkpointer import CATEGORY_KINDS, VoVNetCheckpointer
from ..data import register_digits
from ..data.own import register_own_data
from ..errors import describe
from .num_classes import find_num_classes

logger = logging.getLogger(__name__)

_LACKING: Any = object()  # differs from every name

Names = Mapping[str, Sequence[str]]  # by kind: thing_classes, stuff_classes


def category_names(data_sets: Sequence[str]) -> dict[str, list[str]]:
    """Return the names of the categories of the first data set, by kind, for the checkpoints."""
    if not data_sets or data_sets[0] not in DatasetCatalog:
        return {}
    metadata = MetadataCatalog.get(data_sets[0])
    return {kind: list(metadata.get(kind)) for kind in CATEGORY_KINDS if metadata.get(kind)}


def find_difference(
    cfg: CfgNode, data_sets: Sequence[str], checkpointer: VoVNetCheckpointer
) -> str:
    """Compare the categories of the last loaded weights with those of a data set. The numbers may
    be equal though the names differ.

    Args:
        data_sets: ``DATASETS.TRAIN`` or ``DATASETS.TEST``; the first counts.

    Returns:
        a sentence; empty if there is no difference, or the file does not tell its categories, or
        lacks the parts of the network that predict them.
    """
    if checkpointer.missing_outside_backbone or not data_sets:
        return ""
    return _compare(cfg, data_sets[0], checkpointer.loaded_categories)


def _compare(cfg: CfgNode, data_set: str, weights: Names) -> str:
    names = category_names([data_set])
    for kind in find_num_classes(cfg) or CATEGORY_KINDS:
        told, known = weights.get(kind, ()), names.get(kind, ())
        if len(told) != len(known):
            continue
        if unequal := first_difference(told, known):
            return (
                "The weights were trained on other categories than {} has: number {} is {!r} for "
                "them, and {!r} there.".format(data_set, *unequal)
            )
    return ""


def first_difference(names: Sequence[str], others: Sequence[str]) -> tuple[int, str, str] | None:
    """Return the index of the first category whose names differ in two lists, and both names; None
    if the lists are equal. A name that a list lacks is "missing".
    """
    for index, (a, b) in enumerate(zip_longest(names, others, fillvalue=_LACKING)):
        if a != b:
            a, b = ("missing" if name is _LACKING else name for name in (a, b))
            return index, a, b
    return None


def find_metadata(cfg: CfgNode, weights: Names | None = None) -> Metadata:
    """Return the names and colours of the categories that a config's network predicts.

    They come from the first data set in ``DATASETS.TEST``, then ``DATASETS.TRAIN``, that is
    registered and has the number and the names of categories of the network and its weights.
    Without such a data set, the names come from the weights, see
    :attr:`VoVNetCheckpointer.loaded_categories`. If the weights have no names, the categories are
    numbers from 0, and a warning says so.

    Raise ValueError if ``DATASETS.OWN`` is not what it should be.
    """
    register_digits()
    register_own_data(cfg.DATASETS.OWN)
    obstacles = []
    for name in dict.fromkeys((*cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN)):
        if not (obstacle := _find_obstacle(cfg, name)):
            if not (difference := _compare(cfg, name, weights or {})):
                return MetadataCatalog.get(name)
            logger.warning("%s They are named as the weights say.", difference)
        obstacles.append(obstacle)
    counts = find_num_classes(cfg)
    if weights and all(len(weights.get(kind, ())) == count for kind, count in counts.items()):
        return Metadata(name="categories of the weights", **weights)
    logger.warning(
        "Categories go by their numbers: %s.", "; ".join(obstacles) or "the config has no DATASETS"
    )
    numbers = {kind: [str(number) for number in range(count)] for kind, count in counts.items()}
    return Metadata(name="categories by number", **numbers)


def _find_obstacle(cfg: CfgNode, name: str) -> str:
    """Return the reason why a data set does not name the categories of the network, or ""."""
    if name not in DatasetCatalog:
        return f"{name} is not registered here"
    metadata = MetadataCatalog.get(name)
    if not (metadata.get("thing_classes") or metadata.get("stuff_classes")):
        try:
            DatasetCatalog.get(name)  # some have their metadata from then on
        except Exception as error:  # anybody's code
            return f"{name} cannot be loaded ({describe(error)})"
    for kind, count in find_num_classes(cfg).items():
        if len(classes := metadata.get(kind, [])) != count:
            return f"{name} has {len(classes)} {kind} and the network {count}"
    return ""
