# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Label maps for semantic segmentation: their values are compared with the numbers of classes."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from tqdm import tqdm

from ...errors import UserFileNotFoundError
from ...words import listed
from ..image_file import read_header, read_labels

_MAX_EXAMPLES = 5


@dataclass
class LabelCounts:
    """The values in a set of label maps.

    Attributes:
        files: the number of label maps that were read.
        pixels: the number of pixels of each value, over all label maps.
        first: for each value the first file that has it.
        problems: sentences about the first few files that cannot be used.
        num_problems: the number of files that cannot be used.
    """

    files: int = 0
    pixels: Counter[int] = field(default_factory=Counter)
    first: dict[int, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    num_problems: int = 0

    def add(self, file: str, pixels: Mapping[int, int], problem: str) -> None:
        if problem:
            self.num_problems += 1
            if len(self.problems) < _MAX_EXAMPLES:
                self.problems.append(problem)
            return
        self.files += 1
        self.pixels.update(pixels)
        for value in pixels:
            self.first.setdefault(value, file)

    def merge(self, other: LabelCounts) -> None:
        """Add the counts of another part of the same set."""
        self.files += other.files
        self.pixels.update(other.pixels)
        self.first = other.first | self.first
        self.problems = [*self.problems, *other.problems][:_MAX_EXAMPLES]
        self.num_problems += other.num_problems


def count_labels(records: Sequence[Mapping[str, Any]], title: str) -> LabelCounts:
    """Read all label maps once, several at a time. The records, in Detectron2's format, name them
    under "sem_seg_file_name". A progress bar has the title."""
    counts = LabelCounts()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = pool.map(_inspect, records)
        progress = tqdm(found, title, len(records), unit="map", delay=1, mininterval=1)
        for record, (pixels, problem) in zip(records, progress, strict=True):
            counts.add(record["sem_seg_file_name"], pixels, problem)
    return counts


def is_label_set(name: str) -> bool:
    """Return True if a data set is registered as label maps without annotations in COCO's
    format."""
    if name not in DatasetCatalog:
        return False
    metadata = MetadataCatalog.get(name)
    return bool(metadata.get("stuff_classes")) and not metadata.get("json_file")


def check_label_set(name: str) -> tuple[str, bool]:
    """Check a registered data set of label maps, with the classes that its metadata list. Return a
    report, and True if the label maps can be used. Raise FileNotFoundError if files are missing."""
    metadata = MetadataCatalog.get(name)
    try:
        records = [r for r in DatasetCatalog.get(name) if "sem_seg_file_name" in r]
    except (AssertionError, OSError) as error:
        raise UserFileNotFoundError(f"Data set {name} cannot be loaded: {error}") from error
    counts = count_labels(records, name)
    ignored = metadata.get("ignore_label", 255)
    problem, note = explain_labels(counts, len(metadata.stuff_classes), ignored)
    return f"{name}: {counts.files} label maps\n  {problem or note}", not problem


def _inspect(record: Mapping[str, Any]) -> tuple[dict[int, int], str]:
    file = record["sem_seg_file_name"]
    try:
        labels = read_labels(file)
    except (FileNotFoundError, ValueError) as error:
        return {}, str(error)
    size = labels.shape[::-1]
    try:
        picture_size = read_header(record["file_name"]).size
    except (FileNotFoundError, ValueError):  # the check of the pictures reports it
        picture_size = size
    if size != picture_size:
        return {}, (
            f"{file} has {size[0]} x {size[1]} pixels, and its picture {record['file_name']} "
            f"{picture_size[0]} x {picture_size[1]}."
        )
    values, numbers = np.unique(labels, return_counts=True)
    return dict(zip(values.tolist(), numbers.tolist(), strict=True)), ""


def explain_labels(counts: LabelCounts, num_classes: int, ignored: int) -> tuple[str, str]:
    """Compare the values of label maps with the numbers of classes.

    Args:
        num_classes: the number of classes of the network. Their values count from 0.
        ignored: the value of pixels that are not labelled.

    Returns:
        a sentence that says why the network cannot learn from the label maps, and a note on them;
            each is empty if there is nothing to say.
    """
    if counts.num_problems:
        more = counts.num_problems - 1
        others = f" {more} more of the files cannot be used." if more else ""
        return counts.problems[0] + others, ""
    values = sorted(set(counts.pixels) - {ignored})
    wrong = [value for value in values if not 0 <= value < num_classes]
    if wrong:
        where = counts.first[wrong[0]]
        return (
            f"label maps have values that are not classes: {listed(wrong, most=10)} ({where} is "
            f"the first file with {wrong[0]}): the classes are 0 to {num_classes - 1}, and "
            f"{ignored} is not labelled. {_convention(values, num_classes, ignored)}",
            "",
        )
    if values == [0] and num_classes > 1 and ignored in counts.pixels:
        return (
            f"label maps have no values but 0 and {ignored}, which stands for pixels that are not "
            f"labelled, so there is one class to learn. If {ignored} is the value of a class, "
            "write its number instead, 1 for the second class.",
            "",
        )
    if not values:
        return f"label maps have no pixel of a class: all have the value {ignored}.", ""
    unused = sorted(set(range(num_classes)) - set(values))
    note = f"the label maps have {len(values)} of the {num_classes} classes"
    return "", note + (f"; without a pixel are {listed(unused, most=10)}" if unused else "")


def _convention(values: list[int], num_classes: int, ignored: int) -> str:
    """Guess from the values how the labels were written, and say how to correct them."""
    if values[-1] == num_classes and values[0] >= 1:
        return "These are counted from 1: subtract 1 from all of them."
    if values[-1] == num_classes and values[0] == 0:
        return (
            f"If 0 is the background, the network needs one more class; if 0 means not labelled, "
            f"write {ignored} for it and subtract 1 from the others."
        )
    if values[0] < 0:
        return f"Write {ignored} for pixels that are not labelled."
    if 1 < len(values) <= num_classes and values[-1] <= 255 and values[-1] > 2 * num_classes:
        return (
            f"There are {len(values)} values, so they are probably grey values that stand for the "
            f"classes in their order: write {listed(range(len(values)), most=10)} for "
            f"{listed(values, most=10)}."
        )
    if 255 in values and ignored != 255 and max(v for v in values if v != 255) < num_classes:
        return "If 255 is not labelled, set MODEL.SEM_SEG_HEAD.IGNORE_VALUE 255."
    return "The network needs more classes, or the label maps need other values."
