# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Colours of the classes of label maps, the same in every picture."""

from __future__ import annotations

from detectron2.data.catalog import Metadata
from detectron2.utils.colormap import colormap

__all__ = ["with_stuff_colors"]


def with_stuff_colors(metadata: Metadata) -> Metadata:
    """Return metadata with a colour for each class of label maps. Where there is none, Detectron2's
    visualizer draws one at random for each picture."""
    if metadata.get("stuff_colors") or not metadata.get("stuff_classes"):
        return metadata
    colors = colormap(rgb=True, maximum=255).astype(int).tolist()
    repeated = [colors[i % len(colors)] for i in range(len(metadata.stuff_classes))]
    return Metadata(**{**metadata.as_dict(), "stuff_colors": repeated})
