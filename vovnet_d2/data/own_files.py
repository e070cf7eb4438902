# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""An annotation file of one's own, read to know what to set up for it.

What would stop or spoil a run is refused at its first place; tools/check_dataset.py lists all.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from .check.masks import has_mask, is_box_mask
from .check.names import NearNames
from .check.problems import PROBLEMS, Findings
from .check.reading import SECTIONS, read_annotation_file
from .check.records import find_unused_supercategories
from .check.values import are_numbers, as_id, is_number, is_text, is_whole
from .keypoints import find_problem, keypoint_names

__all__ = ["Contents", "read_coco", "read_contents"]

_HINT = "tools/check_dataset.py lists all that is wrong with a file, and writes a corrected copy."
_NUM_LOOKED_FOR = 20


@dataclass(frozen=True)
class Contents:
    """
    Attributes:
        categories: names by id, in the order of ids.
        num_images: images, listed.
        num_trainable: images with an annotation that is no crowd.
        num_annotations: crowds included.
        num_crowds: of these.
        used: the ids of categories that have annotations.
        num_without_mask: annotations that are no crowds and have no mask that can be used.
        num_encoded_masks: annotations that are no crowds and have RLE for one.
        num_box_masks: annotations that are no crowds and have a rectangle for one.
        unused_supercategories: names of categories without annotations that others name as their
            supercategory.
        keypoints: names of the keypoints of an object.
        keypoint_problem: why the file cannot be used for keypoints; empty if it can.
    """

    categories: dict[int | str, str]
    num_images: int
    num_trainable: int
    num_annotations: int
    num_crowds: int
    used: set[int | str]
    num_without_mask: int
    num_encoded_masks: int
    num_box_masks: int
    unused_supercategories: list[str]
    keypoints: tuple[str, ...]
    keypoint_problem: str


def read_contents(json: str, images: str, *, evaluated: bool) -> Contents:
    """
    Args:
        json: annotation file.
        images: folder of the images.
        evaluated: whether it is to be evaluated on, for which pycocotools needs more than training.

    Raises:
        FileNotFoundError: there is no such file or folder, or it does not hold the images.
        ValueError: the file is not in COCO's format.
    """
    if not os.path.isfile(json):
        raise FileNotFoundError(f"There is no annotation file {json}.")
    if not os.path.isdir(images):
        raise FileNotFoundError(f"There is no folder of images {images}.")
    content, contents = _read(json, evaluated=evaluated, any_encoding=False)
    _look_for_images(json, images, [image["file_name"] for image in content["images"]])
    return contents


def read_coco(json: str) -> dict[str, Any]:
    """Read a file in COCO's format, whatever its encoding, to convert it.

    Raises:
        ValueError: the file is not in COCO's format.
    """
    return _read(json, evaluated=False, any_encoding=True)[0]


def _read(json: str, *, evaluated: bool, any_encoding: bool) -> tuple[dict[str, Any], Contents]:
    findings = Findings()
    content = read_annotation_file(Path(json), findings)
    for problem, examples in findings.examples.items():
        if problem == "encoding" and any_encoding:
            continue
        raise ValueError(
            f"{json} is not in COCO's format: {PROBLEMS[problem].title} ({examples[0]}). {_HINT}"
        )
    assert content is not None
    for section in SECTIONS:
        _check_fields(json, section, content[section], evaluated)
    _check_ids(json, content)
    return content, _count(json, content)


def _is_file_name(value: Any) -> bool:
    return isinstance(value, str) and value.strip() != ""


def _is_name(value: Any) -> bool:
    """Return whether a category can go by ``value``: text, or a number, which is read as text."""
    return is_text(value) or is_number(value)


def _is_id(value: Any) -> bool:
    return is_text(value) or (
        isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63
    )


def _is_box(value: Any) -> bool:
    return are_numbers(value) and len(value) == 4


_Fields = dict[str, Callable[[Any], bool]]
_FIELDS: dict[str, _Fields] = {
    "categories": {"id": _is_id, "name": _is_name},
    "images": {"id": _is_id, "file_name": _is_file_name, "height": is_whole, "width": is_whole},
    "annotations": {
        "id": _is_id,
        "image_id": _is_id,
        "category_id": _is_id,
        "bbox": _is_box,
    },
}
# What the evaluators count with: matches are found by the numbers of annotations.
_FIELDS_TO_EVALUATE: _Fields = {
    "id": is_whole,
    "area": is_number,
    "iscrowd": lambda value: value in (0, 1),
}


