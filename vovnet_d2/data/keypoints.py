# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Keypoints of custom data sets: their names, and the pairs that are swapped in a mirrored
picture."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import UserValueError
from ..words import suggest
from .check.values import are_numbers

Flips = tuple[tuple[str, str], ...]

_OTHER_SIDE = {"left": "right", "right": "left", "l": "r", "r": "l"}
# Parts of LEye, lEye, leftEye, left_eye, EYE-L: runs of capitals, words, and other characters.
_PARTS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[^A-Za-z]+")
_GLUED = re.compile(r"^(left|right)(?=.)|(?<=.)(left|right)$", re.IGNORECASE)


# Names


def keypoint_names(categories: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """Return the names that categories in COCO's format give their keypoints. Categories without
    names are ignored.

    Raises:
        ValueError: no category names its keypoints, two categories have different names, or a name
            is no text or occurs twice.
    """
    found = [(c.get("name"), c["keypoints"]) for c in categories if c.get("keypoints")]
    if not found:
        raise UserValueError(
            'no category names its keypoints ("keypoints": ["nose", "left_eye", ...] in the entry '
            "of the category)"
        )
    (first, names), *others = found
    for name, keypoints in others:
        if keypoints != names:
            raise UserValueError(
                f"categories {first!r} and {name!r} have different keypoints, and a network "
                "predicts the same ones for all"
            )
    if not isinstance(names, list) or not all(isinstance(n, str) and n for n in names):
        raise UserValueError(f"the keypoints of category {first!r} are not names: {names!r:.100}")
    if len(set(names)) < len(names):
        twice = next(n for n in names if names.count(n) > 1)
        raise UserValueError(f"category {first!r} has the keypoint {twice!r} twice")
    return tuple(names)


def find_problem(annotations: Sequence[Mapping[str, Any]], count: int) -> str:
    """Return what is wrong with the keypoints in COCO's annotations, or an empty string. ``count``
    is the number of keypoints of an object."""
    labelled = 0
    for index, annotation in enumerate(annotations):
        points = annotation.get("keypoints")
        if not points:
            continue
        if not are_numbers(points) or len(points) != 3 * count:
            what = f"{len(points)} numbers" if isinstance(points, list) else f"{points!r:.40}"
            return f"annotations[{index}] has {what} for its keypoints, which are {count} x 3"
        if any(visibility not in (0, 1, 2) for visibility in points[2::3]):
            return f"annotations[{index}] has a visibility that is not 0, 1 or 2 in its keypoints"
        labelled += any(points[2::3])
    return "" if labelled else "no object has a keypoint that is labelled (visibility 1 or 2)"


# Mirrors


def derive_flips(names: Sequence[str], *, mirrored: bool) -> Flips:
    """Find the pairs of keypoints that are swapped in a mirrored picture. The names of a pair
    differ in one part: "left" and "right", or "l" and "r". Examples are left_eye, EyeL, l_eye and
    lefteye. If pictures are ``mirrored``, raise ValueError for a name with a side and without
    counterpart."""
    pairs: list[tuple[str, str]] = []
    for name in names:
        other = _mirror(name)
        if other != name and other in names and (other, name) not in pairs:
            pairs.append((name, other))
    paired = {name for pair in pairs for name in pair}
    sides = {n for n in names if {part.lower() for part in _PARTS.findall(n)} & {"left", "right"}}
    lone = [n for n in names if n in sides - paired]
    if lone and mirrored:
        raise UserValueError(
            f"the keypoint {lone[0]!r} has no counterpart on the other side, so a mirrored picture "
            "would have it on the wrong one: name the pairs with --keypoint-flips, or set "
            "INPUT.RANDOM_FLIP none"
        )
    return tuple(pairs)


def _mirror(name: str) -> str:
    """Return the name on the other side, or the same name if it has no side."""
    parts = _PARTS.findall(name)
    if any(part.lower() in _OTHER_SIDE for part in parts):
        return "".join(_other(p) if p.lower() in _OTHER_SIDE else p for p in parts)
    return _GLUED.sub(lambda match: _other(match.group()), name)


def _other(side: str) -> str:
    other = _OTHER_SIDE[side.lower()]
    if side.isupper():
        return other.upper()
    return other.capitalize() if side[0].isupper() else other


def parse_flips(text: str, names: Sequence[str]) -> Flips:
    """Parse the pairs of a command line: "left_eye:right_eye,left_ear:right_ear", or "none". Raise
    ValueError if a part is no pair, or if a name is unknown or occurs twice."""
    if text.strip().lower() == "none":
        return ()
    pairs = [tuple(name.strip() for name in part.split(":")) for part in text.split(",")]
    flat = [name for pair in pairs for name in pair]
    for pair in pairs:
        if len(pair) != 2:
            raise UserValueError(
                f"--keypoint-flips has {':'.join(pair)!r}, which is not a pair: write "
                "left_eye:right_eye,left_ear:right_ear and so on, or none."
            )
        for name in pair:
            if name not in names:
                hint = suggest(name, names)
                raise UserValueError(
                    f"--keypoint-flips names {name!r}, which is not a keypoint of the data.{hint} "
                    f"There are {', '.join(names)}."
                )
            if flat.count(name) > 1:
                raise UserValueError(f"--keypoint-flips names {name!r} twice.")
    return tuple((one, other) for one, other in pairs)
