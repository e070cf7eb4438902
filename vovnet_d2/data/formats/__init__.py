# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Annotations of several formats are converted to COCO's format."""

from .notes import Notes
from .split import split_content
from .table import FORMATS, Annotations, describe_formats, read_annotations, recognise, write_coco

__all__ = [
    "FORMATS",
    "Annotations",
    "Notes",
    "describe_formats",
    "read_annotations",
    "recognise",
    "split_content",
    "write_coco",
]
