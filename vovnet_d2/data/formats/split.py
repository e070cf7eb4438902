# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Splitting a data set into parts whose classes have equal shares and whose pictures differ.

Pictures that look alike stay together, as a test on the twin of a training picture measures
nothing. The classes are balanced as K. Sechidis, G. Tsoumakas and I. Vlahavas do, "On the
Stratification of Multi-Label Data", ECML PKDD 2011: the rarest class is dealt out first, each time
to the part that lacks most of it.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..check.files import ImageFile, inspect_files, resolve_inside
from ..check.leakage import near_pairs
from .labelled import Content

__all__ = ["find_groups", "split_content"]

_NOTHING = None  # the class of images without objects


def split_content(
    content: Content, images: Path, shares: Mapping[str, float], *, seed: int
) -> dict[str, Content]:
    """Split a data set.

    Args:
        content: in COCO's format.
        images: the folder of images, all of which are read.
        shares: of the images, by the name of the part; they add up to 1.
        seed: the same seed gives the same parts.

    Returns:
        the parts in COCO's format, with all categories in each.

    Raises:
        ValueError: a part would be empty: too many pictures look alike.
    """
    records = sorted(content["images"], key=lambda image: image["file_name"])
    names = [image["file_name"] for image in records]
    paths = {name: resolve_inside(images, name) for name in names}
    files = inspect_files(paths.values(), "Looking for pictures that look alike")
    groups = find_groups({name: files[path] for name, path in paths.items()})
    classes: defaultdict[Any, set[Any]] = defaultdict(set)
    for annotation in content["annotations"]:
        classes[annotation["image_id"]].add(annotation["category_id"])
    labels = {image["file_name"]: classes[image["id"]] or {_NOTHING} for image in records}
    chosen = _deal_out(groups, labels, shares, random.Random(seed))
    if empty := [part for part in shares if part not in chosen.values()]:
        largest = max(map(len, groups))
        raise ValueError(
            f"The {len(names)} images make {len(groups)} groups that look alike, the largest of "
            f"{largest}, and groups stay together: nothing is left for {empty[0]!r}. Split by "
            "hand, by the place or day of the pictures, say."
        )
    return {part: _take(content, {n for n, p in chosen.items() if p == part}) for part in shares}


def find_groups(files: Mapping[str, ImageFile]) -> list[list[str]]:
    """Group pictures: two that look alike, or are equal, are in one group, and so are those that
    look like either."""
    leader = {name: name for name in files}

    def find(name: str) -> str:
        while leader[name] != name:
            leader[name] = name = leader[leader[name]]
        return name

    first: dict[str, str] = {}
    for name, file in files.items():
        if file.digest:
            leader[find(name)] = find(first.setdefault(file.digest, name))
    for one, other in near_pairs(files, files):
        leader[find(one)] = find(other)
    groups: defaultdict[str, list[str]] = defaultdict(list)
    for name in files:
        groups[find(name)].append(name)
    return list(groups.values())


def _deal_out(
    groups: Sequence[list[str]],
    labels: Mapping[str, set[Any]],
    shares: Mapping[str, float],
    rng: random.Random,
) -> dict[str, str]:
    """Return the part of each image."""
    left = [(names, Counter(label for name in names for label in labels[name])) for names in groups]
    rng.shuffle(left)
    left.sort(key=lambda group: -len(group[0]))  # what is large fits nowhere later
    totals = sum((counts for _, counts in left), Counter[Any]())
    lacking = {
        part: Counter({label: share * count for label, count in totals.items()})
        for part, share in shares.items()
    }
    room = {part: share * len(labels) for part, share in shares.items()}
    chosen: dict[str, str] = {}
    while left:
        rarest = min(
            (label for label in totals if totals[label] > 0),
            key=lambda label: (totals[label], str(label)),
        )
        having = [group for group in left if group[1][rarest]]
        left = [group for group in left if not group[1][rarest]]
        for names, counts in having:
            part = max(shares, key=lambda part: (lacking[part][rarest], room[part]))
            chosen |= dict.fromkeys(names, part)
            room[part] -= len(names)
            lacking[part].subtract(counts)
            totals.subtract(counts)
    return chosen


def _take(content: Content, names: set[str]) -> Content:
    images = [image for image in content["images"] if image["file_name"] in names]
    ids = {image["id"] for image in images}
    annotations = [a for a in content["annotations"] if a["image_id"] in ids]
    return {**content, "images": images, "annotations": annotations}
