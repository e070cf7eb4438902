# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Registered data sets are refused if their files hold other data, such as custom annotations under
COCO's names.

Detectron2 registers the categories of its own names ("coco_2017_train", "lvis_v1_val", ...). Its
loaders stop at a file with other categories or, for LVIS and for keypoints, train on wrong names.
"""

import json
import mmap
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.catalog import Metadata

from ...errors import UserValueError
from ...words import counted, listed
from .problems import Findings
from .reading import read_annotation_file

_LOADERS = "detectron2.data.datasets"
_LARGE = 2**24  # bytes


def states_categories(name: str) -> bool:
    """Return True if a loader of Detectron2 reads a data set whose categories are in the metadata
    already. A loader of the user may choose among the categories of its file."""
    metadata = MetadataCatalog.get(name)
    by_detectron2 = getattr(DatasetCatalog[name], "__module__", "").startswith(_LOADERS)
    return by_detectron2 and bool(metadata.get("thing_classes")) and bool(_files(metadata))


def find_foreign_file(name: str) -> str:
    """Compare the annotation files of a data set, for which :func:`states_categories` holds, with
    the categories that its metadata state. Raise ValueError if a file cannot be read.

    Returns:
        a sentence without a full stop that names the file and its categories; empty if the files
        have the categories of the data set.
    """
    metadata = MetadataCatalog.get(name)
    for key, path in _files(metadata).items():
        panoptic = key == "panoptic_json"
        # COCO's own files are large. A large file is read whole only if its categories differ.
        found = _find_categories(path) if path.stat().st_size > _LARGE else None
        if found is not None and not _compare(path, found, metadata, panoptic=panoptic):
            continue
        findings = Findings()
        content = read_annotation_file(path, findings)
        if content is None:
            raise UserValueError(
                f"Data set {name} cannot be loaded: {findings.examples['json'][0]}."
            )
        if difference := _compare(path, content["categories"], metadata, panoptic=panoptic):
            return difference
    return ""


def _find_categories(path: Path) -> list[dict[str, Any]] | None:
    """Return the list after the last "categories" in a file, without parsing the text before it.
    Return None if there is no list of objects."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        start = data.find(b"[", max(data.rfind(b'"categories"'), 0))
        end = data.find(b'"annotations"', start)
        text = data[start : end if end > 0 else len(data)]
    try:
        found, _ = json.JSONDecoder().raw_decode(text.decode())
    except ValueError:
        return None
    is_list = isinstance(found, list) and all(isinstance(c, dict) for c in found)
    return found if is_list else None


def _compare(
    path: Path, categories: list[dict[str, Any]], metadata: Metadata, *, panoptic: bool
) -> str:
    known = [c for c in categories if isinstance(c.get("id"), int | str)]
    known.sort(key=lambda c: (isinstance(c["id"], str), c["id"]))
    difference = _compare_names(path, known, metadata, panoptic=panoptic)
    return difference or _compare_keypoints(path, known, metadata)


def _files(metadata: Metadata) -> dict[str, Path]:
    paths = {key: metadata.get(key) for key in ("json_file", "panoptic_json")}
    return {key: Path(path) for key, path in paths.items() if path and Path(path).is_file()}


def _compare_names(
    path: Path, categories: list[dict[str, Any]], metadata: Metadata, *, panoptic: bool
) -> str:
    stated = _stated(metadata, panoptic=panoptic)
    found = [(c["id"], str(c.get("name"))) for c in categories]
    same_ids = [i for i, _ in stated] == [i for i, _ in found]
    names, stated_names = [name for _, name in found], [name for _, name in stated]
    if metadata.get("evaluator_type") == "coco":
        # Detectron2's loader requires the stated names. It takes any ids if none are stated.
        same_ids |= not metadata.get("thing_dataset_id_to_contiguous_id")
        agree = same_ids and names == stated_names
    else:  # the names of LVIS and of stuff differ a little from those in the files
        num_same = sum(one == other for one, other in zip(stated, found, strict=False))
        agree = same_ids and num_same >= len(stated) / 2
    if agree:
        return ""
    if names == stated_names:
        return f"its file {path} has the categories of that name under other ids"
    return _explain(path, names, stated_names, "categories")


def _stated(metadata: Metadata, *, panoptic: bool) -> list[tuple[Any, str]]:
    """Return ids and names in the order of the ids."""
    things = metadata.get("thing_dataset_id_to_contiguous_id")
    # LVIS counts the ids of its categories from 1.
    things = things or {number + 1: number for number in range(len(metadata.thing_classes))}
    names = {key: metadata.thing_classes[number] for key, number in things.items()}
    if panoptic:
        # The 0 of label maps stands for all things.
        stuff = metadata.get("stuff_dataset_id_to_contiguous_id", {}).items()
        names |= {key: metadata.stuff_classes[number] for key, number in stuff if key}
    return sorted(names.items())


def _compare_keypoints(path: Path, categories: list[dict[str, Any]], metadata: Metadata) -> str:
    stated = metadata.get("keypoint_names")
    found = [c["keypoints"] for c in categories if isinstance(c.get("keypoints"), list)]
    if not stated or not found or list(stated) == found[0]:
        return ""
    return _explain(path, found[0], list(stated), "keypoints")


def _explain(path: Path, found: list[str], stated: list[str], what: str) -> str:
    there, meant = (
        counted(len(names), what) + (f" ({listed(names)})" if names else "")
        for names in (found, stated)
    )
    return f"its file {path} has {there}, and the name stands for {meant}"
