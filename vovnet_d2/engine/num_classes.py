# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""The number of categories of a network, by the keys of its meta-architecture."""

from detectron2.config import CfgNode
from detectron2.data.catalog import Metadata

from ..errors import UserValueError
from ..words import counted

# For each meta-architecture: the config nodes with its numbers of classes, by the metadata that has
# the names of the classes.
_NUM_CLASSES = {
    "GeneralizedRCNN": {"thing_classes": "ROI_HEADS"},
    "RetinaNet": {"thing_classes": "RETINANET"},
    "FCOS": {"thing_classes": "FCOS"},
    "RefineDet": {"thing_classes": "SINGLE_SHOT"},
    "SingleShotDetector": {"thing_classes": "SINGLE_SHOT"},
    "SemanticSegmentor": {"stuff_classes": "SEM_SEG_HEAD"},
    "PanopticFPN": {"thing_classes": "ROI_HEADS", "stuff_classes": "SEM_SEG_HEAD"},
}


def find_num_classes(cfg: CfgNode) -> dict[str, int]:
    """Return the numbers of classes of the network, by the metadata that has the names of the
    classes.

    The result is empty for a meta-architecture whose keys are not known here.
    """
    nodes = _NUM_CLASSES.get(cfg.MODEL.META_ARCHITECTURE, {})
    return {kind: cfg.MODEL[node].NUM_CLASSES for kind, node in nodes.items()}


def instance_class_keys() -> list[str]:
    """Return the config keys with the number of categories, for all heads that detect objects."""
    nodes = {kinds["thing_classes"] for kinds in _NUM_CLASSES.values() if "thing_classes" in kinds}
    return [f"MODEL.{node}.NUM_CLASSES" for node in sorted(nodes)]


def check_num_classes(cfg: CfgNode, key: str, name: str, metadata: Metadata) -> None:
    """Raise ValueError if a data set, which a config key such as "DATASETS.TRAIN" names, has
    another number of categories than the network."""
    for kind, node in _NUM_CLASSES.get(cfg.MODEL.META_ARCHITECTURE, {}).items():
        classes = metadata.get(kind)
        if classes and len(classes) != cfg.MODEL[node].NUM_CLASSES:
            raise UserValueError(
                f"Data set {name} of {key} has {counted(len(classes), 'categories')} and the "
                f"network {cfg.MODEL[node].NUM_CLASSES}: set MODEL.{node}.NUM_CLASSES "
                f"{len(classes)}."
            )
