# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Whole data sets are checked: each alone, then pairs of them.

One pass checks a set and repairs a copy of it. Each rule notes what it found, and keeps a record
that satisfies the rule, or drops the record. The check discards the copy, and ``--fix`` writes it.
"""

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog

from ...atomic import write_text
from ...errors import UserFileNotFoundError, UserKeyError, UserValueError
from ...words import counted, suggest, suggest_path
from .annotations import repair_annotations
from .crowding import DEFAULT_LIMIT, measure_crowding
from .files import ImageFile, resolve_inside
from .frames import Frame, interpret_annotations
from .leakage import compare_files
from .masks import is_box_mask
from .problems import PROBLEMS, Findings
from .reading import SECTIONS, read_annotation_file
from .records import (
    find_unused_supercategories,
    note_contents,
    repair_categories,
    repair_images,
    size_of,
)
from .registered import find_foreign_file, states_categories
from .values import as_id

# If most annotations have one of these problems, they have a common cause.
_GEOMETRY = ["box_outside", "box_beyond", "box_and_mask", "degenerate_box", "polygon_outside"]
_GEOMETRY += ["empty_mask", "unknown_category", "unknown_image"]
_LEAST = 10


@dataclass(frozen=True)
class Source:
    """The files of a data set.

    Attributes:
        name: the name of the set in the report.
        json_file: the annotation file, or the file or folder that was converted.
        image_root: the folder of images.
        content: converted annotations in COCO's format; None to read ``json_file``.
        foreign: how the file differs from the data set that has this name; empty if it does not.
    """

    name: str
    json_file: Path
    image_root: Path
    content: dict[str, Any] | None = None
    foreign: str = ""


@dataclass
class CheckedSet:
    """A data set and what was found in it.

    Attributes:
        source: the files of the data set.
        findings: the problems that were found.
        counts: the lengths of the lists in the file, before corrections.
        fixed: the corrected content; None if the file cannot be read.
        files: the image files of ``fixed``, by ``file_name``.
        refusal: why no corrected copy is written; empty if one can be.
    """

    source: Source
    findings: Findings
    counts: dict[str, int] = field(default_factory=dict)
    fixed: dict[str, Any] | None = None
    files: dict[str, ImageFile] = field(default_factory=dict)
    refusal: str = ""


def find_registered(name: str) -> Source:
    """Find a data set that is registered with Detectron2 and has an annotation file in COCO's
    format.

    Raises:
        KeyError: no data set of that name is registered.
        ValueError: the data set has another format.
    """
    if name not in DatasetCatalog:
        hint = suggest(name, DatasetCatalog.list(), cutoff=0.4)
        raise UserKeyError(f"Data set {name!r} is not registered.{hint}")
    metadata = MetadataCatalog.get(name)
    json_file = metadata.get("json_file")
    if json_file and not os.path.exists(json_file):
        # Loading builds some data sets. If it fails, the check tells what is missing.
        with suppress(AssertionError, KeyError, OSError, ValueError):
            DatasetCatalog.get(name)
    if not json_file or metadata.get("image_root") is None:
        raise UserValueError(
            f"Data set {name} has no annotation file in COCO's format: its evaluator_type is "
            f"{metadata.get('evaluator_type')!r}."
        )
    foreign = ""
    with suppress(ValueError):  # the check reports a file that cannot be read
        foreign = find_foreign_file(name) if states_categories(name) else ""
    return Source(name, Path(json_file), Path(metadata.image_root), foreign=foreign)


def check_data_sets(
    sources: Sequence[Source], *, resize: tuple[int, int] = (800, 1333), masks: bool = False
) -> tuple[list[CheckedSet], dict[tuple[str, str], Findings]]:
    """Check data sets, and compare each pair of them.

    Args:
        sources: the data sets, the training set before the validation set.
        resize: ``INPUT.MIN_SIZE_TRAIN`` and ``INPUT.MAX_SIZE_TRAIN``, in pixels.
        masks: True for a network that learns masks.

    Returns:
        each set with its problems, and the problems of each pair of sets by their names.

    Raises:
        FileNotFoundError: an annotation file or a folder of images is missing.
    """
    for source in sources:
        file, root = source.json_file, source.image_root
        if source.content is None and not file.is_file():
            raise UserFileNotFoundError(f"There is no annotation file {file}.{suggest_path(file)}")
        if not root.is_dir():
            raise UserFileNotFoundError(f"There is no folder of images {root}.{suggest_path(root)}")
    checked = [_check(source, resize, masks=masks) for source in sources]
    between = {
        (one.source.name, other.source.name): _compare(one, other)
        for one, other in combinations(checked, 2)
        if one.fixed is not None and other.fixed is not None
    }
    return checked, between


def _check(source: Source, resize: tuple[int, int], *, masks: bool) -> CheckedSet:
    found = Findings()
    checked = CheckedSet(source, found)
    content = source.content or read_annotation_file(source.json_file, found)
    if content is None:
        return checked
    if source.foreign:
        found.add("foreign_file", source.foreign)
    checked.counts = {section: len(content[section]) for section in SECTIONS}
    categories = repair_categories(content["categories"], found)
    images, files = repair_images(content["images"], source.image_root, source.name, found)
    frames = _frames(content["images"], images, files, source.image_root)
    given, checked.refusal = interpret_annotations(content["annotations"], frames, found)
    if checked.refusal:  # single boxes would show the same fault
        return checked
    annotations = repair_annotations(given, images, categories, resize, found, masks=masks)
    checked.refusal = _find_cause(found, len(given))
    by_id = {image["id"]: image for image in images.values() if image}
    note_contents(by_id, files, found)
    used = {annotation["category_id"] for annotation in annotations}
    kept = _without_unused_supercategories(list(categories.values()), used, found)
    _note_unused(list(by_id.values()), kept, annotations, found)
    _note_crowding(by_id, annotations, found)
    _note_box_masks(annotations, found, masks=masks)
    checked.fixed = content | {
        "info": content["info"] if isinstance(content.get("info"), dict) else {},
        "categories": kept,
        "images": list(by_id.values()),
        "annotations": annotations,
    }
    checked.files = {by_id[key]["file_name"]: file for key, file in files.items()}
    return checked


def _frames(
    records: list[dict[str, Any]],
    images: Mapping[int | str, dict[str, Any] | None],
    files: Mapping[int, ImageFile],
    root: Path,
) -> dict[int | str, Frame]:
    given = {as_id(record.get("id")): size_of(record) for record in records}
    return {
        key: Frame(
            image["file_name"],
            resolve_inside(root, image["file_name"]),
            files[image["id"]],
            given[key],
        )
        for key, image in images.items()
        if image
    }


def _find_cause(findings: Findings, num_annotations: int) -> str:
    """Return which problem most annotations have, or an empty string. Repairs of single annotations
    do not help against such a problem."""
    for problem in _GEOMETRY:
        count = findings.counts[problem]
        if count >= _LEAST and count >= num_annotations / 2:
            sentence = f"{count} of its {num_annotations} annotations: {PROBLEMS[problem].title}"
            findings.add("systematic", sentence)
            return f"most of its annotations have the same problem ({sentence})"
    return ""


def _without_unused_supercategories(
    categories: list[dict[str, Any]], used: set[int], findings: Findings
) -> list[dict[str, Any]]:
    """Leave out categories that stand for no class. Roboflow writes such a category before the
    classes."""
    unused = find_unused_supercategories(categories, used)
    for category in unused:
        others = sum(other.get("supercategory") == category["name"] for other in categories)
        where = f"{category['name']!r}, of {counted(others, 'other categories')}"
        findings.add("unused_supercategory", where)
    return [category for category in categories if category not in unused]


def _note_crowding(
    images: Mapping[int, dict[str, Any]], annotations: list[dict[str, Any]], findings: Findings
) -> None:
    per_image = Counter(a["image_id"] for a in annotations if not a["iscrowd"])
    if crowding := measure_crowding(per_image.values(), DEFAULT_LIMIT):
        fullest = images[per_image.most_common(1)[0][0]]["file_name"]
        findings.add("crowded", f"{crowding} ({fullest} has most)", crowding.images)


def _note_box_masks(annotations: list[dict[str, Any]], findings: Findings, *, masks: bool) -> None:
    """Note if all masks are rectangles. A few rectangles may be right."""
    given = [a for a in annotations if a.get("segmentation") and not a["iscrowd"]]
    if len(given) >= _LEAST and all(is_box_mask(a["segmentation"], a["bbox"]) for a in given):
        name = "box_masks" if masks else "box_masks_unused"
        findings.add(name, f"for example {given[0]['bbox']}", len(given))


def _note_unused(
    images: list[dict[str, Any]],
    categories: list[dict[str, Any]],
    annotations: list[dict[str, Any]],
    findings: Findings,
) -> None:
    per_image = Counter(annotation["image_id"] for annotation in annotations)
    per_category = Counter(annotation["category_id"] for annotation in annotations)
    for image in images:
        if not per_image[image["id"]]:
            findings.add("no_annotations", image["file_name"])
    for category in categories:
        if not per_category[category["id"]]:
            findings.add("unused_category", category["name"])
    if all(annotation["iscrowd"] for annotation in annotations):
        findings.add("empty", "no image has an annotation that training can use")


def _compare(one: CheckedSet, other: CheckedSet) -> Findings:
    findings = Findings()
    mine, theirs = _category_names(one), _category_names(other)
    if only := sorted(set(theirs) - set(mine)):
        findings.add("categories_differ", f"in {other.source.name} only: {only}")
    elif different := sorted(name for name, number in mine.items() if theirs.get(name) != number):
        findings.add("category_ids_differ", f"{len(different)}, for example {different[0]!r}")
        _take_categories(other, one)
    if leaked := compare_files(one.files, other.files, findings):
        _drop_images(one, leaked)
    return findings


def _category_names(checked: CheckedSet) -> dict[str, int]:
    """Return the ids of the categories by their names."""
    assert checked.fixed is not None
    return {category["name"]: category["id"] for category in checked.fixed["categories"]}


def _take_categories(checked: CheckedSet, first: CheckedSet) -> None:
    """Give a set the categories and ids of another set. Each annotation keeps the name of its
    category."""
    assert checked.fixed is not None
    assert first.fixed is not None
    names = {number: name for name, number in _category_names(checked).items()}
    ids = _category_names(first)
    for annotation in checked.fixed["annotations"]:
        annotation["category_id"] = ids[names[annotation["category_id"]]]
    checked.fixed["categories"] = [dict(category) for category in first.fixed["categories"]]


def _drop_images(checked: CheckedSet, names: set[str]) -> None:
    assert checked.fixed is not None
    images = [image for image in checked.fixed["images"] if image["file_name"] not in names]
    kept = {image["id"] for image in images}
    checked.fixed["images"] = images
    checked.fixed["annotations"] = [
        a for a in checked.fixed["annotations"] if a["image_id"] in kept
    ]
    checked.files = {name: file for name, file in checked.files.items() if name not in names}


def require_free(path: Path) -> None:
    """Raise ValueError if the path of a new file is taken, and FileNotFoundError if there is no
    folder for the file."""
    if path.exists():
        raise UserValueError(f"{path} exists already: choose another name for the corrected copy.")
    if not path.parent.is_dir():
        raise UserFileNotFoundError(f"There is no folder {path.parent} to write {path} to.")


def write_fixed(checked: CheckedSet, path: Path) -> str:
    """Write the corrected copy of a set's annotation file, whole or not at all. Return a sentence
    with the numbers of images, annotations and categories that were kept.

    Raises:
        FileNotFoundError: there is no such folder.
        FileNotWrittenError: the file cannot be written, for example on a full disk.
        ValueError: the path is taken, or nothing is left to write.
    """
    require_free(path)
    fixed = checked.fixed
    if checked.refusal:
        raise UserValueError(
            f"{path} is not written, as {checked.source.json_file} cannot be corrected safely: "
            f"{checked.refusal}. Fix what writes the file."
        )
    if fixed is None or all(annotation["iscrowd"] for annotation in fixed["annotations"]):
        raise UserValueError(
            f"Nothing of {checked.source.json_file} can be trained on, so {path} is not written."
        )
    write_text(path, json.dumps(fixed))
    left = [
        f"{len(fixed[section])} of {checked.counts[section]} {section}"
        for section in reversed(SECTIONS)
    ]
    return f"Wrote {path} with {', '.join(left)}."
