# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Files are found by names that are almost right: names with backslashes, URLs, and names with
another folder, suffix, case or Unicode form."""

import os
import unicodedata
from collections import defaultdict
from functools import cached_property
from pathlib import PurePosixPath
from urllib.parse import unquote, urlsplit

_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif")


class NearNames:
    """Finds files below a folder by names that are almost right."""

    def __init__(self, root: str | os.PathLike[str]):
        self._root = os.fspath(root)

    @cached_property
    def _by_key(self) -> dict[str, list[str]]:
        """Return the names relative to the folder, by their keys, see :func:`_key`."""
        found: defaultdict[str, list[str]] = defaultdict(list)
        for folder, folders, files in os.walk(self._root):
            folders.sort()
            for file in sorted(files):
                name = os.path.relpath(os.path.join(folder, file), self._root)
                found[_key(name)].append(name.replace(os.sep, "/"))
        return dict(found)

    def find(self, name: str) -> str | None:
        """Find the file that is meant by a name for which there is no file. Return its name,
        relative to the folder. Return None if no file can be meant, or if several are equally near.
        """
        meant = _plain(name)
        if not meant or not (near := self._by_key.get(_key(meant), [])):
            return None
        if _contradict(os.path.abspath(self._root), meant):
            return None
        scores = {c: _score(_plain(c), meant) for c in near if _one_ends_the_other(c, meant)}
        best = max(scores.values(), default=None)
        chosen = [candidate for candidate, score in scores.items() if score == best]
        return chosen[0] if len(chosen) == 1 else None


def _plain(name: str) -> str:
    """Write a name with slashes, without the parts of a URL, and in Unicode's composed form."""
    text = name.strip()
    if "://" in text:
        text = unquote(urlsplit(text).path)
    elif "%" in text:
        text = unquote(text)
    text = text.replace("\\", "/")
    return unicodedata.normalize("NFC", text).strip("/")


def _key(name: str) -> str:
    last = PurePosixPath(_plain(name)).name.casefold()
    stem, suffix = os.path.splitext(last)
    return stem if suffix in _SUFFIXES else last


def _one_ends_the_other(candidate: str, meant: str) -> bool:
    """Return True if one path ends with the folders of the other one: train/a.jpg is not
    val/a.jpg."""
    ours, theirs = (PurePosixPath(path).parent.parts for path in (candidate, meant))
    pairs = zip(reversed(ours), reversed(theirs), strict=False)
    return all(_plain(one).casefold() == other.casefold() for one, other in pairs)


def _contradict(root: str, meant: str) -> bool:
    """Return True if the folder of images and the name belong to different splits."""
    ours = {split for part in PurePosixPath(root).parts[-2:] if (split := _split_of(part))}
    theirs = {s for part in PurePosixPath(meant).parent.parts if (s := _split_of(part))}
    return bool(ours and theirs) and not ours & theirs


def _split_of(part: str) -> str:
    return next((split for split in ("train", "val", "test") if split in part.casefold()), "")


def _score(candidate: str, meant: str) -> tuple[int, bool, bool]:
    """Return the number of folders before the file that agree, then True if the suffix agrees, and
    True if the name agrees in its case."""
    ours, theirs = (PurePosixPath(path) for path in (candidate, meant))
    folders = 0
    for one, other in zip(reversed(ours.parts[:-1]), reversed(theirs.parts[:-1]), strict=False):
        if one.casefold() != other.casefold():
            break
        folders += 1
    same_suffix = ours.suffix.casefold() == theirs.suffix.casefold()
    return folders, same_suffix, ours.name == theirs.name
