# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Data sets in COCO's format are checked before a training."""

from .check import Source, check_data_sets, find_registered, require_free, write_fixed
from .label_maps import check_label_set, is_label_set
from .problems import PROBLEMS, Severity
from .report import format_report, report_to_json

__all__ = [
    "PROBLEMS",
    "Severity",
    "Source",
    "check_data_sets",
    "check_label_set",
    "find_registered",
    "format_report",
    "is_label_set",
    "report_to_json",
    "require_free",
    "write_fixed",
]
