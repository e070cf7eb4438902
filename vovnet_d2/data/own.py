# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Data sets of one's own, in COCO's format.

A config describes them (``DATASETS.OWN``): where they are and what their categories are called. So
whatever loads the config knows the data set, and where the files are not at hand, the names.
"""

from __future__ import annotations

import json
import logging
import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import pycocotools.mask as mask_util
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.catalog import Metadata
from detectron2.structures import BoxMode
from pycocotools.coco import COCO

from .check.masks import has_mask
from .keypoints import Flips

__all__ = ["OwnDataSet", "match_categories", "register_own_data"]

logger = logging.getLogger(__name__)

Record = dict[str, Any]

_OF_KEYPOINTS = {"keypoints", "keypoint_flips"}


@dataclass(frozen=True)
class OwnDataSet:
    """
    Attributes:
        name: it is registered under.
        json: the annotation file.
        images: the folder that ``file_name`` in it is relative to.
        categories: names, in the order of the network's outputs.
        category_ids: theirs in the annotation file.
        keypoints: names, in the order of the network's outputs; none for other networks.
        keypoint_flips: pairs of names that change places in a mirrored picture.
    """

    name: str
    json: str
    images: str
    categories: tuple[str, ...]
    category_ids: tuple[int | str, ...]
    keypoints: tuple[str, ...] = ()
    keypoint_flips: Flips = ()

    @classmethod
    def from_config(cls, entry: Any) -> OwnDataSet:
        """
        Args:
            entry: of ``DATASETS.OWN``.

        Raises:
            ValueError: a key is missing or too many, or there is not one id for each name.
        """
        keys = [field.name for field in fields(cls)]
        if not isinstance(entry, dict) or entry.keys() | _OF_KEYPOINTS != set(keys):
            raise ValueError(f"DATASETS.OWN has {entry!r}: an entry has the keys {keys}.")
        names, ids = entry["categories"], entry["category_ids"]
        if not isinstance(names, Sequence) or len(names) != len(ids):
            raise ValueError(
                f"Data set {entry['name']} of DATASETS.OWN has categories {names!r} and "
                f"category_ids {ids!r}: each name needs an id."
            )
        values = {**entry, "categories": tuple(map(str, names)), "category_ids": tuple(ids)}
        if "keypoints" in entry:
            values["keypoints"] = tuple(entry["keypoints"])
            values["keypoint_flips"] = tuple(map(tuple, entry.get("keypoint_flips", ())))
        return cls(**values)

    def to_config(self) -> Record:
        """What :meth:`from_config` takes, of the types that YAML knows."""
        values = asdict(self)
        found = {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
        if not self.keypoints:
            return {k: v for k, v in found.items() if k not in _OF_KEYPOINTS}
        return found | {"keypoint_flips": [list(pair) for pair in self.keypoint_flips]}

    def load(self) -> list[Record]:
        """Its images in Detectron2's format.

        Raises:
            ValueError: the annotation file is not in COCO's format, or has other categories.
        """
        try:
            records = _load_records(self.json, self.images)
        except (AssertionError, AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{self.json} is not in COCO's format ({type(error).__name__}: {error}). "
                "tools/check_dataset.py lists what is wrong with it."
            ) from error
        numbers = {category: number for number, category in enumerate(self.category_ids)}
        for record in records:
            for annotation in record["annotations"]:
                category = annotation["category_id"]
                if category not in numbers:
                    raise ValueError(
                        f"{self.json} has an annotation of category {category!r}, which is none of "
                        f"the {len(numbers)} that the network was made for: "
                        f"{dict(zip(self.category_ids, self.categories, strict=True))}."
                    )
                annotation["category_id"] = numbers[category]
                if self.keypoints:  # all objects of an image need them, labelled or not
                    annotation.setdefault("keypoints", [0] * 3 * len(self.keypoints))
        return records

    def register(self) -> None:
        """
        Raises:
            ValueError: the name is that of a data set that is none of one's own.
        """
        if self.name in DatasetCatalog:
            other = MetadataCatalog.get(self.name).get("own_data_set")
            if other == self:
                return
            if other is None:
                raise ValueError(
                    f"DATASETS.OWN has the name {self.name!r}, which is that of another data set."
                )
            DatasetCatalog.remove(self.name)
            MetadataCatalog.remove(self.name)
        DatasetCatalog.register(self.name, self.load)
        numbers = {category: number for number, category in enumerate(self.category_ids)}
        MetadataCatalog.get(self.name).set(
            own_data_set=self,
            thing_classes=list(self.categories),
            thing_dataset_id_to_contiguous_id=numbers,
            json_file=self.json,
            image_root=self.images,
            evaluator_type="coco",
        )
        if self.keypoints:
            MetadataCatalog.get(self.name).set(
                keypoint_names=list(self.keypoints), keypoint_flip_map=list(self.keypoint_flips)
            )


def register_own_data(entries: Sequence[Any]) -> None:
    """Register data sets with Detectron2, in place of earlier ones of one's own of their names.

    Args:
        entries: ``DATASETS.OWN`` of a config.

    Raises:
        ValueError: an entry is not one of :meth:`OwnDataSet.to_config`, or its name is taken.
    """
    for entry in entries:
        OwnDataSet.from_config(entry).register()


def _load_records(file: str, images: str) -> list[Record]:
    """Load a file as Detectron2's ``load_coco_json`` does, but for objects without a usable mask:
    they stay with their boxes, and a training of masks refuses them."""
    content = json.loads(Path(file).read_bytes())
    by_image: defaultdict[Any, list[Record]] = defaultdict(list)
    for annotation in content["annotations"]:
        by_image[annotation["image_id"]].append(annotation)
    listed = sorted(content["images"], key=lambda image: image["id"])
    lost = len(content["annotations"]) - sum(len(by_image[image["id"]]) for image in listed)
    if lost:
        logger.warning("%s has %d annotations of images that it does not list.", file, lost)
    without_mask = sum(
        bool(a.get("segmentation")) and not has_mask(a) for a in content["annotations"]
    )
    if without_mask:
        logger.warning(
            "%s has %d objects whose masks have no polygon of three points: they count with their "
            "boxes alone.",
            *(file, without_mask),
        )
    return [
        {
            "file_name": os.path.join(images, image["file_name"]),
            "height": image["height"],
            "width": image["width"],
            "image_id": image["id"],
            "annotations": [_load_object(a) for a in by_image[image["id"]]],
        }
        for image in listed
    ]


def _load_object(annotation: Record) -> Record:
    if annotation.get("ignore", 0):
        raise ValueError(f'annotation {annotation.get("id")!r} has "ignore"')
    keys = ("iscrowd", "bbox", "category_id")
    found = {key: annotation[key] for key in keys if key in annotation}
    if has_mask(annotation):
        mask = annotation["segmentation"]
        if isinstance(mask, dict):
            if isinstance(mask["counts"], list):
                mask = mask_util.frPyObjects(mask, *mask["size"])
        else:
            mask = [p for p in mask if len(p) % 2 == 0 and len(p) >= 6]
        found["segmentation"] = mask
    if points := annotation.get("keypoints"):
        # From indices of pixels to coordinates of their centres.
        found["keypoints"] = [n if i % 3 == 2 else n + 0.5 for i, n in enumerate(points)]
    return found | {"bbox_mode": BoxMode.XYWH_ABS}


def match_categories(truth: COCO, metadata: Metadata) -> None:
    """Give annotations the categories of the network and no others: evaluations compare category by
    category. What a file lacks does not occur in it, nor does what it has beyond them."""
    own: OwnDataSet | None = metadata.get("own_data_set")
    if own is None:
        return
    names = dict(zip(own.category_ids, own.categories, strict=True))
    truth.cats = {number: {"id": number, "name": name} for number, name in names.items()}
    truth.dataset["categories"] = list(truth.cats.values())
    for annotation in truth.anns.values() if own.keypoints else ():  # pycocotools needs both
        points = annotation.setdefault("keypoints", [0] * 3 * len(own.keypoints))
        annotation.setdefault("num_keypoints", sum(v > 0 for v in points[2::3]))
