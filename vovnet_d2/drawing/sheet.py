# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""A contact sheet: several pictures in one, each with a title."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..atomic import atomic_write

_WIDTH = 16.0  # inches
_TALLEST = 4.0  # height divided by width of the space for a picture
# Small images are enlarged to these pixels, and thin ones to at most these. Labels stay the same.
_SHORT_SIDE, _LONG_SIDE = 300, 1200


def enlargement(image: NDArray[np.uint8]) -> float:
    """Return the factor by which an image (H, W, 3) is enlarged to be drawn on."""
    short, long = sorted(image.shape[:2])
    return max(1.0, min(_SHORT_SIDE / short, _LONG_SIDE / long))


def write_sheet(
    file: str | os.PathLike[str], pictures: Sequence[tuple[str, NDArray[np.uint8]]]
) -> None:
    """Write pictures, titles with pixels (H, W, 3) in RGB, into one .png, .jpg or .pdf file."""
    from matplotlib.figure import Figure  # draws without a display, unlike pyplot

    ratio = float(np.mean([pixels.shape[0] / pixels.shape[1] for _, pixels in pictures]))
    ratio = min(ratio, _TALLEST)
    columns = max(1, round(4 * min(1.0, ratio / 0.75)))  # wide pictures get fewer columns
    columns = min(columns, len(pictures))
    rows = -(-len(pictures) // columns)
    size = (_WIDTH, rows * (_WIDTH / columns * ratio + 0.3))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False)
    for panel in panels.flat:
        panel.set_axis_off()
    for panel, (title, pixels) in zip(panels.flat, pictures, strict=False):
        panel.imshow(pixels)
        # File names may have invalid bytes, and dollar signs, which start no formula.
        title = title.encode(errors="backslashreplace").decode()
        panel.set_title(title, fontsize=9, parse_math=False)
    with atomic_write(file) as partial:
        figure.savefig(partial, dpi=120, format=Path(file).suffix[1:].lower())
