# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Numbers and ids as JSON files hold them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, TypeGuard

__all__ = ["Numbering", "are_numbers", "as_id", "is_number", "is_text", "is_whole"]

_LIMIT = 2**53  # what a double, and so each reader of JSON, holds exactly


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a value is a finite number; True and False are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _LIMIT


def is_whole(value: Any) -> TypeGuard[int]:
    return is_number(value) and isinstance(value, int)


def is_text(value: Any) -> TypeGuard[str]:
    """Whether a value is text that can be written: JSON holds halves of characters, too."""
    if not isinstance(value, str) or not value.strip():
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def are_numbers(values: Any) -> TypeGuard[list[float]]:
    return isinstance(values, list) and all(map(is_number, values))


def as_id(value: Any) -> int | str | None:
    """Return the id that is meant: 7 by ``7``, ``7.0`` and ``"7"``; other text stays, ``"007"``
    too; fractions and numbers of more than 53 bits are taken as text; None if there is no id."""
    if is_number(value) and value == int(value):
        return int(value)
    whole = isinstance(value, int) and not isinstance(value, bool)
    if whole or (isinstance(value, float) and math.isfinite(value)):
        return repr(value)
    if not isinstance(value, str) or not value.strip():
        return None
    text = value.strip()
    digits = text.removeprefix("-")
    canonical = digits.isascii() and digits.isdigit() and len(digits) < 16
    return int(text) if canonical and str(int(text)) == text else text


class Numbering:
    """Whole numbers for ids: themselves where they are ones, others that are free where not."""

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
