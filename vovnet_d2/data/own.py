# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Custom data sets in COCO's format.

A config describes such a data set (``DATASETS.OWN``): the files, and the names of the categories.
So every tool that loads the config knows the data set, and knows the names even without the files.
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

from ..errors import UserValueError, describe
from ..words import counted
from .check.masks import has_mask
from .keypoints import Flips

logger = logging.getLogger(__name__)

Record = dict[str, Any]

_OF_KEYPOINTS = {"keypoints", "keypoint_flips"}


@dataclass(frozen=True)
class OwnDataSet:
    """Describes a custom data set in COCO's format, as an entry of ``DATASETS.OWN`` does.

    Attributes:
        name: the name under which the data set is registered.
        json: the annotation file.
        images: the folder that each ``file_name`` in the annotation file is relative to.
        categories: the names of the categories, in the order of the network's outputs.
        category_ids: the ids of the categories in the annotation file.
        keypoints: the names of the keypoints, in the order of the network's outputs; empty for
            networks that predict none.
        keypoint_flips: the pairs of names that are swapped in a mirrored picture.
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
        """Return the data set that an entry of ``DATASETS.OWN`` describes. Raise ValueError if a
        key is missing or unknown, or if the numbers of names and ids differ."""
        keys = [field.name for field in fields(cls)]
        if not isinstance(entry, dict) or entry.keys() | _OF_KEYPOINTS != set(keys):
            raise UserValueError(f"DATASETS.OWN has {entry!r}: an entry must have the keys {keys}.")
        names, ids = entry["categories"], entry["category_ids"]
        if not isinstance(names, Sequence) or len(names) != len(ids):
            raise UserValueError(
                f"Data set {entry['name']} of DATASETS.OWN has categories {names!r} and "
                f"category_ids {ids!r}: each name needs an id."
            )
        values = {**entry, "categories": tuple(map(str, names)), "category_ids": tuple(ids)}
        if "keypoints" in entry:
            values["keypoints"] = tuple(entry["keypoints"])
            values["keypoint_flips"] = tuple(map(tuple, entry.get("keypoint_flips", ())))
        return cls(**values)

    def to_config(self) -> Record:
        """Return an entry that :meth:`from_config` takes, in the types of YAML."""
        values = asdict(self)
        found = {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
        if not self.keypoints:
            return {k: v for k, v in found.items() if k not in _OF_KEYPOINTS}
        return found | {"keypoint_flips": [list(pair) for pair in self.keypoint_flips]}

    def load(self) -> list[Record]:
        """Return the images in Detectron2's format. Raise ValueError if the annotation file is not
        in COCO's format, or has other categories."""
        try:
            records = _load_records(self.json, self.images)
        except (AssertionError, AttributeError, KeyError, TypeError, ValueError) as error:
            raise UserValueError(
                f"{self.json} is not in COCO's format ({describe(error)}). "
                "tools/check_dataset.py lists what is wrong with it."
            ) from error
        numbers = {category: number for number, category in enumerate(self.category_ids)}
        for record in records:
            for annotation in record["annotations"]:
                category = annotation["category_id"]
                if category not in numbers:
                    raise UserValueError(
                        f"{self.json} has an annotation of category {category!r}, and the network "
                        f"has only {counted(len(numbers), 'categories')}: "
                        f"{dict(zip(self.category_ids, self.categories, strict=True))}."
                    )
                annotation["category_id"] = numbers[category]
                if self.keypoints:  # all objects of an image need them, labelled or not
                    annotation.setdefault("keypoints", [0] * 3 * len(self.keypoints))
        return records

    def register(self) -> None:
        """Register the data set with Detectron2, unless it is registered already. Raise ValueError
        if a data set of another kind has this name."""
        if self.name in DatasetCatalog:
            other = MetadataCatalog.get(self.name).get("own_data_set")
            if other == self:
                return
            if other is None:
                raise UserValueError(
                    f"DATASETS.OWN has the name {self.name!r}, and another data set has this name: "
                    "choose another name."
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
    """Register the entries of ``DATASETS.OWN`` with Detectron2. Each replaces an earlier custom
    data set of the same name. Raise ValueError if an entry is not one of
    :meth:`OwnDataSet.to_config`, or if its name is taken."""
    for entry in entries:
        OwnDataSet.from_config(entry).register()


def _load_records(file: str, images: str) -> list[Record]:
    """Load a file as Detectron2's ``load_coco_json`` does, but keep the boxes of objects without a
    usable mask. A training of masks refuses such objects."""
    content = json.loads(Path(file).read_bytes())
    by_image: defaultdict[Any, list[Record]] = defaultdict(list)
    for annotation in content["annotations"]:
        by_image[annotation["image_id"]].append(annotation)
    listed = sorted(content["images"], key=lambda image: image["id"])
    lost = len(content["annotations"]) - sum(len(by_image[image["id"]]) for image in listed)
    if lost:
        logger.warning(
            "%s has %s of images that it does not list.", file, counted(lost, "annotations")
        )
    without_mask = sum(
        bool(a.get("segmentation")) and not has_mask(a) for a in content["annotations"]
    )
    if without_mask:
        logger.warning(
            "%s has %s whose masks have no polygon of three points: only their boxes are used.",
            *(file, counted(without_mask, "objects")),
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
        raise UserValueError(f'annotation {annotation.get("id")!r} has "ignore"')
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
        # Indices of pixels become coordinates of their centres.
        found["keypoints"] = [n if i % 3 == 2 else n + 0.5 for i, n in enumerate(points)]
    return found | {"bbox_mode": BoxMode.XYWH_ABS}


def match_categories(truth: COCO, metadata: Metadata) -> None:
    """Give the annotations of an evaluation exactly the categories of the network, because the
    evaluation compares each category. A category that only the network or only the file has, has
    no annotations."""
    own: OwnDataSet | None = metadata.get("own_data_set")
    if own is None:
        return
    names = dict(zip(own.category_ids, own.categories, strict=True))
    truth.cats = {number: {"id": number, "name": name} for number, name in names.items()}
    truth.dataset["categories"] = list(truth.cats.values())
    for annotation in truth.anns.values() if own.keypoints else ():  # pycocotools needs both
        points = annotation.setdefault("keypoints", [0] * 3 * len(own.keypoints))
        annotation.setdefault("num_keypoints", sum(v > 0 for v in points[2::3]))
