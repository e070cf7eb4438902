# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Put numbers and names into the words of a message."""

import os
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from itertools import islice
from pathlib import Path

_MOST_NAMES = 2000  # the search takes 0.04 s for so many names, and a longer time for more


def counted(number: int, plural: str) -> str:
    """Return a number and its noun, such as "2,667 problems" or "1 category".

    Args:
        plural: the plural of the noun, such as "categories", "boxes" or "images".
    """
    noun = plural
    if number == 1:
        endings = {"ies": "y", "xes": "x", "sses": "ss", "s": ""}
        ending = next(ending for ending in endings if plural.endswith(ending))
        noun = plural.removesuffix(ending) + endings[ending]
    return f"{number:,} {noun}"


def listed(names: Sequence[str] | Sequence[int], *, most: int = 3) -> str:
    """Return the first ``most`` names or numbers in one line, with names in quotation marks."""
    return ", ".join([*map(repr, names[:most]), *(["..."] if len(names) > most else [])])


def suggest(name: str, choices: Iterable[str], *, cutoff: float = 0.6) -> str:
    """Return a sentence, after a space, that names the choices closest to a name, in quotation
    marks. It is empty if none is close.
    """
    return close_to_it(get_close_matches(name, list(choices), n=3, cutoff=cutoff))


def close_to_it(names: Sequence[str]) -> str:
    """Return the sentence of :func:`suggest` for names that were found in another way."""
    return f" Close to it: {', '.join(map(repr, names))}." if names else ""


def suggest_path(missing: str | Path) -> str:
    """Return the sentence of :func:`suggest` for a file or folder that does not exist. The first
    part of its path that does not exist is compared with the names in that folder. If that part is
    a file, a folder or a broken link, the sentence says so. It is empty for a folder of more than
    2,000 names."""
    path = Path(missing)
    try:
        folder = next((parent for parent in path.parents if parent.is_dir()), None)
        if folder is None:
            return ""
        name, *rest = path.relative_to(folder).parts
        if os.path.lexists(folder / name):
            return _describe(folder / name)
        names = sorted(other.name for other in islice(folder.iterdir(), _MOST_NAMES + 1))
    except OSError:  # the folder may not be listed
        return ""
    if len(names) > _MOST_NAMES:
        return ""
    close = [folder / other for other in get_close_matches(name, names, n=3, cutoff=0.8)]
    whole = [other.joinpath(*rest) for other in close]
    return close_to_it([str(w if w.exists() else c) for w, c in zip(whole, close, strict=True)])


def _describe(path: Path) -> str:
    if path.is_dir():
        return f" {str(path)!r} is a folder."
    if path.exists():
        return f" {str(path)!r} is a file."
    return f" {str(path)!r} is a link to {os.readlink(path)!r}, which does not exist."
