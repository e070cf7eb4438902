# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Coordinates as the decimals that files have.

A box of VOC counts pixels from 1 and YOLO has fractions of the image's sides. Binary floating-point
numbers would change the last digits on the way there or back, decimal ones do not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from decimal import Decimal, InvalidOperation

__all__ = ["exact", "fraction_texts", "plain_text", "read_number"]

# Decimals of a fraction of an image's side, tried in turn. Six are what most tools write.
_DIGITS = (6, 9, 12, 15, 18)


def exact(value: float | Decimal) -> Decimal:
    """Return the shortest decimal that a floating-point number stands for: 0.1 for 0.1."""
    return value if isinstance(value, Decimal) else Decimal(repr(value))


def read_number(text: str | None, where: str) -> Decimal:
    """Read a number of a file.

    Args:
        text: the number; None if it is missing.
        where: the file and the place in it, for the error.

    Raises:
        ValueError: the text is no finite number.
    """
    try:
        number = Decimal((text or "").strip().replace("_", "?"))
    except InvalidOperation:
        number = Decimal("nan")
    if not number.is_finite():
        found = repr(text) if text is not None else "nothing"
        hint = ": write a point for the comma" if text and "," in text else ""
        raise ValueError(f"{where} has {found} where a number is needed{hint}.")
    return number


def plain_text(value: Decimal) -> str:
    """Write a decimal without an exponent and without zeros at its end."""
    text = format(value, "f")
    return text.rstrip("0").rstrip(".") if "." in text else text


def fraction_texts(
    fractions: Sequence[Decimal],
    restore: Callable[[Sequence[Decimal]], list[float]],
    wanted: Sequence[float],
) -> list[str]:
    """Write fractions of an image's sides with as few decimals as bring the same pixels back.

    Args:
        fractions: the numbers to write.
        restore: computes pixels from them, as reading does.
        wanted: those pixels.
    """
    rounded = list(fractions)
    for digits in _DIGITS:
        rounded = [round(fraction, digits) for fraction in fractions]
        if restore(rounded) == list(wanted):
            break
    return [plain_text(fraction) for fraction in rounded]
