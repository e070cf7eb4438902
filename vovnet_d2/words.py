# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Words of messages."""

from __future__ import annotations

__all__ = ["counted", "listed"]


def counted(number: int, plural: str) -> str:
    """Return a number and its noun, such as "2,667 problems" or "1 category".

    Args:
        plural: the noun of more than one, by a rule of English: "categories", "boxes", "images".
    """
    noun = plural
    if number == 1:
        endings = {"ies": "y", "xes": "x", "sses": "ss", "s": ""}
        ending = next(ending for ending in endings if plural.endswith(ending))
        noun = plural.removesuffix(ending) + endings[ending]
    return f"{number:,} {noun}"


def listed(names: list[str], *, most: int = 3) -> str:
    """Return names in quotation marks, the first ``most`` of them."""
    return ", ".join([*map(repr, names[:most]), *(["..."] if len(names) > most else [])])
