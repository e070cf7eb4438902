# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Coordinates are read as decimal numbers, as they are written in files.

VOC counts pixels from 1, and YOLO has fractions of the sides of the image. Binary floating-point
numbers would change the last digits in a conversion, and decimal numbers do not.
"""

from decimal import Decimal, InvalidOperation

from ...errors import UserValueError


def exact(value: float | Decimal) -> Decimal:
    """Return the shortest decimal that a floating-point number stands for: 0.1 for 0.1."""
    return value if isinstance(value, Decimal) else Decimal(repr(value))


def read_number(text: str | None, where: str) -> Decimal:
    """Return the number that a file has as text. ``where`` is the file and the line or element in
    the file. Raise ValueError, with this place, if the text is no finite number or is None, because
    the file has no text there."""
    try:
        number = Decimal((text or "").strip().replace("_", "?"))
    except InvalidOperation:
        number = Decimal("nan")
    if not number.is_finite():
        found = repr(text) if text is not None else "nothing"
        hint = ": write a point in place of the comma" if text and "," in text else ""
        raise UserValueError(f"{where} has {found} where a number is needed{hint}.")
    return number