def _check_fields(json: str, section: str, records: list[dict[str, Any]], evaluated: bool) -> None:
    required = _FIELDS[section]
    if section == "annotations" and evaluated:
        required = required | _FIELDS_TO_EVALUATE
    if not records:
        raise ValueError(f"{json} has no {section}. {_HINT}")
    for index, record in enumerate(records):
        for key, is_valid in required.items():
            if key not in record or not is_valid(record[key]):
                found = f"{key} {record[key]!r:.60}" if key in record else f"no {key}"
                raise ValueError(f"{json}: {section}[{index}] has {found}. {_HINT}")


def _check_ids(json: str, content: dict[str, Any]) -> None:
    """Ids may be numbers or text, but those of one list must compare with each other."""
    for section in ("categories", "images"):
        ids = [record["id"] for record in content[section]]
        first = next((i for i in ids if isinstance(i, str) != isinstance(ids[0], str)), None)
        if first is not None:
            raise ValueError(
                f"{json}: {section} have numbers and text for ids, {ids[0]!r} and {first!r} for "
                f"two: write all of one kind. {_HINT}"
            )
    for section in ("images", "annotations"):
        ids = [record["id"] for record in content[section]]
        if len(set(ids)) < len(ids):
            twice = next(i for i, count in Counter(ids).items() if count > 1)
            raise ValueError(f"{json}: two of its {section} have the id {twice!r}. {_HINT}")
    listed = {image["id"] for image in content["images"]}
    for index, annotation in enumerate(content["annotations"]):
        meant = annotation["image_id"]
        if meant not in listed and (str(meant) in listed or as_id(meant) in listed):
            raise ValueError(
                f"{json}: annotations[{index}] has image_id {meant!r}, and the images have ids "
                f"such as {content['images'][0]['id']!r}: write numbers or text in both. {_HINT}"
            )


def _look_for_images(json: str, folder: str, names: list[str]) -> None:
    """Not for all of them: a training names the ones that are missing."""
    if not any(os.path.exists(os.path.join(folder, name)) for name in names[:_NUM_LOOKED_FOR]):
        near = NearNames(folder).find(names[0])
        cause = f" The file that is meant seems to be {near!r}: {_HINT}" if near else ""
        raise FileNotFoundError(
            f"{folder} does not hold the images of {json}, where {names[0]!r} is the first: the "
            f"file names are relative to the folder.{cause}"
        )


def _count(json: str, content: dict[str, Any]) -> Contents:
    categories: dict[int | str, str] = {}
    for category in sorted(content["categories"], key=lambda c: c["id"]):
        name = str(category["name"])
        if category["id"] in categories or name in categories.values():
            raise ValueError(
                f"{json} has two categories with the id {category['id']} or the name "
                f"{name!r}. {_HINT}"
            )
        categories[category["id"]] = name
    annotations = content["annotations"]
    for index, annotation in enumerate(annotations):
        if annotation["category_id"] not in categories:
            known = ", ".join(str(category) for category in islice(categories, 10))
            raise ValueError(
                f"{json}: annotations[{index}] is of category {annotation['category_id']!r}, which "
                f"is not among its categories ({known}{', ...' if len(categories) > 10 else ''}). "
                f"{_HINT}"
            )
    objects = [annotation for annotation in annotations if not annotation.get("iscrowd", 0)]
    used = {annotation["category_id"] for annotation in annotations}
    named = [c | {"name": str(c["name"])} for c in content["categories"]]
    keypoints, keypoint_problem = _read_keypoints(content)
    listed = {image["id"] for image in content["images"]}
    return Contents(
        categories=categories,
        num_images=len(content["images"]),
        num_trainable=len(listed & {annotation["image_id"] for annotation in objects}),
        num_annotations=len(annotations),
        num_crowds=len(annotations) - len(objects),
        used=used,
        num_without_mask=sum(not has_mask(annotation) for annotation in objects),
        num_encoded_masks=sum(isinstance(a.get("segmentation"), dict) for a in objects),
        num_box_masks=sum(
            has_mask(a) and is_box_mask(a["segmentation"], a["bbox"]) for a in objects
        ),
        unused_supercategories=[c["name"] for c in find_unused_supercategories(named, used)],
        keypoints=keypoints,
        keypoint_problem=keypoint_problem,
    )


def _read_keypoints(content: dict[str, Any]) -> tuple[tuple[str, ...], str]:
    try:
        names = keypoint_names(content["categories"])
    except ValueError as error:
        return (), str(error)
    return names, find_problem(content["annotations"], len(names))
