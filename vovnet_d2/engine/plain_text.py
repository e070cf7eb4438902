# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Names in pictures as they are written: "$x^$" is a name of a category, and no formula."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["plain_text"]


@contextmanager
def plain_text() -> Iterator[None]:
    """Let matplotlib, and Detectron2's Visualizer with it, take dollar signs for letters in the
    texts that are made in this context. Without, a text with two of them is a formula, and an error
    where it is none. Serves as a decorator of a function, too."""
    import matplotlib  # of the extra "demo"

    with matplotlib.rc_context({"text.parse_math": False}):
        yield
