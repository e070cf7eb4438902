# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Numbers and ids of JSON files are checked and converted."""

import math
from collections.abc import Iterable
from typing import Any, TypeGuard

_LIMIT = 2**53  # a double, and so every reader of JSON, holds smaller whole numbers exactly


def is_number(value: Any) -> TypeGuard[float]:
    """Return True if a value is a number below 2**53 in absolute value, and not True or False."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _LIMIT


def is_whole(value: Any) -> TypeGuard[int]:
    return is_number(value) and isinstance(value, int)


def is_text(value: Any) -> TypeGuard[str]:
    """Return True if a value is text that can be encoded. Half of a surrogate pair cannot."""
    if not isinstance(value, str) or not value.strip():
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def are_numbers(values: Any) -> TypeGuard[list[float]]:
    return isinstance(values, list) and all(map(is_number, values))


def is_box(value: Any) -> TypeGuard[list[float]]:
    return are_numbers(value) and len(value) == 4


def is_id(value: Any) -> TypeGuard[int]:
    """Return True if a value is a whole number of at most 63 bits, which evaluators can hold as an
    id."""
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63


def as_id(value: Any) -> int | str | None:
    """Return the id that is meant, or None if there is no id. ``7``, ``7.0`` and ``"7"`` mean 7.
    Other text, such as ``"007"``, stays. Fractions and numbers of more than 63 bits become text."""
    if is_id(value) or (is_number(value) and value == int(value)):
        return int(value)
    whole = isinstance(value, int) and not isinstance(value, bool)
    if whole or (isinstance(value, float) and math.isfinite(value)):
        return repr(value)
    if not isinstance(value, str) or not value.strip():
        return None
    text = value.strip()
    digits = text.removeprefix("-")
    canonical = digits.isascii() and digits.isdigit() and len(digits) < 20
    return int(text) if canonical and str(int(text)) == text and is_id(int(text)) else text


class Numbering:
    """Gives ids that are whole numbers. A number stays, and another id gets a free number."""

    def __init__(self, ids: Iterable[int | str | None]) -> None:
        self._next = max((i for i in ids if isinstance(i, int)), default=0)
        self._given: dict[str, int] = {}

    def of(self, value: int | str) -> int:
        if isinstance(value, int):
            return value
        if value not in self._given:
            self._given[value] = self.new()
        return self._given[value]

    def new(self) -> int:
        self._next = max(self._next, 0) + 1
        return self._next
