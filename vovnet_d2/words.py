# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Put numbers and names into the words of a message."""

from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path


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
    part of its path that does not exist is compared with the names in that folder."""
    path = Path(missing)
    try:
        folder = next((parent for parent in path.parents if parent.is_dir()), None)
        if folder is None:
            return ""
        names = sorted(other.name for other in folder.iterdir())
    except OSError:  # the folder may not be listed
        return ""
    name, *rest = path.relative_to(folder).parts
    close = [folder / other for other in get_close_matches(name, names, n=3, cutoff=0.8)]
    whole = [other.joinpath(*rest) for other in close]
    return close_to_it([str(w if w.exists() else c) for w, c in zip(whole, close, strict=True)])
