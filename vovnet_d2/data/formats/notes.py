# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Changes and losses of a conversion are collected, and so are the problems that stop it."""

from collections.abc import Callable, Iterable
from typing import TypeVar

from ...errors import UserValueError

T = TypeVar("T")
R = TypeVar("R")


class Notes:
    """Counts what a conversion changed or left out, and keeps the first example of each kind."""

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}
        self._first: dict[str, str] = {}

    def add(self, what: str, where: str) -> None:
        """Count one case of a kind, which is the plural subject of a line. ``where`` is the file
        and the line or element of this case."""
        self._counts[what] = self._counts.get(what, 0) + 1
        self._first.setdefault(what, where)

    def lines(self) -> list[str]:
        """Return one line for each kind."""
        return [f"{n} {what}; first: {self._first[what]}." for what, n in self._counts.items()]


def read_each(items: Iterable[T], read: Callable[[T], R], what: str = "files") -> list[R]:
    """Read all items, or raise one ValueError with the first problem and the number of the others.
    In it, ``what`` names the items."""
    results: list[R] = []
    problems: list[str] = []
    for item in items:
        try:
            results.append(read(item))
        except (FileNotFoundError, ValueError) as error:
            problems.append(str(error.args[0]))
    if problems:
        others = f" {len(problems) - 1} more {what} have problems." if len(problems) > 1 else ""
        raise UserValueError(f"{problems[0]}{others}")
    return results
