# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""PASCAL VOC without its difficult objects.

Detectron2 registers ``voc_2007_trainval`` and so on, whose loader takes difficult objects for
objects like any others, as DSOD does. RefineDet is trained without them.
"""

from __future__ import annotations

import os
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.pascal_voc import CLASS_NAMES
from detectron2.structures import BoxMode
from detectron2.utils.file_io import PathManager

__all__ = ["load_voc", "parse_annotations", "read_objects", "register_voc"]

Record = dict[str, Any]


def load_voc(dirname: str, split: str, class_names: Sequence[str] = CLASS_NAMES) -> list[Record]:
    """A split in Detectron2's format; difficult objects have ``iscrowd`` 1, which keeps them out of
    the training.

    Args:
        dirname: holds "Annotations", "ImageSets" and "JPEGImages".
        split: a file of "ImageSets/Main" without its suffix, such as "trainval".

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: an object of a class that is not in ``class_names``.
    """
    listing = os.path.join(dirname, "ImageSets", "Main", f"{split}.txt")
    with PathManager.open(listing) as file:
        names = [line.split()[0] for line in file if line.strip()]
    return [_load_image(dirname, name, list(class_names)) for name in names]


def _load_image(dirname: str, name: str, class_names: list[str]) -> Record:
    path = os.path.join(dirname, "Annotations", f"{name}.xml")
    tree = parse_annotations(path)
    annotations = []
    for found in read_objects(tree):
        if found["name"] not in class_names:
            raise ValueError(
                f"{path} has an object of class {found['name']!r}, which is not among "
                f"{', '.join(class_names)}."
            )
        left, top, right, bottom = found["bbox"]
        annotations.append(
            {
                "category_id": class_names.index(found["name"]),
                # Pixels are counted from 1 and the last one belongs to the object.
                "bbox": [left - 1, top - 1, right, bottom],
                "bbox_mode": BoxMode.XYXY_ABS,
                "iscrowd": found["difficult"],
            }
        )
    return {
        "file_name": os.path.join(dirname, "JPEGImages", f"{name}.jpg"),
        "image_id": name,
        "height": int(_text(tree, "size/height")),
        "width": int(_text(tree, "size/width")),
        "annotations": annotations,
    }


def parse_annotations(path: str) -> ElementTree.Element:
    with PathManager.open(path) as file:
        return ElementTree.parse(file).getroot()


def read_objects(tree: ElementTree.Element) -> list[Record]:
    """The objects of an annotation file: "name", "difficult" (0 or 1) and "bbox" (the four numbers
    as they are written, fractions included).

    Raises:
        ValueError: an object lacks its name or a number.
    """
    return [
        {
            "name": _text(item, "name"),
            "difficult": int(item.findtext("difficult", "0")),
            "bbox": [float(_text(item, f"bndbox/{k}")) for k in ("xmin", "ymin", "xmax", "ymax")],
        }
        for item in tree.findall("object")
    ]


def _text(element: ElementTree.Element, path: str) -> str:
    text = element.findtext(path)
    if text is None:
        raise ValueError(f"An annotation of PASCAL VOC lacks {path!r} in its {element.tag!r}.")
    return text


def register_voc() -> None:
    """Register ``voc_{2007,2012}_{train,val,trainval,test}_no_difficult``; a second call does
    nothing. Like Detectron2's own they lie under ``$DETECTRON2_DATASETS``."""
    root = Path(os.environ.get("DETECTRON2_DATASETS", "datasets")).expanduser()
    for year in (2007, 2012):
        dirname = str(root / f"VOC{year}")
        for split in ("train", "val", "trainval", "test"):
            name = f"voc_{year}_{split}_no_difficult"
            if name in DatasetCatalog or (year, split) == (2012, "test"):  # which has no boxes
                continue
            DatasetCatalog.register(name, partial(load_voc, dirname, split))
            MetadataCatalog.get(name).set(
                thing_classes=list(CLASS_NAMES),
                dirname=dirname,
                year=year,
                split=split,
                evaluator_type="pascal_voc",
            )
