# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Put numbers and names into the words of a message."""

from collections.abc import Iterable, Sequence
from difflib import get_close_matches


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
