# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""A data set is split into parts with balanced classes. Pictures that look alike stay in one part.

A test on a picture that looks like a training picture would measure nothing. The classes are
balanced as in K. Sechidis, G. Tsoumakas and I. Vlahavas, "On the Stratification of Multi-Label
Data", ECML PKDD 2011: images of the rarest class come first, and each goes to the part that lacks
most of this class.
"""

import random
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...errors import UserValueError
from ..check.files import ImageFile, inspect_files, resolve_inside
from ..check.leakage import near_pairs
from .labelled import Content

_NOTHING = None  # the class of images without objects


def split_content(
    content: Content, images: Path, shares: Mapping[str, float], *, seed: int
) -> dict[str, Content]:
    """Split a data set.

    Args:
        content: the data set in COCO's format.
        images: the folder of images. All images are read.
        shares: the share of the images of each part, by the name of the part. The sum is 1.
        seed: the seed of the random order. The same seed gives the same parts.

    Returns:
        the parts in COCO's format, with all categories in each.

    Raises:
        ValueError: a part would be empty, as too many pictures look alike.
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
        raise UserValueError(
            f"The {len(names)} images make {len(groups)} groups of images that look alike. The "
            f"largest has {largest} images. Groups stay together, so nothing is left for "
            f"{empty[0]!r}: split by hand, for example by the place or day of the pictures."
        )
    return {part: _take(content, {n for n, p in chosen.items() if p == part}) for part in shares}


def find_groups(files: Mapping[str, ImageFile]) -> list[list[str]]:
    """Group pictures. Two pictures that are equal or look alike are in one group, together with all
    pictures that look like either."""
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
    left.sort(key=lambda group: -len(group[0]))  # a large group needs much room in a part
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
