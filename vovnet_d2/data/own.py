# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Data sets of one's own, in COCO's format.

A config describes them (``DATASETS.OWN``): where they are and what their categories are called. So
whatever loads the config knows the data set, and where the files are not at hand, the names.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.catalog import Metadata
from detectron2.data.datasets import load_coco_json
from pycocotools.coco import COCO

__all__ = ["OwnDataSet", "complete_categories", "register_own_data"]

Record = dict[str, Any]


@dataclass(frozen=True)
class OwnDataSet:
    """
    Attributes:
        name: it is registered under.
        json: the annotation file.
        images: the folder that ``file_name`` in it is relative to.
        categories: names, in the order of the network's outputs.
        category_ids: theirs in the annotation file.
    """

    name: str
    json: str
    images: str
    categories: tuple[str, ...]
    category_ids: tuple[int, ...]

    @classmethod
    def from_config(cls, entry: Any) -> OwnDataSet:
        """
        Args:
            entry: of ``DATASETS.OWN``.

        Raises:
            ValueError: a key is missing or too many, or there is not one id for each name.
        """
        keys = [field.name for field in fields(cls)]
        if not isinstance(entry, dict) or entry.keys() != set(keys):
            raise ValueError(f"DATASETS.OWN has {entry!r}: an entry has the keys {keys}.")
        names, ids = entry["categories"], entry["category_ids"]
        if not isinstance(names, Sequence) or len(names) != len(ids):
            raise ValueError(
                f"Data set {entry['name']} of DATASETS.OWN has categories {names!r} and "
                f"category_ids {ids!r}: each name needs an id."
            )
        values = {**entry, "categories": tuple(map(str, names)), "category_ids": tuple(ids)}
        return cls(**values)

    def to_config(self) -> Record:
        """What :meth:`from_config` takes, of the types that YAML knows."""
        values = asdict(self)
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

    def load(self) -> list[Record]:
        """Its images in Detectron2's format.

        Raises:
            ValueError: the annotation file is not in COCO's format, or has other categories.
        """
        try:
            records = load_coco_json(self.json, self.images)
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


def register_own_data(entries: Sequence[Any]) -> None:
    """Register data sets with Detectron2, in place of earlier ones of one's own of their names.

    Args:
        entries: ``DATASETS.OWN`` of a config.

    Raises:
        ValueError: an entry is not one of :meth:`OwnDataSet.to_config`, or its name is taken.
    """
    for entry in entries:
        OwnDataSet.from_config(entry).register()


def complete_categories(truth: COCO, metadata: Metadata) -> None:
    """Give annotations all categories of the network, where their file lacks some that do not occur
    in it: evaluations compare category by category."""
    own: OwnDataSet | None = metadata.get("own_data_set")
    if own is None:
        return
    for category, name in zip(own.category_ids, own.categories, strict=True):
        if category not in truth.cats:
            truth.cats[category] = {"id": category, "name": name}
    truth.dataset["categories"] = list(truth.cats.values())
