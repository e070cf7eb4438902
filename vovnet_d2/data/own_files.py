# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""The annotation file of a custom data set is read and validated before a run.

A fault that would stop or spoil a run is refused. tools/check_dataset.py lists all faults.
"""

import os
from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserFileNotFoundError, UserValueError
from ..words import suggest_path
from .check.annotations import Linked, link_annotations, repair_ids
from .check.masks import has_mask, is_box_mask
from .check.names import NearNames
from .check.problems import PROBLEMS, Findings
from .check.reading import SECTIONS, read_annotation_file
from .check.records import (
    find_unused_supercategories,
    has_file_name,
    has_size,
    repair_categories,
    unique_images,
)
from .check.values import is_box, is_number
from .keypoints import find_problem, keypoint_names

_HINT = "tools/check_dataset.py lists all that is wrong with a file, and writes a corrected copy."
_NUM_LOOKED_FOR = 20

# The problems of check/problems.py that end a run. Other problems, such as boxes beyond their
# image, only lose objects or do no harm.
_STOPS_READING = {"json", "section", "record"}
_STOPS_TRAINING = {
    *("category_id", "category_id_type", "duplicate_category_id"),
    *("category_name", "duplicate_category_name", "unknown_category"),
    *("image_id", "image_id_type", "duplicate_image_id", "repeated_image"),
    *("no_image_id", "reference_type", "file_name", "no_size"),
    *("ignore", "box"),
}
_STOPS_EVALUATION = {"annotation_id", "duplicate_annotation_id", "iscrowd", "area"}


@dataclass(frozen=True)
class Contents:
    """Summarises the categories, counts and keypoints of an annotation file.

    Attributes:
        categories: the names of the categories by their ids, in the order of the ids.
        num_images: the number of images that the file lists.
        num_trainable: the number of images with an object. A crowd is no object.
        num_annotations: the number of objects and crowds.
        num_crowds: the number of crowds.
        used: the ids of the categories that have annotations.
        num_without_mask: the number of objects without a usable mask.
        num_encoded_masks: the number of objects whose mask is RLE.
        num_box_masks: the number of objects whose mask is a rectangle.
        unused_supercategories: the names of categories without annotations that other categories
            name as their supercategory.
        keypoints: the names of the keypoints of an object.
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
    """Read an annotation file and check it.

    Args:
        json: the annotation file.
        images: the folder of the images.
        evaluated: True for a test set. The evaluation by pycocotools needs more keys than training.

    Raises:
        FileNotFoundError: there is no such file or folder, or the folder does not hold the images.
        ValueError: the file is not in COCO's format.
    """
    if not os.path.isfile(json):
        raise UserFileNotFoundError(f"There is no annotation file {json}.{suggest_path(json)}")
    if not os.path.isdir(images):
        raise UserFileNotFoundError(f"There is no folder of images {images}.{suggest_path(images)}")
    content, contents = _read(json, evaluated=evaluated)
    _look_for_images(json, images, [image["file_name"] for image in content["images"]])
    return contents


def read_coco(json: str) -> dict[str, Any]:
    """Read a file in COCO's format, in any encoding that JSON may have, to convert it. Raise
    ValueError if the file is not in COCO's format."""
    return _read(json, evaluated=False)[0]


def _read(json: str, *, evaluated: bool) -> tuple[dict[str, Any], Contents]:
    findings = Findings()
    content = read_annotation_file(Path(json), findings)
    _refuse(json, findings, _STOPS_READING)
    assert content is not None
    for section in SECTIONS:
        if not content[section]:
            raise UserValueError(f"{json} has no {section}. {_HINT}")
    categories = repair_categories(content["categories"], findings)
    images = unique_images(content["images"], findings)
    for image in filter(None, images.values()):
        _ = has_file_name(image, findings) and has_size(image, findings)
    linked = link_annotations(content["annotations"], images, categories, findings)
    _note_fields(linked, findings)
    repair_ids(linked, findings)
    _refuse(json, findings, _STOPS_TRAINING | (_STOPS_EVALUATION if evaluated else set()))
    return content, _count(content, list(categories.values()), [a for _, a, _ in linked])


def _note_fields(linked: list[Linked], findings: Findings) -> None:
    for where, annotation, _ in linked:
        if not is_box(annotation.get("bbox")):
            findings.add("box", f"{where}: {annotation.get('bbox')!r:.60}")
        if not is_number(annotation.get("area")):
            findings.add("area", f"{where}: {annotation.get('area')!r:.40}")


def _refuse(json: str, findings: Findings, stopping: Set[str]) -> None:
    for problem, examples in findings.examples.items():
        if problem in stopping:
            more = findings.counts[problem] - 1
            others = f" and {more} more" if more else ""
            raise UserValueError(
                f"{json} is not in COCO's format: {PROBLEMS[problem].title} "
                f"({examples[0]}{others}). {_HINT}"
            )


def _look_for_images(json: str, folder: str, names: list[str]) -> None:
    """Raise FileNotFoundError if the folder has none of the first images. The training looks for
    all images."""
    if not any(os.path.exists(os.path.join(folder, name)) for name in names[:_NUM_LOOKED_FOR]):
        near = NearNames(folder).find(names[0])
        cause = f" The file that is meant seems to be {near!r}: {_HINT}" if near else ""
        raise UserFileNotFoundError(
            f"{folder} does not hold the images of {json}, for example {names[0]!r}: file names "
            f"must be relative to this folder.{cause}"
        )


def _count(
    content: dict[str, Any], categories: list[dict[str, Any]], annotations: list[dict[str, Any]]
) -> Contents:
    objects = [annotation for annotation in annotations if not annotation["iscrowd"]]
    used = {annotation["category_id"] for annotation in annotations}
    keypoints, keypoint_problem = _read_keypoints(content)
    return Contents(
        categories={c["id"]: c["name"] for c in sorted(categories, key=lambda c: c["id"])},
        num_images=len(content["images"]),
        num_trainable=len({annotation["image_id"] for annotation in objects}),
        num_annotations=len(annotations),
        num_crowds=len(annotations) - len(objects),
        used=used,
        num_without_mask=sum(not has_mask(annotation) for annotation in objects),
        num_encoded_masks=sum(isinstance(a.get("segmentation"), dict) for a in objects),
        num_box_masks=sum(
            has_mask(a) and is_box_mask(a["segmentation"], a["bbox"]) for a in objects
        ),
        unused_supercategories=[c["name"] for c in find_unused_supercategories(categories, used)],
        keypoints=keypoints,
        keypoint_problem=keypoint_problem,
    )


def _read_keypoints(content: dict[str, Any]) -> tuple[tuple[str, ...], str]:
    try:
        names = keypoint_names(content["categories"])
    except ValueError as error:
        return (), str(error)
    return names, find_problem(content["annotations"], len(names))
